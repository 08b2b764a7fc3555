"""The milter on loopback that hands mails to the scanners, wherever one answers."""

from __future__ import annotations

from model.base import IPAddress
from model.network import Role
from model.stack import Host, Stack
from services import postfix
from services.render import render_tree
from services.rspamd import SANDBOX, SCANNER
from services.service import Call, Check, File, Sandbox, Service, Unit

MILTER = 11332
SUFFIXES = "/etc/rspamd/posthorn-suffixes"
NEAR = 11330
"""On loopback: where HAProxy takes mails for the scanners."""

HAPROXY = Sandbox("CAP_KILL CAP_SETGID CAP_SETUID CAP_SYS_CHROOT CAP_SYS_RESOURCE")
"""It becomes another user in an empty folder, and its first process, which stays root, ends those."""


def configure(stack: Stack, host: Host) -> Service:
    """rspamd as a proxy alone, and HAProxy, by which all hosts ask the same scanner first. Without any, mail waits."""
    scanners = {scanner.name: _place(scanner.addresses.local[0]) for scanner in stack.hosts_with(Role.RSPAMD)}
    return Service(
        name="rspamd-proxy",
        packages=("rspamd", "haproxy"),
        files=(
            *render_tree(
                "rspamd-proxy",
                stack=stack,
                host=host,
                scanners=scanners,
                near=NEAR,
                largest=postfix.inside(stack),
                milter=MILTER,
                suffixes=SUFFIXES,
                key=stack.keys.public.rspamd,
            ),
            File(SUFFIXES, "example\n"),
        ),
        calls=(Call(NEAR, "_rspamd"), Call(MILTER, "postfix")),
        units=(
            Unit("haproxy.service", reload_on=("/etc/haproxy/",), sandbox=HAPROXY),
            Unit("rspamd.service", restart_on=("/etc/rspamd/",), sandbox=SANDBOX),
        ),
        checks=(Check(("haproxy", "-c", "-q", "-f", "/etc/haproxy/haproxy.cfg")),),
    )


def _place(address: IPAddress) -> str:
    return f"[{address}]:{SCANNER}" if address.version == 6 else f"{address}:{SCANNER}"
