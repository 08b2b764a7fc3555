"""Addresses and routes of a VM. A machine that exists already keeps those that it has."""

from __future__ import annotations

from model.base import IPAddress, IPNetwork
from model.network import Network
from model.stack import Host, Stack
from services.render import render, render_tree
from services.service import File, Service, Unit

FOLDER = "/etc/systemd/network"


def configure(stack: Stack, host: Host) -> Service:
    """systemd-networkd by MAC address, so that no order of devices matters.

    The names sort before those of the first boot: of several files that match, the first counts (systemd.network(5)).
    """
    files = list(render_tree("network", stack=stack, host=host))
    # ss(8), by which a push and a check see who listens.
    packages = ("iproute2",)
    if host.machine is None:
        return Service(name="network", packages=packages, files=tuple(files))
    site = stack.site_of(host)
    public = site.public if host.addresses.public else None
    files.append(File(f"{FOLDER}/05-local.network", _interface(stack, host, 0, site.local, default=public is None)))
    if public:
        files.append(File(f"{FOLDER}/05-public.network", _interface(stack, host, 1, public, default=True)))
    own = (*host.addresses.local, *host.addresses.public)
    return Service(
        name="network",
        packages=packages,
        files=tuple(files),
        # networkd takes up changed files without taking links down; it takes addresses away for a moment, though.
        units=(Unit("systemd-networkd.service", reload_on=(f"{FOLDER}/",)),),
        # An address that networkd could not set is told by nobody else. An existing machine may stand behind NAT.
        health=({"kind": "addresses", "addresses": list(map(str, own))},),
    )


def _interface(stack: Stack, host: Host, index: int, network: Network, *, default: bool) -> str:
    addresses = host.addresses.local if index == 0 else host.addresses.public
    with_length = [
        f"{address}/{prefix.prefixlen}" for address in addresses for prefix in network.prefixes if address in prefix
    ]
    # A route of a family that the interface has no address of could not be set, and networkd would call it failed.
    families = {address.version for address in addresses}
    gateways = [gateway for gateway in network.gateways if gateway.version in families]
    routes: list[tuple[IPNetwork | None, IPAddress]]
    routes = [(None, gateway) for gateway in gateways] if default else []
    if index == 0 and not default:
        reachable = (*stack.local_prefixes, *stack.access.ssh_from)
        own = set(network.prefixes)
        routes = [
            (destination, gateway)
            for destination in dict.fromkeys(reachable)
            for gateway in gateways
            if destination.version == gateway.version and destination not in own
        ]
    return render("network-interface.j2", mac=host.mac(index), addresses=with_length, routes=routes)
