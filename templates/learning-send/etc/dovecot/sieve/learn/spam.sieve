# Into Junk: the user says that it is spam.
require ["vnd.dovecot.pipe", "copy", "imapsieve"];

# A large mail teaches nothing: its words are few, and it would fill the spool.
if size :over 512K {
    stop;
}
pipe :copy "learn" ["spam"];
