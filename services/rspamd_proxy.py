"""The milter on loopback that hands mails to the scanners, wherever one answers."""

from __future__ import annotations

from model.base import IPAddress
from model.network import Role
from model.stack import Host, Stack
from services.render import render_tree
from services.rspamd import SCANNER
from services.service import File, Service, Unit

SUFFIXES = "/etc/rspamd/posthorn-suffixes"


def configure(stack: Stack, host: Host) -> Service:
    """rspamd as a proxy alone, which asks the scanners in turn. When none answers, mail is deferred."""
    scanners = stack.hosts_with(Role.RSPAMD)
    upstreams = ",".join(f"{_literal(scanner.addresses.local[0])}:{SCANNER}" for scanner in scanners)
    return Service(
        name="rspamd-proxy",
        packages=("rspamd",),
        files=(
            *render_tree(
                "rspamd-proxy",
                stack=stack,
                host=host,
                upstreams=upstreams,
                suffixes=SUFFIXES,
                key=stack.keys.public.rspamd,
            ),
            File(SUFFIXES, "example\n"),
        ),
        units=(Unit("rspamd.service", restart_on=("/etc/rspamd/",)),),
    )


def _literal(address: IPAddress) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
