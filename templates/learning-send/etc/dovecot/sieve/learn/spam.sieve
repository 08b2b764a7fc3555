# Into Junk: the user says that it is spam.
require ["vnd.dovecot.pipe", "copy", "imapsieve"];

pipe :copy "learn" ["spam"];
