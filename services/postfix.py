"""What the three kinds of Postfix hosts have in common: units, checks, the host's own aliases."""

from __future__ import annotations

from typing import Any

from model.network import Role
from model.stack import Host, Stack
from services import identity, opendkim
from services.render import render, render_tree
from services.service import Check, Directory, File, Sandbox, Unit
from services.table import table

FOLDER = "/etc/postfix/"
LOOKS = ("/etc/postfix/", *identity.SHOWN)
QUIET = 'said=$( { postconf -n; postconf -M; } 2>&1 >/dev/null ); test -z "$said" || { echo "$said"; exit 1; }'
"""Postfix only warns of a misspelt parameter, on standard error: here that counts as refused.

``postfix check`` is not asked: it looks at owners and modes, and says nothing of a missing map or certificate.
"""
SOCKETS = Directory("/var/spool/postfix/private", mode="0700", owner="postfix")
"""Where Dovecot listens for Postfix. On Debian 13 it comes with the first start, and Dovecot may start before."""
OWN = ("root", "postmaster", "abuse", "mailer-daemon")
"""Whom each host knows by its own names: the postmaster reads their mail."""
LOCAL = ("localhost.localdomain", "localhost")
"""By which names each host knows itself, beside those of its own (mydestination)."""
ADDED = 1048576
"""More than hosts on a mail's way add to it. Each step inwards takes so much more: what was taken fits."""
HOPS = 100
"""As many hosts a mail may have passed, inside: twice what the doors allow."""
LONGEST_HEADER = 60000
"""As many bytes of a header field Postfix keeps where milters look at mail, whatever header_size_limit says."""
SANDBOX = Sandbox(
    # Its first process stays root: it binds ports below 1024, keeps the owners of queues, and starts and ends processes
    # of its own user, most of them in the folder of the queues.
    "CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_KILL CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID "
    "CAP_SYS_CHROOT CAP_SYS_RESOURCE",
    asks_addresses=True,
)
CHECKS = (Check(("sh", "-c", QUIET)),)


def units(stack: Stack, host: Host) -> tuple[Unit, ...]:
    """The units of Postfix. On Debian 12 the first only starts the instance, which does the work."""
    if stack.release_of(host) >= 13:
        return (Unit("postfix.service", reload_on=LOOKS, sandbox=SANDBOX),)
    return (Unit("postfix.service", once=True), Unit("postfix@-.service", reload_on=LOOKS, sandbox=SANDBOX))


def files(stack: Stack, host: Host, tree: str, *, public: bool, size: int, **values: Any) -> tuple[File, ...]:
    """The files of one kind of Postfix host, with the aliases of the host itself.

    ``public`` says whether its ports are for the world in the first place, or for hosts of the stack; ``size`` how
    large a mail may be.
    """
    shown = identity.shown(stack, host)
    own = dict.fromkeys(OWN, stack.postmaster_address)
    # What they write leaves with a sender that SPF knows, and whose bounces somebody reads.
    names = (host.fqdn, *(stack.public_name(name) for name in ("smtp_in", "smtp_out", "imap")))
    senders = dict.fromkeys((f"@{name}" for name in names), f"postmaster@{stack.own_domain}")
    rendered = render_tree(
        tree,
        release=stack.release_of(host),
        stack=stack,
        host=host,
        identity=identity,
        # What the mailbox hosts say is signed where it leaves, on smtp-out.
        milter="" if host.has(Role.MAILDROP) else opendkim.MILTER,
        shown=shown,
        local=LOCAL,
        chain=shown.certificate if public else identity.CERTIFICATE,
        size=size,
        inside=inside(stack),
        hops=HOPS,
        longest_header=min(stack.limits.header_size, LONGEST_HEADER),
        **values,
    )
    sni = table(dict.fromkeys(shown.internal, f"{identity.KEY}, {identity.CERTIFICATE}"))
    return (
        *rendered,
        File(f"{FOLDER}aliases", table(own)),
        File(f"{FOLDER}own-senders", table(senders)),
        # smtp-in has an address that was written to for every recipient, the mailbox hosts for their mailboxes.
        File(
            f"{FOLDER}reports",
            render("postfix/reports.j2", stack=stack, renames=tree != "smtp-out", final=tree == "smtp-in"),
        ),
        *((File(f"{FOLDER}sni", sni),) if sni else ()),
    )


def inside(stack: Stack) -> int:
    """How large a mail may be between hosts of the stack."""
    return stack.limits.message_size + 2 * ADDED


def mailbox(stack: Stack, account: str) -> str:
    """The internal address of an account's mailbox."""
    return f"{account}@{stack.mailbox_domain}"
