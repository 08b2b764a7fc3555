"""What the world connects to: NGINX, which hands submission, IMAPS and ManageSieve on, and serves the web."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.base import IPAddress
from model.network import Role
from model.stack import Host, Stack
from services import identity, maildrop, smtp_out, webmail
from services.render import render_tree
from services.service import Check, Listen, Sandbox, Service, Source, Unit

SANDBOX = Sandbox("CAP_CHOWN CAP_DAC_OVERRIDE CAP_KILL CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID")
"""Its first process stays root: it binds ports below 1024, makes the workers' folders, and starts and ends them."""

OTHERS = 4096
"""Connections of a worker that are no sessions of mailboxes and filters: submission, and the web."""


@dataclass(frozen=True)
class Stream:
    """A TCP service that is handed on, to the first server as long as it answers."""

    name: str
    port: int
    servers: tuple[str, ...]
    everybody: bool = True
    listens: tuple[str, ...] = ("0.0.0.0", "[::]")
    names_client: bool = True
    """Whether the server is told, by the PROXY protocol, who the client is."""


@dataclass(frozen=True)
class WebmailHost:
    """A host that has the web mail: the cookie of those who are logged in there, and whom to ask for them in turn."""

    name: str
    cookie: str
    order: tuple[str, ...]


@dataclass(frozen=True)
class Webmail:
    """What NGINX has to know of the web mail: the hosts that have it, the primary first, and whether this is one."""

    names: tuple[str, ...]
    internal: str
    hosts: tuple[WebmailHost, ...]
    here: bool
    frontends: tuple[IPAddress, ...]
    port: int = webmail.WEB
    socket: str = webmail.SOCKET


def configure(stack: Stack, host: Host) -> Service:
    """NGINX on all addresses. 4190 and the web mail are for the networks of the users alone."""
    streams = (
        Stream("submission", 587, _servers(stack, Role.SMTP_OUT, smtp_out.SUBMISSION_PROXY)),
        Stream("submissions", 465, _servers(stack, Role.SMTP_OUT, smtp_out.SUBMISSIONS_PROXY)),
        Stream("imaps", 993, _servers(stack, Role.MAILDROP, maildrop.IMAPS_PROXY)),
        Stream("sieve", 4190, _servers(stack, Role.MAILDROP, maildrop.SIEVE_PROXY), everybody=False),
        *(_ways_of_webmail(stack) if host.has(Role.WEBMAIL) else ()),
    )
    sessions = max((stack.imap_sessions_of(store) for store in stack.hosts_with(Role.MAILDROP)), default=0)
    web = {"kind": "http", "address": "127.0.0.1", "path": "/", "server_name": host.fqdn, "status": [200, 301, 302]}
    return Service(
        name="frontend",
        packages=("nginx", "libnginx-mod-stream"),
        files=render_tree(
            "frontend",
            release=stack.release_of(host),
            stack=stack,
            host=host,
            identity=identity,
            shown=identity.shown(stack, host),
            streams=streams,
            connections=2 * (sessions + stack.limits.sieve_processes) + OTHERS,
            webmail=_webmail(stack, host),
        ),
        units=(Unit("nginx.service", reload_on=("/etc/nginx/", *identity.SHOWN), sandbox=SANDBOX),),
        checks=(Check(("nginx", "-t", "-q")),),
        health=({**web, "port": 443, "tls": True}, {**web, "port": 80, "tls": False}),
        listens=(
            *(Listen(port, frm=Source.INTERNET) for port in (80, 443, 465, 587, 993)),
            Listen(4190, frm=(*stack.access.users_from, *stack.local_prefixes)),
            *((Listen(webmail.WEB, frm=stack.local_addresses(Role.FRONTEND)),) if host.has(Role.WEBMAIL) else ()),
        ),
    )


def _webmail(stack: Stack, host: Host) -> Webmail:
    internal = stack.internal_name(Role.WEBMAIL)
    public = stack.public_name("webmail")
    hosts = stack.hosts_with(Role.WEBMAIL)

    def order(first: Host) -> tuple[str, ...]:
        return tuple(_literal(h.addresses.local[0]) for h in (first, *(h for h in hosts if h.name != first.name)))

    return Webmail(
        names=(public, internal, public.partition(".")[0]),
        internal=internal,
        hosts=tuple(WebmailHost(h.name, webmail.cookie(h), order(h)) for h in hosts),
        here=host.has(Role.WEBMAIL),
        frontends=stack.local_addresses(Role.FRONTEND),
    )


def _ways_of_webmail(stack: Stack) -> Iterable[Stream]:
    """The mail hosts as Roundcube reaches them, on loopback. It says itself who the client is."""
    for name, port, role, to in (
        ("webmail-submission", webmail.SUBMISSION, Role.SMTP_OUT, smtp_out.SUBMISSION_WEBMAIL),
        ("webmail-imaps", webmail.IMAPS, Role.MAILDROP, maildrop.IMAPS),
        ("webmail-sieve", webmail.SIEVE, Role.MAILDROP, maildrop.SIEVE),
    ):
        yield Stream(name, port, _servers(stack, role, to), listens=("127.0.0.1",), names_client=False)


def _literal(address: IPAddress) -> str:
    """An address as NGINX wants it before a port."""
    return f"[{address}]" if address.version == 6 else str(address)


def _servers(stack: Stack, role: Role, port: int) -> tuple[str, ...]:
    return tuple(f"{_literal(host.addresses.local[0])}:{port}" for host in stack.hosts_with(role))
