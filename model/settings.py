"""What an operator chooses for the stack as a whole."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Literal

from cryptography import x509
from pydantic import AfterValidator, Field

from model.base import AnyAddress, AnyNetwork, DnsName, Frozen, HostName, Label, MailAddress, Selector, Sender, matching
from model.mail import AliasTarget
from model.network import Release

_RANGE = r"(\d{1,3})(?:\.\.(\d{1,3}))?"
_PART = rf"(?:\d{{1,3}}|\[{_RANGE}(?:;{_RANGE})*\])"


def _replies(value: str) -> str:
    """Replies of a blocklist in Postfix's notation (reject_rbl_client in postconf(5))."""
    ranges = [(int(low), int(high or low)) for low, high in re.findall(_RANGE, value)]
    if not re.fullmatch(rf"{_PART}(?:\.{_PART}){{3}}", value) or not all(low <= high < 256 for low, high in ranges):
        form = "four parts joined by dots, each a number or some of them in brackets, as 127.0.0.[2..11;14]"
        raise ValueError(f"{value!r} tells no replies: write {form}")
    return value


def _certificates(value: str) -> str:
    """One or more certificates, ended by a newline, so that texts can be joined."""
    try:
        x509.load_pem_x509_certificates(value.encode())
    except ValueError:
        raise ValueError("must be certificates in PEM: -----BEGIN CERTIFICATE----- and what follows") from None
    return value.rstrip("\n") + "\n"


def _ssh_key(value: str) -> str:
    """A public key as a line of authorized_keys, without options. Its type is in it twice (RFC 4253 section 6.6)."""
    line = value.strip()
    kind, _, rest = line.partition(" ")
    try:
        blob = base64.b64decode(rest.partition(" ")[0], validate=True)
    except ValueError:
        blob = b""
    read, parts = 0, []
    while read < len(blob):
        start = read + 4
        read = start + int.from_bytes(blob[read:start], "big")
        parts.append(blob[start:read])
    # One that was cut says that it is longer than it is.
    if len(parts) < 2 or read != len(blob) or parts[0] != kind.encode() or not line.isprintable():
        raise ValueError("must be an SSH public key: the one line of the .pub file, as ssh-ed25519 AAAA…")
    return line


Replies = Annotated[str, AfterValidator(_replies)]
Certificates = Annotated[str, AfterValidator(_certificates)]
SshKey = Annotated[str, AfterValidator(_ssh_key)]


class Names(Frozen):
    """The labels of the public services below the service's domain."""

    smtp_in: Label = "smtp-in"
    """The MX of every domain."""
    smtp_out: Label = "smtp-out"
    """Where users submit, on ports 465 and 587."""
    imap: Label = "imap"
    """Where users read, on port 993, and edit filters, on port 4190."""
    webmail: Label = "webmail"
    """The web mail."""
    frontend: Label = "nginx0"
    """All front ends; submission, mailboxes and web mail are aliases of it."""
    egress: Label = "egress"
    """What smtp-out calls itself when it sends: a name that resolves to all gateways."""


class ServiceSettings(Frozen):
    """The mail service itself: its domain, its internal domain, its people."""

    domain: HostName
    """The domain that the names of the public services are in."""
    network_domain: HostName
    """The internal domain: hosts are role.site below it."""
    postmaster: AliasTarget
    """The account, or the address elsewhere, that gets mail for postmaster and abuse of every domain."""
    website: Annotated[
        str, matching(r"https://[^\s\"'\\;{}$]+", "must be a web address: write it as https://www.example.org/")
    ]
    """Where visitors go who are not welcome at the web mail."""
    preference: tuple[Label, ...] = Field(min_length=1)
    """All sites, the most preferred first: its hosts are the primaries, and a change comes to it last."""
    release: Release = 13
    """Debian on all hosts that do not say another."""
    authorities: tuple[Certificates, ...] = ()
    """Certificates (PEM) that hosts believe in place of Debian's list, on a private internet that has its own root."""
    names: Names = Names()
    """The labels of the public services."""


class Access(Frozen):
    """Who may reach what is not for everybody."""

    operators: tuple[SshKey, ...] = ()
    """SSH public keys of the operators."""
    ssh_from: tuple[AnyNetwork, ...] = Field(min_length=1)
    """Networks that reach SSH; what the operator works from has to be among them."""
    users_from: tuple[AnyNetwork, ...] = ()
    """Networks that reach webmail and ManageSieve."""


