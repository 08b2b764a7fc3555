"""Who a host is to others: its TLS key, its certificate, and the authority that it believes."""

from __future__ import annotations

from model.keys import PLACEHOLDER
from model.stack import Host, Stack
from services.private import private
from services.service import Directory, File, SecretFile, Service

AUTHORITY = "/etc/posthorn/authority.pem"
CERTIFICATE = "/etc/posthorn/tls/host.pem"
KEY = "/etc/posthorn/tls/host.key"
PRIVATE_ROOTS = "/etc/posthorn/roots.pem"


def roots(stack: Stack) -> str:
    """The file of authorities that hosts believe about the rest of the world: Debian's, or those of a private one."""
    return PRIVATE_ROOTS if stack.service.authorities else "/etc/ssl/certs/ca-certificates.crt"


def configure(stack: Stack, host: Host) -> Service:
    """Files that every TLS service of the host uses. The key is this host's own, and goes nowhere else."""
    public = stack.keys.public.hosts.get(host.name)
    certificate = public.certificate if public else f"{PLACEHOLDER}: run make keys\n"
    world = (File(PRIVATE_ROOTS, "".join(stack.service.authorities)),) if stack.service.authorities else ()
    return Service(
        name="identity",
        directories=(Directory("/etc/posthorn"), Directory("/etc/posthorn/tls", mode="0755")),
        files=(File(AUTHORITY, stack.keys.public.authority), File(CERTIFICATE, certificate), *world),
        secret_files=(SecretFile(KEY, "tls-key", private(stack, lambda keys: keys.hosts[host.name].tls)),),
    )
