"""Who a host is to others: its TLS key, its certificates, and the authority that it believes.

A host has one key. Its certificate by the stack's own authority is for the hosts of the stack; where the stack names an
ACME authority, another one is for the world: see services/certificate.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.keys import PLACEHOLDER
from model.stack import Host, Stack
from services.private import private
from services.service import Directory, File, Sandbox, SecretFile, Service

AUTHORITY = "/etc/posthorn/authority.pem"
FOLDER = "/etc/posthorn/tls/"
CERTIFICATE = f"{FOLDER}host.pem"
PUBLIC = f"{FOLDER}public.pem"
"""What the world believes of the services; of the names below a domain, see `public`."""
KEY = f"{FOLDER}host.key"
NEXT_KEY = f"{FOLDER}next.key"
"""The key to come, while it is replaced: nothing serves with it, and it is certified by ACME in advance."""
PRIVATE_ROOTS = "/etc/posthorn/roots.pem"
SHOWN = (FOLDER, AUTHORITY, PRIVATE_ROOTS)
"""What a TLS service reads, and has to read again when it changes."""
TUNNEL_SANDBOX = Sandbox("CAP_SETGID CAP_SETUID")
"""stunnel reads the host's key as root, and becomes another user."""


@dataclass(frozen=True)
class Shown:
    """What a host shows: ``certificate`` to the world, and its own one to those who ask for one of ``internal``."""

    certificate: str
    internal: tuple[str, ...]


def public(of: str = "") -> str:
    """The file of a public certificate: of the services, or of the names below a domain."""
    return f"{FOLDER}public-{of}.pem" if of else PUBLIC


def shown(stack: Stack, host: Host) -> Shown:
    """What a host shows to whom. Without an ACME authority there is one certificate for all."""
    if stack.acme_names(host):
        return Shown(PUBLIC, stack.internal_names_of(host))
    return Shown(CERTIFICATE, ())


def roots(stack: Stack) -> str:
    """The file of authorities that hosts believe about the rest of the world: Debian's, or those of a private one."""
    return PRIVATE_ROOTS if stack.service.authorities else "/etc/ssl/certs/ca-certificates.crt"


def configure(stack: Stack, host: Host) -> Service:
    """Files that every TLS service of the host uses. The key is this host's own, and goes nowhere else."""
    public = stack.keys.public.hosts.get(host.name)
    certificate = public.certificate if public else f"{PLACEHOLDER}: run make keys\n"
    world = (File(PRIVATE_ROOTS, "".join(stack.service.authorities)),) if stack.service.authorities else ()
    held = [SecretFile(KEY, "tls-key", private(stack, lambda keys: keys.hosts[host.name].tls))]
    if public and public.next:
        held.append(SecretFile(NEXT_KEY, "next-tls-key", private(stack, lambda keys: keys.hosts[host.name].next)))
    return Service(
        name="identity",
        directories=(Directory("/etc/posthorn"), Directory(FOLDER.rstrip("/"), mode="0755")),
        files=(File(AUTHORITY, stack.keys.public.believed), File(CERTIFICATE, certificate), *world),
        secret_files=tuple(held),
    )
