"""Every DNS record of a stack, derived from the model: nothing is typed twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from model.base import IPAddress, IPNetwork
from model.network import Role
from model.stack import Host, Stack

Phase = Literal["internal", "hosts", "service"]
STRING = 255
"""Longest character-string of a TXT record, in octets (RFC 1035 section 3.3)."""


@dataclass(frozen=True)
class RRset:
    """All records of one name and type (RFC 2181 section 5). Names have no trailing dot, values are as in a zone file.

    ``phase`` says when it is published: internal names first, then the hosts, then what leads the world to them.
    """

    name: str
    type: str
    ttl: int
    records: tuple[str, ...]
    zone: str
    phase: Phase


def text(value: str) -> str:
    """A TXT value as strings of at most 255 octets. Readers join them without a space (RFC 7208 section 3.3)."""
    parts = [value[start : start + STRING] for start in range(0, len(value), STRING)] or [""]
    return " ".join('"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"' for part in parts)


def _zone_of(stack: Stack, name: str) -> str | None:
    """The most specific zone of the stack that holds a name."""
    holding = [zone for zone in stack.dns.zones if name == zone or name.endswith(f".{zone}")]
    return max(holding, key=len, default=None)


class _Records:
    """Collects RRsets. Records of names that no zone of the stack holds are somebody else's."""

    def __init__(self, stack: Stack, phase: Phase) -> None:
        self.stack, self.phase = stack, phase
        self.found: list[RRset] = []

    def add(self, name: str, kind: str, ttl: int, records: Iterable[str]) -> None:
        values, zone = tuple(dict.fromkeys(records)), _zone_of(self.stack, name)
        if values and zone:
            self.found.append(RRset(name, kind, ttl, values, zone, self.phase))

    def addresses(self, name: str, ttl: int, addresses: Iterable[IPAddress]) -> None:
        """A and AAAA."""
        listed = list(addresses)
        for kind, version in (("A", 4), ("AAAA", 6)):
            self.add(name, kind, ttl, (str(a) for a in listed if a.version == version))


def internal_records(stack: Stack) -> tuple[RRset, ...]:
    """The names of the internal zone: hosts, the round robin of each role, and the maildrop hosts by preference."""
    records, ttl = _Records(stack, "internal"), stack.dns.ttl
    for host in stack.all_hosts.values():
        records.addresses(host.fqdn, ttl.internal, host.addresses.local)
    for role in Role:
        hosts = stack.hosts_with(role)
        name = stack.internal_name(role)
        if role is Role.MAILDROP:
            # The first is preferred, so that users meet one replica as long as it is there.
            records.add(name, "MX", ttl.internal, (f"{10 * i} {host.fqdn}." for i, host in enumerate(hosts, 1)))
        else:
            records.addresses(name, ttl.service, (a for host in hosts for a in host.addresses.local))
    return tuple(records.found)


def _host_records(stack: Stack) -> tuple[RRset, ...]:
    records, ttl = _Records(stack, "hosts"), stack.dns.ttl
    for role, service, seconds in ((Role.SMTP_IN, "smtp_in", ttl.service), (Role.FRONTEND, "frontend", ttl.frontend)):
        public = [address for host in stack.hosts_with(role) for address in host.addresses.public]
        records.addresses(stack.public_name(service), seconds, public)
    for gateway in stack.gateways:
        records.addresses(gateway.name, ttl.internal, gateway.addresses)
    everyone = [address for gateway in stack.gateways for address in gateway.addresses]
    records.addresses(stack.public_name("egress"), ttl.internal, everyone)
    for address, name in _reverse(stack):
        records.add(address.reverse_pointer, "PTR", ttl.internal, (f"{name}.",))
    return tuple(records.found)


def _reverse(stack: Stack) -> Iterator[tuple[IPAddress, str]]:
    """An address and the name it has: one that leads back to it (RFC 1912 section 2.1), and that it greets with."""
    for host in stack.all_hosts.values():
        for address in host.addresses.local:
            yield address, host.fqdn
        for address in host.addresses.public:
            yield address, _public_name_of(stack, host)
    for gateway in stack.gateways:
        for address in gateway.addresses:
            yield address, gateway.name


