"""What a name server has to be told, so that hosts may answer the challenges of an ACME authority in DNS."""

from __future__ import annotations

from model.keys import PLACEHOLDER
from model.stack import Host, Stack

SERVERS = ("knot", "bind")


def challenge_names(stack: Stack, host: Host) -> tuple[str, ...]:
    """Where a host puts its answers (RFC 8555 section 8.4), with the trailing dot."""
    return tuple(f"_acme-challenge.{name}." for name in stack.acme_names(host))


def asking_hosts(stack: Stack) -> tuple[Host, ...]:
    """Hosts that answer challenges, each known to the server by a TSIG key of its internal name."""
    return tuple(host for host in stack.all_hosts.values() if stack.acme_names(host))


def told(stack: Stack, server: str) -> str:
    """Keys and rules for ``knot`` or ``bind``, with the secrets where they are known.

    Each host may change TXT records at the names of its own challenges, and nothing else.
    """
    return (_knot if server == "knot" else _bind)(stack)


def _secret(stack: Stack, host: Host) -> str:
    return PLACEHOLDER if stack.keys.private is None else stack.keys.private.tsig.get(host.fqdn, PLACEHOLDER)


def _knot(stack: Stack) -> str:
    hosts = asking_hosts(stack)
    keys = "".join(
        f"  - id: {host.fqdn}\n    algorithm: hmac-sha256\n    secret: {_secret(stack, host)}\n" for host in hosts
    )
    rules = "".join(
        f"  - id: {host.fqdn}\n    key: {host.fqdn}\n    action: update\n    update-type: [TXT]\n"
        f"    update-owner: name\n    update-owner-match: equal\n"
        f"    update-owner-name: [{', '.join(challenge_names(stack, host))}]\n"
        for host in hosts
    )
    zones = "".join(f"#   {zone}: [{', '.join(names)}]\n" for zone, names in _by_zone(stack).items())
    return f"# Add to acl of each zone:\n{zones}key:\n{keys}acl:\n{rules}"


def _bind(stack: Stack) -> str:
    keys = "".join(
        f'key "{host.fqdn}" {{ algorithm hmac-sha256; secret "{_secret(stack, host)}"; }};\n'
        for host in asking_hosts(stack)
    )
    rules = ""
    for zone in _by_zone(stack):
        grants = [
            f"//   grant {host.fqdn} name {name} TXT;\n"
            for host in asking_hosts(stack)
            for name in challenge_names(stack, host)
            if stack.zone_of(name.rstrip(".")) == zone
        ]
        rules += f"// Add to update-policy of the zone {zone}:\n{''.join(grants)}"
    return f"{keys}{rules}"


def _by_zone(stack: Stack) -> dict[str, list[str]]:
    """Zone to the hosts that answer challenges in it."""
    found: dict[str, list[str]] = {}
    for host in asking_hosts(stack):
        for zone in sorted({stack.zone_of(name) or "" for name in stack.acme_names(host)}):
            found.setdefault(zone, []).append(host.fqdn)
    return dict(sorted(found.items()))
