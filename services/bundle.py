"""All that a host must be, as one plain value: what is pushed to it, rendered, and shown in a preview."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from model.stack import Host, Stack
from services import sandbox
from services.roles import services_of
from services.service import Listen, Service, User


class Conflict(Exception):
    """Two services of a host want different things of the same path or name: `model.checks` should have refused it."""


def _merged(host: Host, kind: str, items: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for key, value in items:
        if merged.setdefault(key, value) != value:
            roles = ", ".join(host.roles)
            advice = f"give one of its roles ({roles}) to another host"
            raise Conflict(f"hosts.{host.name}.roles: two of them want {kind} {key} to be different: {advice}")
    return dict(sorted(merged.items()))


def bundle(stack: Stack, host: Host) -> dict[str, Any]:
    """The bundle of a host (see docs/bundle.md): plain values alone, secrets by name and version.

    Raises `Conflict` when services contradict one another.
    """
    services = services_of(stack, host)
    version = stack.keys.version

    def user(item: User) -> tuple[str, dict[str, Any]]:
        return item.name, {"home": item.home, "groups": list(item.groups)}

    def each(pick: str) -> Iterable[tuple[Service, Any]]:
        return ((service, item) for service in services for item in getattr(service, pick))

    return {
        "host": host.name,
        "ssh_from": [str(network) for network in stack.access.ssh_from],
        "packages": sorted({package for service in services for package in service.packages}),
        "replaces": sorted({pattern for service in services for pattern in service.replaces}),
        "users": _merged(host, "user", (user(item) for _, item in each("users"))),
        "directories": _merged(
            host,
            "directory",
            ((d.path, {"mode": d.mode, "owner": d.owner, "group": d.group}) for _, d in each("directories")),
        ),
        "files": _merged(
            host,
            "file",
            (
                (f.path, {"content": f.content, "mode": f.mode, "owner": f.owner, "group": f.group})
                for _, f in each("files")
            ),
        ),
        "secrets": _merged(
            host,
            "secret file",
            (
                (
                    f.path,
                    {
                        "name": f.name,
                        "version": version(f.content),
                        "mode": f.mode,
                        "owner": f.owner,
                        "group": f.group,
                    },
                )
                for _, f in each("secret_files")
            ),
        ),
        "compile": [{"service": s.name, "run": list(c.run), "of": c.of} for s, c in each("compiles")],
        "checks": [{"service": s.name, "run": list(c.run)} for s, c in each("checks")],
        "units": _merged(
            host,
            "unit",
            (
                (
                    u.name,
                    {
                        "service": s.name,
                        # What shuts it in counts from its next start.
                        "restart_on": [*u.restart_on, *((sandbox.path(u.name),) if u.sandbox else ())],
                        "reload_on": list(u.reload_on),
                    },
                )
                for s, u in each("units")
            ),
        ),
        "masked": sorted({unit for service in services for unit in service.masked}),
        "kept": sorted({path for service in services for path in service.kept}),
        # Whoever does not listen cannot answer either: that is asked first.
        "health": [
            *({"service": s.name, **_listener(host, item)} for s, item in each("listens")),
            *({"service": s.name, **h} for s, h in each("health")),
        ],
    }


def _listener(host: Host, listen: Listen) -> dict[str, Any]:
    addresses = listen.at or (*host.addresses.local, *host.addresses.public)
    probe = {"kind": "listen", "protocol": listen.protocol, "port": listen.port, "addresses": list(map(str, addresses))}
    return probe | ({"unless": listen.unless} if listen.unless else {})


def secrets(stack: Stack, host: Host) -> dict[str, str]:
    """Name to content of all secret files of a host."""
    return {f.name: f.content for service in services_of(stack, host) for f in service.secret_files}
