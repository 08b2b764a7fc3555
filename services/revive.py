"""What dies comes back: one drop-in for the units of all services."""

from __future__ import annotations

from collections.abc import Iterable

from services.render import render
from services.service import File, Service, Unit


def configure(units: Iterable[Unit]) -> Service:
    """systemd starts every daemon again that ends unasked (systemd.service(5)); its own daemons it knows already."""
    text = render("revive/revive.conf")
    names = sorted(u.name for u in units if u.name.endswith(".service") and not u.once)
    return Service(
        name="revive",
        files=tuple(
            File(f"/etc/systemd/system/{name}.d/revive.conf", text) for name in names if not name.startswith("systemd-")
        ),
    )
