"""What a VM is told at its first boot, and only then: who it is, who may log in, and where it is reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.keys import PLACEHOLDER
from model.stack import Host, Stack
from services.private import private
from services.render import render

LOCAL, PUBLIC = "local0", "public0"
"""Interfaces are known by what they lead to; they are found by the MAC address that follows from the host's name."""


@dataclass(frozen=True)
class FirstBoot:
    """The three files of a NoCloud disk. ``user_data`` holds the private half of the SSH host key."""

    user_data: str = field(repr=False)
    meta_data: str
    network_config: str


def interface_names(host: Host) -> tuple[str, ...]:
    """The interfaces of a VM that have a use, in the order of its network cards."""
    return (LOCAL, PUBLIC)[: host.machine.interfaces] if host.machine else ()


def first_boot(stack: Stack, host: Host) -> FirstBoot:
    """The data of a VM's first boot: its key, the operators' keys, its site-local addresses, bootstrap resolvers.

    Site-local and nothing else: the public ones come with the rest of the configuration.
    """
    keys = stack.keys.public.hosts.get(host.name)
    resolvers = [str(address) for address in stack.dns.resolver.bootstrap]
    user_data = render(
        "cloud-init/user-data.j2",
        host=host,
        host_key=private(stack, lambda ring: ring.hosts[host.name].ssh),
        host_key_public=keys.ssh if keys else PLACEHOLDER,
        operators=stack.access.operators,
        resolv_conf="".join(f"nameserver {resolver}\n" for resolver in resolvers),
    )
    network_config = render(
        "cloud-init/network-config.j2",
        interfaces=[_interface(stack, host, index, name) for index, name in enumerate(interface_names(host))],
        resolvers=resolvers,
    )
    return FirstBoot(user_data, render("cloud-init/meta-data.j2", host=host), network_config)


def _interface(stack: Stack, host: Host, index: int, name: str) -> Mapping[str, Any]:
    network = stack.site_of(host).local
    managed = host.addresses.local if name == LOCAL else ()
    families = {address.version for address in managed}
    lengths = {address: next(p.prefixlen for p in network.prefixes if address in p) for address in managed}
    return {
        "name": name,
        "mac": host.mac(index),
        "addresses": [f"{address}/{length}" for address, length in lengths.items()],
        "gateways": [gateway for gateway in network.gateways if gateway.version in families],
    }
