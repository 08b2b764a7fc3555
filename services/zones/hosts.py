"""Records of machines: the names of hosts, of roles and of gateways, and the way back from their addresses."""

from __future__ import annotations

from collections.abc import Iterator

from model.base import IPAddress
from model.network import Role
from model.stack import Host, Stack
from services.zones.rrset import Records, RRset


def internal_records(stack: Stack) -> tuple[RRset, ...]:
    """The names of the internal zone: hosts, the round robin of each role, and the maildrop hosts by preference."""
    records, ttl = Records(stack, "internal"), stack.dns.ttl
    for host in stack.all_hosts.values():
        records.addresses(f"hosts.{host.name}.addresses.local", host.fqdn, ttl.internal, host.addresses.local)
    for role in Role:
        hosts, name = stack.hosts_with(role), stack.internal_name(role)
        if role is Role.MAILDROP:
            # The first is preferred, so that users meet one replica as long as it is there.
            preferred = (f"{10 * i} {host.fqdn}." for i, host in enumerate(hosts, 1))
            records.add("service.preference", name, "MX", ttl.internal, preferred)
        else:
            records.addresses("hosts", name, ttl.service, (a for host in hosts for a in host.addresses.local))
    return tuple(records.found)


def host_records(stack: Stack) -> tuple[RRset, ...]:
    """The public names of hosts and gateways, and the names of all addresses."""
    records, ttl = Records(stack, "hosts"), stack.dns.ttl
    for role, service, seconds in ((Role.SMTP_IN, "smtp_in", ttl.service), (Role.FRONTEND, "frontend", ttl.frontend)):
        public = [address for host in stack.hosts_with(role) for address in host.addresses.public]
        records.addresses(f"service.names.{service}", stack.public_name(service), seconds, public)
    for index, gateway in enumerate(stack.gateways):
        records.addresses(f"gateways[{index}].name", gateway.name, ttl.internal, gateway.addresses)
    everyone = [address for gateway in stack.gateways for address in gateway.addresses]
    records.addresses("service.names.egress", stack.public_name("egress"), ttl.internal, everyone)
    for path, address, name in _reverse(stack):
        records.add(path, address.reverse_pointer, "PTR", ttl.internal, (f"{name}.",))
    return tuple(records.found)


def _reverse(stack: Stack) -> Iterator[tuple[str, IPAddress, str]]:
    """An address and the name it has: one that leads back to it (RFC 1912 section 2.1), and that it greets with."""
    for host in stack.all_hosts.values():
        for address in host.addresses.local:
            yield f"hosts.{host.name}.addresses.local", address, host.fqdn
        for address in host.addresses.public:
            yield f"hosts.{host.name}.addresses.public", address, _public_name_of(stack, host)
    for index, gateway in enumerate(stack.gateways):
        for address in gateway.addresses:
            yield f"gateways[{index}].addresses", address, gateway.name


def _public_name_of(stack: Stack, host: Host) -> str:
    return stack.public_name("smtp_in" if host.has(Role.SMTP_IN) else "frontend")
