"""Who a host is to others: its TLS key, its certificate, and the authority that it believes."""

from __future__ import annotations

from model.keys import PLACEHOLDER
from model.stack import Host, Stack
from services.private import private
from services.service import Directory, File, SecretFile, Service

AUTHORITY = "/etc/posthorn/authority.pem"
CERTIFICATE = "/etc/posthorn/tls/host.pem"
KEY = "/etc/posthorn/tls/host.key"


def configure(stack: Stack, host: Host) -> Service:
    """Files that every TLS service of the host uses. The key is this host's own, and goes nowhere else."""
    public = stack.keys.public.hosts.get(host.name)
    certificate = public.certificate if public else f"{PLACEHOLDER}: run make keys\n"
    return Service(
        name="identity",
        directories=(Directory("/etc/posthorn"), Directory("/etc/posthorn/tls", mode="0755")),
        files=(File(AUTHORITY, stack.keys.public.authority), File(CERTIFICATE, certificate)),
        secret_files=(SecretFile(KEY, "tls-key", private(stack, lambda keys: keys.hosts[host.name].tls)),),
    )
