"""The lab's wires: namespaces, bridges, addresses and routes of a small internet with three sites.

    client ┐                        ┌ oak ─ br-local, br-public ─ hosts
    foreign├ internet (router, DNS) ┼ elm ─ br-local, br-public ─ hosts
    operator                        └ ash ─ br-local, br-public ─ hosts
        └──────── backbone (site-local) ──┘

The sites reach one another over the backbone alone; what a site-local host sends to the internet leaves under the
address of its site's gateway. Nothing here has a route to the machine's own network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from lab.state import LabError, namespace
from model.stack import Host, Stack

LAN4, LAN6 = "203.0.113", "2001:db8:f::"
BACKBONE4, BACKBONE6 = "198.19.0", "2001:db8:ff::"
LOCAL4, LOCAL6 = "198.18.0.0/16", "2001:db8:1::/48"

OPERATOR, CLIENT, FOREIGN, DNS, RESOLVER = 10, 80, 25, 53, 54
"""Last part of the addresses on the internet's own network."""
STRANGERS = (*range(66, 73), *range(81, 100))


@dataclass
class Plan:
    """Commands per namespace, run as one batch each."""

    links: dict[str, list[str]] = field(default_factory=dict)
    sysctls: dict[str, list[str]] = field(default_factory=dict)

    def ip(self, where: str, *commands: str) -> None:
        self.links.setdefault(where, []).extend(commands)

    def bridge(self, where: str, name: str) -> None:
        # No spanning tree and no wait before a port forwards: there are no loops.
        self.ip(where, f"link add {name} type bridge forward_delay 0", f"link set {name} up")

    def wire(self, one: str, one_end: str, other: str, other_end: str, *, master: str = "") -> None:
        """A cable from an interface in one namespace to one in another, which may be the port of a bridge there."""
        self.ip(one, f"link add {one_end} type veth peer name {other_end} netns {namespace(other)}")
        self.ip(one, f"link set {one_end} up")
        self.ip(other, *([f"link set {other_end} master {master}"] if master else []), f"link set {other_end} up")

    def address(self, where: str, device: str, *addresses: str) -> None:
        # nodad: an address that is first checked for duplicates cannot be used for a second.
        self.ip(where, *(f"address add {a} dev {device}{' nodad' if ':' in a else ''}" for a in addresses))


def _sites(plan: Plan, stack: Stack) -> None:
    for index, (name, site) in enumerate(stack.sites.items(), 1):
        local, public = site.local, site.public
        assert public is not None
        plan.wire(name, "uplink", "internet", f"to-{name}")
        plan.address(name, "uplink", f"198.19.{100 + index}.2/30", f"2001:db8:ff:{100 + index}::2/64")
        plan.address("internet", f"to-{name}", f"198.19.{100 + index}.1/30", f"2001:db8:ff:{100 + index}::1/64")
        plan.ip(
            name, f"route add default via 198.19.{100 + index}.1", f"route add default via 2001:db8:ff:{100 + index}::1"
        )
        plan.wire(name, "backbone", "backbone", f"to-{name}", master="backbone")
        plan.address(name, "backbone", f"{BACKBONE4}.{index}/24", f"{BACKBONE6}{index}/64")
        for bridge, network in (("br-local", local), ("br-public", public)):
            plan.bridge(name, bridge)
            for prefix, gateway in zip(network.prefixes, network.gateways, strict=True):
                plan.address(name, bridge, f"{gateway}/{prefix.prefixlen}")
        # The gateway's address is the router's own, so that answers to it end here and are translated back.
        exit_ = stack.gateways[index - 1]
        plan.address(name, "lo", *(f"{a}/{a.max_prefixlen}" for a in exit_.addresses))
        plan.ip("internet", *(f"route add {route}" for route in routes_to(stack, name)))
        for other_index, (other, other_site) in enumerate(stack.sites.items(), 1):
            if other != name:
                for prefix in other_site.local.prefixes:
                    via = f"{BACKBONE6}{other_index}" if prefix.version == 6 else f"{BACKBONE4}.{other_index}"
                    plan.ip(name, f"route add {prefix} via {via}")
        for prefix in local.prefixes:
            via = f"{BACKBONE6}{index}" if prefix.version == 6 else f"{BACKBONE4}.{index}"
            plan.ip("operator", f"route add {prefix} via {via}")


def routes_to(stack: Stack, site: str) -> list[str]:
    """The internet's routes to a site: to its public prefixes, and to the address that its hosts are seen by."""
    index, public = list(stack.sites).index(site), stack.sites[site].public
    behind = (*(public.prefixes if public else ()), *stack.gateways[index].addresses)
    via = {4: f"198.19.{101 + index}.2", 6: f"2001:db8:ff:{101 + index}::2"}
    return [f"{destination} via {via[destination.version]}" for destination in behind]


def _outside(plan: Plan) -> None:
    plan.bridge("backbone", "backbone")
    plan.bridge("internet", "lan")
    plan.address("internet", "lan", f"{LAN4}.1/24", f"{LAN6}1/64")
    for last in (DNS, RESOLVER):
        plan.address("internet", "lan", f"{LAN4}.{last}/24", f"{LAN6}{last}/64")
    for name, last in (("operator", OPERATOR), ("client", CLIENT), ("foreign", FOREIGN)):
        plan.wire(name, "internet", "internet", f"to-{name}", master="lan")
        plan.address(name, "internet", f"{LAN4}.{last}/24", f"{LAN6}{last}/64")
        plan.ip(name, f"route add default via {LAN4}.1", f"route add default via {LAN6}1")
    # Others that the client may come from: four of whom blocklists have something to say, and some that no list knows.
    plan.address("client", "internet", *(f"{LAN4}.{last}/24" for last in STRANGERS))
    plan.wire("operator", "backbone", "backbone", "to-operator", master="backbone")
    plan.address("operator", "backbone", f"{BACKBONE4}.{OPERATOR}/24", f"{BACKBONE6}{OPERATOR}/64")


