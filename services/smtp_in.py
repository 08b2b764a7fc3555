"""The MX: takes mail for the stack's domains from anyone, and relays for no one."""

from __future__ import annotations

from collections.abc import Iterator

from model.base import IPNetwork
from model.mail import CATCH_ALL, Target
from model.network import Role
from model.settings import DnsblRule
from model.stack import Host, Stack
from services import postfix, tls_policy
from services.service import Call, File, Listen, Service, Source
from services.table import table

DISCARDED = "discard.invalid"
"""A domain that cannot exist (RFC 2606), whose mail the discard transport takes."""
FORWARD_PORT = 10024

KEPT_OUT = "554 5.7.1 No mail is taken from your address here"

RESTRICTIONS = {
    "client": "reject_rbl_client",
    "sender": "reject_rhsbl_sender",
    "helo": "reject_rhsbl_helo",
    "reverse_client": "reject_rhsbl_reverse_client",
}


def configure(stack: Stack, host: Host) -> Service:
    """Postfix on 25 and 465 of the public addresses; every decision about a recipient is final at RCPT."""
    name = stack.public_name("smtp_in")
    probe = {"kind": "smtp", "address": "127.0.0.1", "server_name": host.fqdn}
    asks = {"accepts": stack.postmaster_address, "refuses": "nobody@elsewhere.invalid"}
    return Service(
        name="smtp-in",
        packages=("postfix", "postfix-lmdb", "postfix-pcre"),
        files=(
            *postfix.files(
                stack,
                host,
                "smtp-in",
                public=True,
                # Users' mail comes this way too, and has grown since they sent it.
                size=stack.limits.message_size + postfix.ADDED,
                expansion=expansion(stack),
                name=name,
                tls_policy=tls_policy.TABLE,
                dnsbl=[restriction(rule) for rule in stack.filter.dnsbl],
                discarded=DISCARDED,
                forward_port=FORWARD_PORT,
            ),
            File("/etc/postfix/clients", clients(stack)),
            File("/etc/postfix/virtual-domains", table(dict.fromkeys(stack.domains, "the stack's"))),
            File("/etc/postfix/virtual", table([*virtual(stack), *own(stack)])),
            File(
                "/etc/postfix/transport",
                table({stack.mailbox_domain: "maildrop:", DISCARDED: "discard:as the stack says"}),
            ),
        ),
        units=postfix.units(stack, host),
        checks=postfix.CHECKS,
        health=(
            {**probe, **asks, "port": 25, "tls": "starttls"},
            {**probe, **asks, "port": 465, "tls": "implicit"},
        ),
        calls=(Call(FORWARD_PORT, "postfix"),),
        listens=(Listen(25, frm=Source.INTERNET), Listen(465, frm=Source.INTERNET)),
    )


def restriction(rule: DnsblRule) -> str:
    """A blocklist as a restriction of Postfix. Only the replies that mean "listed" count (RFC 5782 section 2.3)."""
    return f"{'warn_if_reject ' if rule.warn_only else ''}{RESTRICTIONS[rule.what]} {rule.zone}={rule.replies}"


def clients(stack: Stack) -> str:
    """Networks and what becomes of them. The first line that fits counts (cidr_table(5)): the narrowest comes first."""
    told: list[tuple[IPNetwork, str]] = [(network, "OK") for network in stack.filter.allow.clients]
    told += [(network, KEPT_OUT) for network in stack.filter.deny.clients]
    told.sort(key=lambda entry: (entry[0].version, -entry[0].prefixlen, entry[0].network_address.packed))
    return "".join(f"{network} {action}\n" for network, action in told)


def virtual(stack: Stack) -> Iterator[tuple[str, str]]:
    """Every address of every domain, and where its mail goes; aliases of equal domains are written out."""
    for domain in stack.domains:
        for local, targets in stack.resolved_aliases(domain).items():
            address = f"@{domain}" if local == CATCH_ALL else f"{local}@{domain}"
            kept = [target for target in targets if not target.discards] or list(targets)
            yield address, ", ".join(_delivered(stack, local, target) for target in kept)


def own(stack: Stack) -> Iterator[tuple[str, str]]:
    """The addresses at the hosts' own names. local(8) would bounce a mail whose ``Delivered-To`` looks like a loop.

    A bare name stands for all names of the host itself, its addresses in brackets too (virtual(5)).
    """
    yield from ((local, stack.postmaster_address) for local in postfix.OWN)
    hosts = (host.fqdn for host in stack.hosts_with(Role.SMTP_IN))
    for name in (stack.public_name("smtp_in"), *hosts, *postfix.LOCAL):
        yield from ((f"{local}@{name}", stack.postmaster_address) for local in postfix.OWN)


def expansion(stack: Stack) -> int:
    """No address leads to more others than there are in the whole table (at least Postfix's own default)."""
    return max(1000, sum(targets.count("@") for _, targets in virtual(stack)))


def _delivered(stack: Stack, local: str, target: Target) -> str:
    if target.discards:
        return f"{'nobody' if local == CATCH_ALL else local}@{DISCARDED}"
    return target.address or postfix.mailbox(stack, str(target))
