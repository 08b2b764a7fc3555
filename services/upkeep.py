"""What keeps a host well by itself: security updates, the time, a journal that does not fill the disk."""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services.render import render_tree
from services.service import Service, Unit

WRITERS = (Role.SMTP_IN, Role.SMTP_OUT, Role.MAILDROP, Role.RELAY_CLIENT)
"""Roles that bring a host a way to send its own mail (docs/mail-of-hosts.md)."""


def configure(stack: Stack, host: Host) -> Service:
    """Debian's own tools, with few words."""
    return Service(
        name="upkeep",
        packages=("ca-certificates", "logrotate", "systemd-timesyncd", "unattended-upgrades"),
        files=render_tree(
            "upkeep", release=stack.release_of(host), writes_mail=any(host.has(role) for role in WRITERS)
        ),
        units=(
            Unit("systemd-journald.service", restart_on=("/etc/systemd/journald.conf.d/",)),
            # DNSSEC and TLS need the right time. In a container the clock is its host's, and the unit stands aside.
            Unit("systemd-timesyncd.service"),
        ),
    )
