"""What the world connects to: NGINX, which hands submission, IMAPS and ManageSieve on, and serves the web."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.base import IPAddress
from model.network import Role
from model.stack import Host, Stack
from services import identity, maildrop, smtp_out
from services.render import render_tree
from services.service import Check, Listen, Service, Source, Unit


@dataclass(frozen=True)
class Stream:
    """A TCP service that is handed on, to the first server as long as it answers."""

    name: str
    port: int
    servers: tuple[str, ...]
    everybody: bool


def configure(stack: Stack, host: Host) -> Service:
    """NGINX on all addresses. 4190 and the web mail are for the networks of the users alone."""
    name = stack.public_name("webmail")
    streams = (
        _stream(stack, "submission", 587, Role.SMTP_OUT, smtp_out.SUBMISSION_PROXY),
        _stream(stack, "imaps", 993, Role.MAILDROP, maildrop.IMAPS_PROXY),
        _stream(stack, "sieve", 4190, Role.MAILDROP, maildrop.SIEVE_PROXY, everybody=False),
    )
    web = {"kind": "http", "address": "127.0.0.1", "path": "/", "server_name": name, "status": [200, 301, 302]}
    return Service(
        name="frontend",
        packages=("nginx", "libnginx-mod-stream"),
        files=render_tree("frontend", stack=stack, host=host, identity=identity, streams=streams, webmail=name),
        units=(Unit("nginx.service", reload_on=("/etc/nginx/", "/etc/posthorn/")),),
        checks=(Check(("nginx", "-t", "-q")),),
        health=({**web, "port": 443, "tls": True}, {**web, "port": 80, "tls": False}),
        listens=(
            *(Listen(port, frm=Source.INTERNET) for port in (80, 443, 587, 993)),
            Listen(4190, frm=(*stack.access.users_from, *stack.local_prefixes)),
        ),
    )


def _stream(stack: Stack, name: str, port: int, role: Role, to: int, *, everybody: bool = True) -> Stream:
    addresses: Iterable[IPAddress] = (host.addresses.local[0] for host in stack.hosts_with(role))
    servers = tuple(f"[{a}]:{to}" if a.version == 6 else f"{a}:{to}" for a in addresses)
    return Stream(name, port, servers, everybody)