def _public_name_of(stack: Stack, host: Host) -> str:
    return stack.public_name("smtp_in" if host.has(Role.SMTP_IN) else "frontend")


def _service_records(stack: Stack) -> tuple[RRset, ...]:
    records, ttl = _Records(stack, "service"), stack.dns.ttl
    frontend = stack.public_name("frontend")
    for service, seconds in (("smtp_out", ttl.submission), ("imap", ttl.service), ("webmail", ttl.service)):
        records.add(stack.public_name(service), "CNAME", seconds, (f"{frontend}.",))
    all_, policy = stack.dns.spf_all, f"_spf.{stack.domain}"
    for name, value in _spf(stack):
        records.add(name, "TXT", ttl.policy, (text(value),))
    # The names that hosts greet with are senders too: of every bounce (RFC 7208 section 2.4).
    for service in ("smtp_in", "egress"):
        records.add(stack.public_name(service), "TXT", ttl.policy, (text(f"v=spf1 include:{policy} {all_}"),))
    for domain in stack.domains:
        records.add(domain, "MX", ttl.mx, (f"10 {stack.public_name('smtp_in')}.",))
        records.add(domain, "TXT", ttl.policy, (text(f"v=spf1 include:{policy} {all_}"),))
        records.add(f"_dmarc.{domain}", "TXT", ttl.policy, (text(stack.dns.dmarc),))
        for selector, key in sorted(stack.keys.public.dkim.get(domain, {}).items()):
            if selector in (stack.dkim.selector, *stack.dkim.published):
                value = f"v=DKIM1; k=rsa; p={key}"
                records.add(f"{selector}._domainkey.{domain}", "TXT", ttl.policy, (text(value),))
    for domain, receiver in _reports(stack):
        records.add(f"{domain}._report._dmarc.{receiver}", "TXT", ttl.policy, (text("v=DMARC1"),))
    return tuple(records.found)


def _spf(stack: Stack) -> Iterator[tuple[str, str]]:
    """SPF of the stack, split by family: three look-ups of the ten that are allowed (RFC 7208 section 4.6.4)."""
    sources, all_ = stack.leaves_from(), stack.dns.spf_all
    yield f"_spf.{stack.domain}", f"v=spf1 include:_spf4.{stack.domain} include:_spf6.{stack.domain} {all_}"
    for version in (4, 6):
        words = [f"ip{version}:{_short(source)}" for source in sources if source.version == version]
        yield f"_spf{version}.{stack.domain}", " ".join(("v=spf1", *words, all_))


def _short(source: IPAddress | IPNetwork) -> str:
    return str(source).removesuffix("/32" if source.version == 4 else "/128")


def _reports(stack: Stack) -> Iterator[tuple[str, str]]:
    """Domains whose DMARC reports go to an address in another domain, which has to agree (RFC 7489 section 7.1)."""
    addresses = [part.partition("mailto:")[2] for part in stack.dns.dmarc.replace(";", ",").split(",")]
    receivers = {address.partition("@")[2].partition("!")[0].strip() for address in addresses if "@" in address}
    for domain in stack.domains:
        for receiver in sorted(receivers):
            if receiver != domain:
                yield domain, receiver


def rrsets(stack: Stack) -> tuple[RRset, ...]:
    """All RRsets of a stack, in the order in which they are published."""
    return (*internal_records(stack), *_host_records(stack), *_service_records(stack))


def zone_files(stack: Stack) -> dict[str, str]:
    """Zone to its records in standard syntax (RFC 1035 section 5), to be included below one's own SOA and NS."""
    ordered = sorted(rrsets(stack), key=lambda rrset: (rrset.zone, tuple(reversed(rrset.name.split("."))), rrset.type))
    files = dict.fromkeys(stack.dns.zones, "")
    for zone, found in groupby(ordered, key=lambda rrset: rrset.zone):
        lines = [f"$ORIGIN {zone}."]
        for rrset in found:
            owner = "@" if rrset.name == zone else rrset.name.removesuffix(f".{zone}")
            lines += [f"{owner} {rrset.ttl} IN {rrset.type} {record}" for record in rrset.records]
        files[zone] = "\n".join(lines) + "\n"
    return files
