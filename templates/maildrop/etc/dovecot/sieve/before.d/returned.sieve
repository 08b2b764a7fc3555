# A mail that a filter sent on and that comes back, since nobody took it, stays in INBOX, whatever the filter does besides: the
# same filter would send the report to the same dead mailbox, from where no other comes (RFC 5321 section 6.1). A report holds
# what it is about, at least the header, in which Dovecot has named who sent it on.
require ["body", "copy", "envelope", "fileinto"];

if allof (
    envelope :is "from" "",
    # The whole body as it came, with what is attached (RFC 5173 section 5.1).
    body :raw :contains "X-Sieve-Redirected-From:"
) {
    # With a filter that keeps it as well, it is there once.
    fileinto :copy "INBOX";
}
