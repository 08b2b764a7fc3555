"""Mailboxes: Postfix takes mail from smtp-in, Dovecot keeps it and shows it to its users."""

from __future__ import annotations

import math
from collections.abc import Iterator

from model.network import Role
from model.stack import Host, Stack
from services import dovecot, identity, learning, postfix, replication, smtp_out
from services.service import Call, Compile, Directory, File, Listen, Service, Source, Unit, User
from services.table import table

IMAPS, IMAPS_PROXY = 993, 10993
SIEVE, SIEVE_PROXY = 4190, 14190
"""Ports for clients of the sites, and ports for front ends alone, which speak the PROXY protocol."""
SIEVE_MAIL = 10026
"""On loopback: where Dovecot brings what users' filters send."""
SCRIPTS = "/etc/dovecot/sieve"
FILTER_MAIL = "/usr/local/lib/posthorn/filter-mail"
AUTHORS = "/etc/dovecot/authors"
PROTECTED = ("From", "Sender", "Resent-From", "Resent-Sender", "Delivered-To", "X-Sieve-Redirected-From")
"""Headers that no filter changes: the authors of a mail, and what stops it from going round."""
QUOTA_WARNING = "/usr/local/lib/posthorn/quota-warning"
PURGE = "posthorn-purge.timer"
GRACE_MB = 10
"""By what the last mail may be larger than the room that is left: the default of Dovecot 2.4."""


def configure(stack: Stack, host: Host) -> Service:
    """Postfix on 25 and 465 for the smtp-in hosts, Dovecot with LMTP, IMAPS and ManageSieve."""
    senders, frontends = stack.local_addresses(Role.SMTP_IN), stack.local_addresses(Role.FRONTEND)
    domain, local = stack.mailbox_domain, {"address": "127.0.0.1"}
    smtp = {**local, "kind": "smtp", "server_name": host.fqdn, "refuses": f"no-such-mailbox@{domain}"}
    imap = {**local, "kind": "tls", "server_name": host.fqdn, "expect": "* OK"}
    if stack.accounts:
        smtp["accepts"] = f"{next(iter(stack.accounts))}@{domain}"
    return Service(
        name="maildrop",
        packages=(
            "postfix",
            "postfix-lmdb",
            "dovecot-core",
            "dovecot-auth-lua",
            "dovecot-imapd",
            "dovecot-lmtpd",
            "dovecot-sieve",
            "dovecot-managesieved",
        ),
        users=(User("vmail", home=replication.STORE),),
        # Not writable for the owner of the mail: no home comes into being on a disk that is not the right one.
        directories=(Directory(replication.STORE, mode="0750", group="vmail"), postfix.SOCKETS),
        files=(
            *postfix.files(
                stack,
                host,
                "maildrop",
                public=False,
                size=postfix.inside(stack),
                senders=senders,
                frontends=frontends,
                webmails=stack.local_addresses(Role.WEBMAIL),
                home=replication.HOMES,
                users=dovecot.USERS,
                logins_program=dovecot.LOGINS_PROGRAM,
                auth_workers=dovecot.AUTH_WORKERS,
                replicates=replication.peer_of(stack, host) is not None,
                replication=replication,
                learning=learning,
                smtp_out=smtp_out,
                sieve_mail=SIEVE_MAIL,
                scripts=SCRIPTS,
                quota_warning=QUOTA_WARNING,
                grace=f"{GRACE_MB}M",
                trash=f"{GRACE_MB + 2 * math.ceil(stack.limits.message_size / 2**20)}M",
                modes={QUOTA_WARNING: "0755", FILTER_MAIL: "0755"},
                filter_mail=FILTER_MAIL,
                authors=AUTHORS,
                protected=PROTECTED,
                addresses={account: stack.primary_address(account) for account in stack.accounts},
                sessions=dovecot.Sessions.of(stack, host),
                login_processes=dovecot.LOGIN_PROCESSES,
                ports={"imaps": IMAPS, "imaps_proxy": IMAPS_PROXY, "sieve": SIEVE, "sieve_proxy": SIEVE_PROXY},
            ),
            File(
                "/etc/postfix/mailboxes",
                table({postfix.mailbox(stack, account): account for account in stack.accounts}),
            ),
            File(AUTHORS, table(_authors(stack))),
            dovecot.mailboxes_file(stack, host),
            *dovecot.login_files(),
        ),
        secret_files=(dovecot.logins_file(stack),),
        units=(
            *postfix.units(stack, host),
            *dovecot.unit(
                restart_on=(dovecot.CONFIGURATION, replication.DOVECOT_GUARD),
                reload_on=(*identity.SHOWN, replication.PASSWORD),
            ),
            Unit(PURGE, restart_on=(f"/etc/systemd/system/{PURGE}",)),
        ),
        # By the configuration that is to be: without -c it is that of the Dovecot which runs.
        compiles=tuple(
            Compile(("sievec", "-c", dovecot.CONFIGURATION, f"{SCRIPTS}/{part}"), of=f"{SCRIPTS}/{part}/")
            for part in ("before.d", "after.d")
        ),
        checks=(*postfix.CHECKS, *dovecot.CHECKS),
        health=(
            {**smtp, "port": 25, "tls": "starttls"},
            {**smtp, "port": 465, "tls": "implicit"},
            {**imap, "port": IMAPS, "unless": replication.FILLING},
            {**imap, "port": IMAPS_PROXY, "proxy": True, "unless": replication.FILLING},
        ),
        # Filters run as the owner of the mail.
        calls=(Call(SIEVE_MAIL, "vmail"),),
        listens=(
            *(Listen(port, frm=senders) for port in (25, 465)),
            # While its store is being filled, Dovecot serves nobody.
            *(Listen(port, frm=Source.SITES, unless=replication.FILLING) for port in (IMAPS, SIEVE)),
            *(Listen(port, frm=frontends, unless=replication.FILLING) for port in (IMAPS_PROXY, SIEVE_PROXY)),
        ),
    )


def _authors(stack: Stack) -> Iterator[tuple[str, str]]:
    """What a user's filters may write as, the address first that they write as by themselves. Some have none."""
    for account in stack.accounts:
        first, all_of_them = stack.primary_address(account), sorted(set(stack.addresses_of(account)))
        if all_of_them:
            yield account, ",".join([first, *(address for address in all_of_them if address != first)])
