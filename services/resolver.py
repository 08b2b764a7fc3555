"""Unbound: a validating resolver on every host, which also knows the stack's own names."""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services.render import render_tree
from services.service import Call, Check, File, Listen, Sandbox, Service, Source, Unit
from services.zones import internal_records

SANDBOX = Sandbox(
    # Port 53; the files of a user of its own, which Debian's helper makes as well; more sockets than others.
    "CAP_CHOWN CAP_DAC_OVERRIDE CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID CAP_SYS_RESOURCE",
    asks_addresses=True,
)


def configure(stack: Stack, host: Host) -> Service:
    """A resolver on loopback; on hosts with the role resolver also for the others of all sites."""
    settings = stack.dns.resolver
    serves = host.addresses.local if host.has(Role.RESOLVER) else ()
    internal = [(r.name, r.type, value) for r in internal_records(stack) for value in r.records]
    files = render_tree(
        "resolver", stack=stack, host=host, serves=serves, internal=internal, private_root=bool(settings.root_hints)
    )
    if settings.root_hints:
        hints = [". 3600000 NS root.posthorn.invalid."]
        hints += [
            f"root.posthorn.invalid. 3600000 {'AAAA' if address.version == 6 else 'A'} {address}"
            for address in settings.root_hints
        ]
        files += (
            File("/etc/unbound/posthorn-root.hints", "\n".join(hints) + "\n"),
            File("/etc/unbound/posthorn-root.key", "\n".join(settings.trust_anchor) + "\n"),
        )
    return Service(
        name="resolver",
        packages=("unbound", "dns-root-data"),
        files=files,
        units=(
            Unit(
                "unbound.service",
                restart_on=("/etc/default/unbound", "/etc/unbound/"),
                sandbox=SANDBOX,
            ),
        ),
        checks=(Check(("unbound-checkconf",)),),
        health=({"kind": "dns", "address": "127.0.0.1", "name": ".", "type": "NS", "secure": True},),
        calls=(Call(53, None),),
        listens=tuple(Listen(53, Source.SITES, protocol, at=serves) for protocol in ("udp", "tcp")) if serves else (),
    )
