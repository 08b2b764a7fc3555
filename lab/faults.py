"""Breaking and mending: hosts that lose power, sites that are cut off, links that swallow packets."""

from __future__ import annotations

import subprocess

from lab import containers, network
from lab.image import folder
from lab.state import LabError, State, namespace, stack

KINDS = ("host", "site", "link")
BLACK_HOLE = "posthorn_black_hole"


def _ports(name: str) -> tuple[tuple[str, str], ...]:
    """The two ends outside a site by which it hangs on the internet and on the backbone."""
    return (("internet", f"to-{name}"), ("backbone", f"to-{name}"))


def _ends(state: State, kind: str, name: str) -> tuple[tuple[str, str], ...]:
    sites = stack().sites
    if kind == "site" and name in sites:
        return _ports(name)
    site, _, link = name.partition("-")
    if kind == "link" and site in sites and link in ("internet", "backbone"):
        return ((link, f"to-{site}"),)
    raise LabError(f"no {kind} {name}: sites are {', '.join(sites)}, links are SITE-internet and SITE-backbone")


def fail(state: State, kind: str, name: str, *, black_hole: bool = False) -> None:
    """Breaks something. A host loses its power; a site or link goes down, or swallows packets as a black hole."""
    if kind == "host":
        if name not in containers.running():
            raise LabError(f"no container {name} is running")
        containers.kill(name)
        containers.wait_for_end(state, name)
        return
    for where, device in _ends(state, kind, name):
        if black_hole:
            # In the network device's own ingress: routed and bridged packets are dropped alike.
            rules = f"""table netdev {BLACK_HOLE} {{
                chain {device} {{ type filter hook ingress device "{device}" priority 0; policy drop; }}
                chain {device}-out {{ type filter hook egress device "{device}" priority 0; policy drop; }}
            }}"""
            _run(where, ["nft", "-f", "-"], rules)
        else:
            # Down at the far end: the near end sees its cable go dead, and keeps its addresses and routes.
            _run(where, ["ip", "link", "set", device, "down"])


def heal(state: State, kind: str, name: str) -> None:
    """Mends what `fail` broke. A host starts again with all that it had on its disk."""
    if kind == "host":
        containers.start(state, name, folder(state.release_of(name)) / "root")
        return
    for where, device in _ends(state, kind, name):
        _run(where, ["ip", "link", "set", device, "up"])
        if where == "internet":
            # Routes are lost with the link, those of the kernel's own making apart.
            routes = "".join(f"route replace {route}\n" for route in network.routes_to(stack(), device[3:]))
            _run(where, ["ip", "-batch", "-"], routes)
        for chain in (device, f"{device}-out"):
            subprocess.run(
                ["ip", "netns", "exec", namespace(where), "nft", "delete", "chain", "netdev", BLACK_HOLE, chain],
                capture_output=True,
            )


def _run(where: str, command: list[str], text: str | None = None) -> None:
    done = subprocess.run(
        ["ip", "netns", "exec", namespace(where), *command], input=text, capture_output=True, text=True
    )
    if done.returncode:
        raise LabError(f"{where}: {' '.join(command)}: {done.stderr.strip()}")
