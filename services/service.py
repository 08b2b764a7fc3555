"""What a service puts on a host: plain values, ready to be written, compared and pushed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from model.base import IPAddress, IPNetwork


@dataclass(frozen=True)
class File:
    """A file whose text anybody may see in a preview."""

    path: str
    content: str
    mode: str = "0644"
    owner: str = "root"
    group: str = "root"


@dataclass(frozen=True)
class SecretFile:
    """A file whose text is a secret. ``name`` says what it is, and is unique on the host."""

    path: str
    name: str
    content: str = field(repr=False)
    mode: str = "0600"
    owner: str = "root"
    group: str = "root"


@dataclass(frozen=True)
class Directory:
    path: str
    mode: str = "0755"
    owner: str = "root"
    group: str = "root"


@dataclass(frozen=True)
class User:
    """A system user with a group of its own, and further ``groups``."""

    name: str
    home: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sandbox:
    """What a daemon cannot do without: all else that a program could do on a host is taken from it."""

    capabilities: str = ""
    """See capabilities(7): for what it does before it gives up being root."""
    user: str = ""
    """Who it is from the first moment. Else its unit or itself says who."""
    set_id: bool = False
    """It runs programs that are set-user-ID or set-group-ID, or makes such folders."""
    compiles: bool = False
    """It writes machine code and runs it."""
    asks_addresses: bool = False
    """It asks the kernel for the addresses of the host (netlink(7))."""


@dataclass(frozen=True)
class Unit:
    """A systemd unit that is enabled and runs. Path prefixes say whose change restarts or reloads it.

    ``once``: it does its work and ends (Type=oneshot in systemd.service(5)); any other is started again when it dies.
    """

    name: str
    restart_on: tuple[str, ...] = ()
    reload_on: tuple[str, ...] = ()
    once: bool = False
    sandbox: Sandbox | None = None


@dataclass(frozen=True)
class Compile:
    """A command that makes one file of another, run when something under ``of`` changed."""

    run: tuple[str, ...]
    of: str


@dataclass(frozen=True)
class Check:
    """A service's own configuration check, run before anything is replaced."""

    run: tuple[str, ...]


class Source(Enum):
    """Who may open connections to a port."""

    INTERNET = "anyone"
    SITES = "all site-local prefixes of the stack"


@dataclass(frozen=True)
class Listen:
    """A port that a service opens, and to whom. The firewall is made from these, and a push looks for each listener.

    A daemon binds any address, so that it needs none to be there (docs/decisions/listen-anywhere.md). ``at``: the
    addresses of one that binds these by name, and does so before they are there, or that may leave out others.
    ``unless``: a file; while it is there, nobody is to listen.
    """

    port: int
    frm: Source | tuple[IPAddress | IPNetwork, ...]
    protocol: str = "tcp"
    at: tuple[IPAddress, ...] = ()
    unless: str = ""


@dataclass(frozen=True)
class Call:
    """A TCP port of this host that a ``user`` of this host connects to; None is everybody. All others find it shut."""

    port: int
    user: str | None


@dataclass(frozen=True)
class Service:
    """All that one service needs of its host."""

    name: str
    packages: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    """Packages (patterns of fnmatch) that may go when these come; else a push that would remove one is refused."""
    files: tuple[File, ...] = ()
    secret_files: tuple[SecretFile, ...] = ()
    directories: tuple[Directory, ...] = ()
    users: tuple[User, ...] = ()
    units: tuple[Unit, ...] = ()
    masked: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """Paths that outlive an installation of the host: their owners may have other numbers afterwards."""
    compiles: tuple[Compile, ...] = ()
    checks: tuple[Check, ...] = ()
    health: tuple[Mapping[str, Any], ...] = ()
    listens: tuple[Listen, ...] = ()
    calls: tuple[Call, ...] = ()
    inside: tuple[str, ...] = ()
    """Users that speak with nobody outside of their host."""