class Times(Frozen):
    """Times to live of published records, in seconds."""

    service: int = 60
    """Addresses of smtp-in, and of the internal name of each role; names of imap and webmail."""
    submission: int = 3600
    """The name of smtp-out."""
    frontend: int = 600
    """Addresses of the front ends."""
    mx: int = 86400
    """MX records of the domains."""
    policy: int = 3600
    """SPF, DKIM, DMARC and the like."""
    internal: int = 300
    """Internal names of hosts, and reverse names."""


class DnsServer(Frozen):
    """An authoritative server that takes dynamic updates (RFC 2136), signed with a TSIG key (RFC 8945)."""

    address: AnyAddress
    """Where it is asked to change a zone."""
    port: int = Field(default=53, ge=1, le=65535)
    """And at which port."""
    key: DnsName
    """The name of the TSIG key; ``make tsig`` stores its secret."""
    algorithm: Literal["hmac-sha256", "hmac-sha512"] = "hmac-sha256"
    """The algorithm of the TSIG key."""


class Resolver(Frozen):
    """How the resolvers of the hosts start. Empty root hints mean the internet's own root."""

    bootstrap: tuple[AnyAddress, ...] = ()
    """Resolvers that a VM uses until its own one runs."""
    root_hints: tuple[AnyAddress, ...] = ()
    """Servers of a root that is not the internet's own."""
    trust_anchor: tuple[str, ...] = ()
    """DS or DNSKEY records of a root that is not the internet's own."""


class Deletions(Frozen):
    """How many of a zone's RRsets one ``make up`` may delete without being told to: a share, in per cent.

    A zone with fewer than ``least`` RRsets is too small for shares to mean anything.
    """

    share: int = Field(default=30, ge=0, le=100)
    """The largest share of a zone's RRsets."""
    least: int = Field(default=10, ge=1)
    """How many RRsets a zone has to have for that."""


class Dns(Frozen):
    """What is published, and where. A zone without a server is rendered, but not published."""

    zones: dict[DnsName, str | None] = {}
    """Zone to the name of its server in ``servers``."""
    servers: dict[Label, DnsServer] = {}
    """Servers that take updates."""
    ttl: Times = Times()
    """Times to live of what is published."""
    resolver: Resolver = Resolver()
    """How the resolvers of the hosts start."""
    dmarc: str = "v=DMARC1; p=none"
    """What receivers are to do with mail that only claims to be ours (RFC 9989 section 4.7)."""
    reports: MailAddress | None = None
    """Who gets the reports of others about DMARC and TLS; the postmaster when it is not said."""
    spf_all: Literal["~all", "-all"] = "~all"
    """What SPF says of all other senders: soft fail or fail (RFC 7208 section 5.1)."""
    mta_sts: Literal["none", "testing", "enforce"] = "testing"
    """What senders do whose TLS to our MX is not as the policy says (RFC 8461 section 5)."""
    caa: tuple[HostName, ...] = ()
    """The only authorities that may issue certificates for the domains, websites included (RFC 8659)."""
    silent: tuple[DnsName, ...] = ()
    """Names that neither send mail nor take any: parked domains, websites."""
    deletions: Deletions = Deletions()
    """What is too much to be deleted unasked."""


class Acme(Frozen):
    """An authority that the world believes, asked for certificates by ACME (RFC 8555) with DNS-01."""

    directory: Annotated[
        str, matching(r"https://\S+", "must be a web address: write it as https://acme.example/directory")
    ]
    """Where the authority is asked. A private one has to be among ``service.authorities``."""
    contact: MailAddress | None = None
    """Whom the authority writes to; the postmaster when it is not said."""


class Dkim(Frozen):
    """DKIM selectors (RFC 6376 section 3.1): all of ``published`` stand in DNS, ``selector`` signs."""

    selector: Selector
    """The one that signs."""
    published: tuple[Selector, ...] = ()
    """Others whose keys stand in DNS: the one before, or the one to come."""


