# What no filter of the user has filed: mail to name+folder goes to that folder, where the user has made one (RFC 5233).
# Not to those of the system: a stranger is not to put mail where only the user does.
require ["envelope", "fileinto", "mailbox", "subaddress", "variables"];

if envelope :detail :matches "to" "?*" {
    set "folder" "${1}${2}";
    if allof (
        mailboxexists "${folder}",
        not string :is "${folder}" ["INBOX", "Archive", "Drafts", "Junk", "Sent", "Trash"]
    ) {
        fileinto "${folder}";
    }
}
