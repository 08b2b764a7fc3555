"""What a VM is told at its first boot, and only then: who it is, who may log in, and where it is reached.

The three files are cloud-init's (NoCloud data source), written as JSON: that is YAML too, and whoever reads them needs
no parser but the one of every language.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from model.keys import PLACEHOLDER
from model.stack import Host, Stack
from services.private import private

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

    Only what it takes to be reached by SSH, and to be known when it is: the agent owns everything else, and no later
    change of this reaches a machine before its system disk is made anew.
    """
    keys = stack.keys.public.hosts.get(host.name)
    resolvers = [str(address) for address in stack.dns.resolver.bootstrap]
    user_data = {
        "hostname": host.name,
        "fqdn": host.fqdn,
        "prefer_fqdn_over_hostname": False,
        # The key that everybody who connects has pinned; and in by key alone.
        "ssh_deletekeys": True,
        "ssh_keys": {
            "ed25519_private": private(stack, lambda ring: ring.hosts[host.name].ssh),
            "ed25519_public": keys.ssh if keys else PLACEHOLDER,
        },
        "disable_root": False,
        "ssh_pwauth": False,
        "users": [{"name": "root", "lock_passwd": True, "ssh_authorized_keys": list(stack.access.operators)}],
        # Packages come before the machine's own resolver does.
        "write_files": [{"path": "/etc/resolv.conf", "content": "".join(f"nameserver {r}\n" for r in resolvers)}],
    }
    # cloud-init acts once per instance: a new system disk knows none, so it acts again there. All is on the disk, so
    # all can be done before the network starts.
    meta_data = {"instance-id": host.name, "dsmode": "local"}
    network = {
        "version": 2,
        "ethernets": {name: _interface(stack, host, index) for index, name in enumerate(interface_names(host))},
    }
    return FirstBoot(f"#cloud-config\n{_json(user_data)}", _json(meta_data), _json(network))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _interface(stack: Stack, host: Host, index: int) -> dict[str, Any]:
    """The first interface gets the site-local addresses, so that the host is reached; the others wait for the agent."""
    wanted: dict[str, Any] = {
        "match": {"macaddress": host.mac(index)},
        "dhcp4": False,
        "dhcp6": False,
        "accept-ra": False,
    }
    if index == 0:
        network = stack.site_of(host).local
        managed = host.addresses.local
        lengths = {address: next(p.prefixlen for p in network.prefixes if address in p) for address in managed}
        families = {address.version for address in managed}
        wanted["addresses"] = [f"{address}/{length}" for address, length in lengths.items()]
        wanted["routes"] = [
            {"to": "::/0" if gateway.version == 6 else "0.0.0.0/0", "via": str(gateway)}
            for gateway in network.gateways
            if gateway.version in families
        ]
    return wanted