def _host(plan: Plan, stack: Stack, host: Host) -> None:
    """The wires of a container: a VM has its own, by libvirt."""
    site = stack.site_of(host)
    kinds = [("local", site.local, host.addresses.local)]
    if host.addresses.public and site.public:
        kinds.append(("public", site.public, host.addresses.public))
    for kind, network, addresses in kinds:
        plan.wire(host.name, f"{kind}0", host.site, f"{kind[0]}-{host.name}"[:15], master=f"br-{kind}")
        for address in addresses:
            prefix = next(p for p in network.prefixes if address in p)
            plan.address(host.name, f"{kind}0", f"{address}/{prefix.prefixlen}")
    for gateway in kinds[-1][1].gateways:
        plan.ip(host.name, f"route add default via {gateway}")
    if len(kinds) == 2:
        for gateway in site.local.gateways:
            everywhere = (LOCAL6, f"{BACKBONE6}/64") if gateway.version == 6 else (LOCAL4, f"{BACKBONE4}.0/24")
            plan.ip(host.name, *(f"route add {prefix} via {gateway}" for prefix in everywhere))


def _firewall(stack: Stack) -> dict[str, str]:
    """Address translation of each site, and the internet's refusal to carry site-local addresses."""
    rules = {}
    for index, name in enumerate(stack.sites):
        addresses = stack.gateways[index].addresses
        v4 = next(a for a in addresses if a.version == 4)
        v6 = next(a for a in addresses if a.version == 6)
        rules[name] = f"""
            table inet gateway {{
                chain translate {{
                    type nat hook postrouting priority srcnat
                    oifname uplink ip saddr {LOCAL4} snat ip to {v4}
                    oifname uplink ip6 saddr {LOCAL6} snat ip6 to {v6}
                }}
            }}"""
    rules["internet"] = f"""
        table inet border {{
            chain carry {{
                type filter hook forward priority filter
                ip saddr {LOCAL4} drop
                ip daddr {LOCAL4} drop
                ip6 saddr {LOCAL6} drop
                ip6 daddr {LOCAL6} drop
            }}
        }}"""
    return rules


def build(stack: Stack, containers: Collection[str]) -> None:
    """Makes all namespaces and wires, those of the hosts that are ``containers`` too.

    Raises `LabError` with the words of ip where it cannot.
    """
    plan = Plan()
    hosts = [host for host in stack.all_hosts.values() if host.name in containers]
    routers = ("internet", *stack.sites)
    names = ("internet", "backbone", *stack.sites, "operator", "client", "foreign", *(host.name for host in hosts))
    _outside(plan)
    _sites(plan, stack)
    for host in hosts:
        _host(plan, stack, host)
    _run(["ip", "-batch", "-"], "".join(f"netns add {namespace(name)}\n" for name in names))
    # Links first: an address or a route may need a link that another namespace makes.
    made = [{w: [c for c in cs if c.startswith("link add")] for w, cs in plan.links.items()}]
    made.append({w: [c for c in cs if c.startswith("link set")] for w, cs in plan.links.items()})
    made.append({w: [c for c in cs if c.startswith("address")] for w, cs in plan.links.items()})
    made.append({w: [c for c in cs if c.startswith("route")] for w, cs in plan.links.items()})
    for name in names:
        made[1].setdefault(name, []).append("link set lo up")
        settings = ["net.ipv6.conf.all.accept_ra=0", "net.ipv6.conf.default.accept_dad=0"]
        settings += ["net.ipv6.conf.all.keep_addr_on_down=1"]
        if name in routers:
            settings += ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]
        _run(["ip", "netns", "exec", namespace(name), "sysctl", "-qw", *settings])
    for step in made:
        for name, commands in step.items():
            if commands:
                _run(["ip", "-n", namespace(name), "-batch", "-"], "\n".join(commands) + "\n")
    for name, rules in _firewall(stack).items():
        _run(["ip", "netns", "exec", namespace(name), "nft", "-f", "-"], rules)


def exists() -> bool:
    return Path("/run/netns", namespace("internet")).exists()


def remove() -> int:
    """Removes every namespace that the lab made, and with them all wires. Returns how many there were."""
    folder = Path("/run/netns")
    names = sorted(path.name for path in folder.glob(f"{namespace('')}*")) if folder.exists() else []
    for process in processes():
        # What would be left of it without its network?
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return len(names)


def processes() -> list[int]:
    """Every process in one of the lab's network namespaces: on a host, in a hypervisor, or of a user of it."""
    namespaces = {path.stat().st_ino for path in Path("/run/netns").glob(namespace("*"))}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns" / "net").stat().st_ino in namespaces:
                found.append(int(process.name))
    return found


def memory() -> float:
    """What all processes of the lab hold, in MiB, each page counted once (Pss in proc(5))."""
    held = 0
    for process in processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/smaps_rollup").read_text().partition("Pss:")[2].split()
            held += int(words[0]) if words else 0
    return held / 1024


def _run(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{' '.join(command[:6])}: {done.stderr.strip()}")
