# What no filter of the user has filed: mail to name+folder goes to that folder, where the user has made one (RFC 5233).
# Not to those of the system, nor to what is in them: a stranger is not to put mail where only the user does.
require ["envelope", "fileinto", "mailbox", "subaddress", "variables"];

if envelope :detail :matches "to" "?*" {
    set "folder" "${1}${2}";
    # An alias may lead to name+folder, and have a subaddress of its own: that is name+folder+detail then.
    if not mailboxexists "${folder}" {
        if string :matches "${folder}" "?*+*" {
            set "folder" "${1}${2}";
        }
    }
    if allof (
        mailboxexists "${folder}",
        not string :matches "${folder}" [
            "INBOX",
            "Archive", "Archive/*",
            "Drafts", "Drafts/*",
            "Junk", "Junk/*",
            "Sent", "Sent/*",
            "Trash", "Trash/*",
            # The web mail's own contacts and settings.
            "Webmail", "Webmail/*"
        ]
    ) {
        fileinto "${folder}";
    }
}
