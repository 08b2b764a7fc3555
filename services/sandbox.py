"""What a daemon needs of its host, and nothing else: one drop-in for the units of all services that say so."""

from __future__ import annotations

from collections.abc import Iterable

from services.render import render
from services.service import File, Service, Unit


def path(unit: str) -> str:
    """Where the drop-in of a unit stands."""
    return f"/etc/systemd/system/{unit}.d/sandbox.conf"


def configure(units: Iterable[Unit]) -> Service:
    """systemd shuts a daemon in (systemd.exec(5)). ``systemd-analyze security`` says how far."""
    texts = {u.name: render("sandbox/sandbox.conf.j2", sandbox=u.sandbox) for u in units if u.sandbox}
    return Service(name="sandbox", files=tuple(File(path(name), text) for name, text in sorted(texts.items())))
