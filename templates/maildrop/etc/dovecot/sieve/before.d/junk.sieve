# What the scanners took for spam is filed to Junk, before any filter of the user (RFC 5228).
require ["fileinto", "mailbox"];

if header :is "X-Spam" "Yes" {
    fileinto :create "Junk";
    stop;
}