class DnsblRule(Frozen):
    """A blocklist, as Postfix asks it: in which restriction, under which zone, for which replies."""

    what: Literal["client", "sender", "helo", "reverse_client"]
    """What is looked up: the client's address, or the domain of the sender, of HELO or of the client's reverse name."""
    zone: DnsName
    """The zone of the list."""
    replies: Replies = "127.0.[0..2].[2..254]"
    """Replies that mean listed, in Postfix's notation. By others a list tells of an error, as by 127.255.255.254 or
    127.0.0.1: those count only where they are named."""
    warn_only: bool = False
    """Log it, and refuse nobody: for replies that tell of an error."""


class Thresholds(Frozen):
    """Scores at which rspamd greylists, tags and rejects."""

    greylist: float = 4.0
    """From here a sender is asked to come again."""
    tag: float = 6.0
    """From here a mail gets ``X-Spam: Yes``, and goes to Junk."""
    reject: float = 15.0
    """From here a mail is refused."""


class Allowed(Frozen):
    """Who is let in although blocklists or the scanners would not: but for what is said here, as all others.

    A mail that writes as a domain of the stack is never let in by this.
    """

    clients: tuple[AnyNetwork, ...] = ()
    """Addresses and networks whose mail passes blocklists, greylisting and the score of spam."""
    senders: tuple[Sender, ...] = ()
    """Authors (From) whose mail passes greylisting and the score of spam, where SPF or DKIM proves that it is theirs. A
    domain means those below it too. Blocklists are asked before a mail is seen: name the client for those."""
    forwarders: tuple[DnsName, ...] = ()
    """Mailing lists and forwarders whose mail may bear authors of domains that ask to refuse it (DMARC), where
    SPF or DKIM proves that it comes from the forwarder. A domain means those below it too."""


class Denied(Frozen):
    """Who is refused, whatever blocklists and scanners say. The narrowest network counts, and no sender is let in that
    stands here."""

    clients: tuple[AnyNetwork, ...] = ()
    """Addresses and networks from which nothing is taken."""
    senders: tuple[Sender, ...] = ()
    """Envelope senders and authors (From) from whom nothing is taken. A domain means those below it too."""


class Filter(Frozen):
    """Spam and blocklists."""

    dnsbl: tuple[DnsblRule, ...] = ()
    """Blocklists, asked in this order."""
    allow: Allowed = Allowed()
    """Who is let in all the same."""
    deny: Denied = Denied()
    """Who is refused in any case."""
    scores: Thresholds = Thresholds()
    """What is done at which score."""
    greylist_delay: int = Field(default=300, ge=1)
    """How long a sender waits that is asked to come again, in seconds."""
    hyperscan: bool = True
    """Compile rspamd's patterns for hyperscan: faster, at some 10 CPU-seconds per scanner after each upgrade."""


class Limits(Frozen):
    """Sizes in bytes, rates per minute and client, but for what one account sends in a day."""

    message_size: int = Field(default=52428800, ge=1048576, le=1073741824)
    """The largest mail that a user submits. Mail from outside may be 1 MiB larger."""
    header_size: int = Field(default=4096000, ge=16384, le=1073741824)
    """The largest header field of a mail. One of more than 60,000 bytes is refused anyway: Postfix would cut it."""
    connections: int = Field(default=20, ge=1)
    """Connections of one client to submission at the same time. A client is an address: an office may share one."""
    connection_rate: int = Field(default=60, ge=1)
    """Connections of one client to submission."""
    login_rate: int = Field(default=30, ge=1)
    """Logins of one client at submission, right or wrong: what bounds the guessing of passwords."""
    message_rate: int = Field(default=60, ge=1)
    """Mails that one client submits."""
    recipients_per_day: int = Field(default=2000, ge=1)
    """Recipients that one account writes to in a day, from wherever, and as many to whom its filters send. They come
    back evenly over the day."""
    address_connections: int = Field(default=500, ge=20)
    """Connections of one address (IPv6: one /64) to one front end at the same time, to submission, mailboxes and
    filters together. An office may share one."""
    imap_connections: int = Field(default=50, ge=1)
    """IMAP connections of one user from one address at the same time."""
    imap_sessions: int | None = Field(default=None, ge=50, le=10000)
    """IMAP sessions of all users at the same time, on one mailbox host: all users come to the preferred one. Without
    it, a machine has as many as its memory carries (docs/capacity.md), and a host that was there already 2000."""
    sieve_processes: int = Field(default=256, ge=1)
    """ManageSieve sessions of all users at the same time."""


__all__ = ["Access", "Acme", "Dkim", "Dns", "Filter", "Limits", "ServiceSettings"]
