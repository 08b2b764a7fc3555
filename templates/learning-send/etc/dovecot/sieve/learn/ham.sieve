# Out of Junk: the user says that it is none. What goes from Junk to Trash is only thrown away.
require ["vnd.dovecot.pipe", "copy", "imapsieve", "environment"];

if environment :is "imap.mailbox" "Trash" {
    stop;
}
# A large mail teaches nothing: its words are few, and it would fill the spool.
if size :over 512K {
    stop;
}
pipe :copy "learn" ["ham"];
