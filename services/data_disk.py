"""The disk of a VM that outlives it: what must not be lost lies there."""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services.render import render
from services.service import File, Service, Unit

DEVICE = "/dev/vdb"
FORMAT = "data-disk.service"
KEPT: dict[Role, tuple[str, ...]] = {
    Role.SMTP_IN: ("/var/lib/acme", "/var/spool/postfix"),
    Role.SMTP_OUT: ("/var/lib/acme", "/var/spool/postfix"),
    Role.MAILDROP: ("/var/lib/acme", "/var/spool/postfix", "/var/vmail"),
    Role.FRONTEND: ("/var/lib/acme",),
    Role.RSPAMD: ("/var/lib/redis", "/var/lib/rspamd"),
    Role.RELAY_CLIENT: ("/var/spool/smtpd",),
}
"""What each role keeps there: certificates, queues, mail, and what the filters have learnt."""
BOUND = {"/var/vmail": "dovecot.service"}
"""What stops with a path, and has to start with it."""


MADE_AGAIN = ("/var/lib/acme", "/var/lib/redis", "/var/lib/rspamd", "/var/spool/smtpd")
"""What a host can do without for a time: it has other certificates issued, its scanner learns again, and the queue has
the host's own reports. A host that keeps nothing else starts without its data disk."""


def needed(host: Host) -> bool:
    """Whether a host must not start without its data disk: its services would write mail beside it."""
    return not set(kept(host)) <= set(MADE_AGAIN)


def kept(host: Host) -> tuple[str, ...]:
    """The paths of a host that outlive an installation, sorted."""
    return tuple(sorted({path for role in host.roles for path in KEPT.get(role, ())}))


def mount_unit(path: str) -> str:
    """The name of the unit that mounts a path (systemd.unit(5), for paths without special characters)."""
    return path.strip("/").replace("/", "-") + ".mount"


def configure(stack: Stack, host: Host) -> Service:
    """Mounts the data disk at /data, and what is kept on it at its usual places. Existing machines have none."""
    if host.machine is None:
        return Service(name="data-disk", kept=kept(host))
    format_ = File(f"/etc/systemd/system/{FORMAT}", render("data-disk/format.j2", device=DEVICE))
    units = [("/data", DEVICE, "ext4", "noatime"), *((path, f"/data{path}", "none", "bind") for path in kept(host))]
    return Service(
        name="data-disk",
        kept=kept(host),
        files=(
            format_,
            *(
                File(
                    f"/etc/systemd/system/{mount_unit(where)}",
                    render(
                        "data-disk/mount.j2",
                        where=where,
                        what=what,
                        type=kind,
                        options=options,
                        format=FORMAT,
                        bound=BOUND.get(where),
                        needed=needed(host),
                    ),
                )
                for where, what, kind, options in units
            ),
        ),
        units=tuple(Unit(mount_unit(where)) for where, *_ in units),
    )
