"""What an operator chooses for the stack as a whole."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, IPvAnyAddress, IPvAnyNetwork

from model.base import DnsName, Frozen, Label, MailAddress
from model.mail import AliasTarget
from model.network import Release


class Names(Frozen):
    """The labels of the public services below the service's domain."""

    smtp_in: Label = "smtp-in"
    smtp_out: Label = "smtp-out"
    imap: Label = "imap"
    webmail: Label = "webmail"
    frontend: Label = "nginx0"
    egress: Label = "egress"
    """What smtp-out calls itself when it sends: a name that resolves to all gateways."""


class ServiceSettings(Frozen):
    """The mail service itself: its domain, its internal domain, its people."""

    domain: DnsName
    network_domain: DnsName
    postmaster: AliasTarget
    """The account, or the address elsewhere, that gets mail for postmaster and abuse of every domain."""
    website: str = Field(pattern=r"^https://")
    preference: tuple[Label, ...] = Field(min_length=1)
    """All sites, the most preferred first: its hosts are the primaries, and a change comes to it last."""
    release: Release = 13
    """Debian on all hosts that do not say another."""
    authorities: tuple[str, ...] = ()
    """Certificates (PEM) that hosts believe in place of Debian's list, on a private internet that has its own root."""
    names: Names = Names()


class Access(Frozen):
    """Who may reach what is not for everybody."""

    operators: tuple[str, ...] = ()
    """SSH public keys of the operators."""
    ssh_from: tuple[IPvAnyNetwork, ...] = Field(min_length=1)
    users_from: tuple[IPvAnyNetwork, ...] = ()
    """Networks that reach webmail and ManageSieve."""


class Times(Frozen):
    """Times to live of published records, in seconds."""

    service: int = 60
    submission: int = 3600
    frontend: int = 600
    mx: int = 86400
    policy: int = 3600
    internal: int = 300


class DnsServer(Frozen):
    """An authoritative server that takes dynamic updates (RFC 2136), signed with a TSIG key (RFC 8945)."""

    address: IPvAnyAddress
    port: int = 53
    key: DnsName
    algorithm: Literal["hmac-sha256", "hmac-sha512"] = "hmac-sha256"


class Resolver(Frozen):
    """How the resolvers of the hosts start. Empty root hints mean the internet's own root."""

    bootstrap: tuple[IPvAnyAddress, ...] = ()
    """Resolvers that a VM uses until its own one runs."""
    root_hints: tuple[IPvAnyAddress, ...] = ()
    trust_anchor: tuple[str, ...] = ()
    """DS or DNSKEY records of a root that is not the internet's own."""


class Deletions(Frozen):
    """How many of a zone's RRsets one ``make up`` may delete without being told to: a share, in per cent.

    A zone with fewer than ``least`` RRsets is too small for shares to mean anything.
    """

    share: int = Field(default=30, ge=0, le=100)
    least: int = Field(default=10, ge=1)


class Dns(Frozen):
    """What is published, and where. A zone without a server is rendered, but not published."""

    zones: dict[DnsName, str | None] = {}
    """Zone to the name of its server in ``servers``."""
    servers: dict[Label, DnsServer] = {}
    ttl: Times = Times()
    resolver: Resolver = Resolver()
    dmarc: str = "v=DMARC1; p=none"
    """What receivers are to do with mail that only claims to be ours (RFC 7489 section 6.3)."""
    reports: MailAddress | None = None
    """Who gets the reports of others about DMARC and TLS; the postmaster when it is not said."""
    spf_all: Literal["~all", "-all"] = "~all"
    mta_sts: Literal["none", "testing", "enforce"] = "testing"
    """What senders do whose TLS to our MX is not as the policy says (RFC 8461 section 5)."""
    caa: tuple[DnsName, ...] = ()
    """The only authorities that may issue certificates for the domains, websites included (RFC 8659)."""
    silent: tuple[DnsName, ...] = ()
    """Names that neither send mail nor take any: parked domains, websites."""
    deletions: Deletions = Deletions()


class Dkim(Frozen):
    """DKIM selectors (RFC 6376 section 3.1): all of ``published`` stand in DNS, ``selector`` signs."""

    selector: Label
    published: tuple[Label, ...] = ()


class DnsblRule(Frozen):
    """A blocklist, as Postfix asks it: in which restriction, under which zone, for which replies."""

    what: Literal["client", "sender", "helo", "reverse_client"]
    zone: DnsName
    replies: str | None = Field(default=None, pattern=r"^[0-9.\[\];]+$")
    warn_only: bool = False


class Thresholds(Frozen):
    """Scores at which rspamd greylists, tags and rejects."""

    greylist: float = 4.0
    tag: float = 6.0
    reject: float = 15.0


class Filter(Frozen):
    """Spam and blocklists."""

    dnsbl: tuple[DnsblRule, ...] = ()
    scores: Thresholds = Thresholds()
    greylist_delay: int = Field(default=300, ge=1)
    hyperscan: bool = True
    """Compile rspamd's patterns for hyperscan: faster, at some 10 CPU-seconds per scanner after each upgrade."""


class Limits(Frozen):
    """Sizes in bytes, rates per minute and client."""

    message_size: int = 52428800
    header_size: int = 4096000
    connections: int = 4
    connection_rate: int = 10
    message_rate: int = 60
    imap_connections: int = 50
    sieve_processes: int = 256


__all__ = ["Access", "Dkim", "Dns", "Filter", "Limits", "ServiceSettings"]
