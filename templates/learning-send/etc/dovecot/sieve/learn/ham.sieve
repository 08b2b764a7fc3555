# Out of Junk: the user says that it is none. What goes from Junk to Trash is only thrown away.
require ["vnd.dovecot.pipe", "copy", "imapsieve", "environment"];

if environment :is "imap.mailbox" "Trash" {
    stop;
}
pipe :copy "learn" ["ham"];
