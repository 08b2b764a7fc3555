"""Submission: takes mail from the stack's own users, and brings it to the world."""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services import dovecot, postfix, tls_policy
from services.senders import owners
from services.service import Call, File, Listen, Service, Source
from services.table import table

SUBMISSION, SUBMISSION_PROXY, SUBMISSION_WEBMAIL = 587, 10587, 12587
"""Ports for clients of the sites, for front ends, who say by the PROXY protocol who is behind them, and for webmail."""
SUBMISSIONS_PROXY = 10465
"""For front ends too: TLS from the first byte (RFC 8314 section 3.3), which the world finds on 465."""
MAILBOXES, REDIRECTED, SAID = 10588, 10589, 10591
"""Ports for the mailbox hosts alone: what they say themselves, what users' filters send on, and what those say."""
FOLD = 10590
"""On loopback: where mails go whose lines are broken before they are signed."""
PORTS = (SUBMISSION, SUBMISSION_PROXY, SUBMISSIONS_PROXY, SUBMISSION_WEBMAIL)


def configure(stack: Stack, host: Host) -> Service:
    """Postfix on 587, with Dovecot as its judge of passwords."""
    name = stack.public_name("smtp_out")
    probe = {
        "kind": "smtp",
        "address": "127.0.0.1",
        "server_name": host.fqdn,
        "tls": "starttls",
        "refuses": "nobody@elsewhere.invalid",
    }
    webmails = stack.local_addresses(Role.WEBMAIL)
    return Service(
        name="smtp-out",
        packages=("postfix", "postfix-lmdb", "postfix-pcre", "dovecot-core", "dovecot-auth-lua"),
        files=(
            *postfix.files(
                stack,
                host,
                "smtp-out",
                public=False,
                size=stack.limits.message_size,
                name=name,
                tls_policy=tls_policy.TABLE,
                submission=SUBMISSION,
                submission_proxy=SUBMISSION_PROXY,
                submissions_proxy=SUBMISSIONS_PROXY,
                mailboxes=MAILBOXES,
                redirected=REDIRECTED,
                fold=FOLD,
                said=SAID,
                maildrops=stack.local_addresses(Role.MAILDROP),
                submission_webmail=SUBMISSION_WEBMAIL,
                logins_program=dovecot.LOGINS_PROGRAM,
                auth_workers=dovecot.AUTH_WORKERS,
                webmails=webmails,
            ),
            File("/etc/postfix/senders", table(owners(stack))),
            *dovecot.login_files(),
        ),
        directories=(postfix.SOCKETS,),
        secret_files=(dovecot.logins_file(stack, machines=True),),
        units=(
            *postfix.units(stack, host),
            *dovecot.unit(reload_on=(dovecot.CONFIGURATION,)),
        ),
        checks=(*postfix.CHECKS, *dovecot.CHECKS),
        health=(
            {**probe, "port": SUBMISSION},
            {**probe, "port": SUBMISSION_PROXY, "proxy": True},
            {**probe, "port": SUBMISSIONS_PROXY, "proxy": True, "tls": "implicit"},
            *(({**probe, "port": SUBMISSION_WEBMAIL},) if webmails else ()),
        ),
        calls=(Call(FOLD, "postfix"),),
        listens=(
            Listen(SUBMISSION, frm=Source.SITES),
            *(Listen(port, frm=stack.local_addresses(Role.FRONTEND)) for port in (SUBMISSION_PROXY, SUBMISSIONS_PROXY)),
            *(Listen(port, frm=stack.local_addresses(Role.MAILDROP)) for port in (MAILBOXES, REDIRECTED, SAID)),
            *((Listen(SUBMISSION_WEBMAIL, frm=webmails),) if webmails else ()),
        ),
    )
