"""Sites, gateways and hosts: where the service runs, and under which addresses."""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from model.base import AnyAddress, AnyNetwork, Frozen, HostName, Label


def _number(value: object) -> object:
    """Keys of a map are always texts once Pulumi has carried them."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


Release = Annotated[Literal[12, 13], BeforeValidator(_number)]
"""A Debian release. What differs between them is decided in services/, by this number."""
RELEASES = (12, 13)


class Role(StrEnum):
    """What a host is for. Several roles can share a host, except as the checks say."""

    SMTP_IN = "smtp-in"
    SMTP_OUT = "smtp-out"
    MAILDROP = "maildrop"
    FRONTEND = "frontend"
    RSPAMD = "rspamd"
    RESOLVER = "resolver"
    WEBMAIL = "webmail"
    RELAY_CLIENT = "relay-client"


class Network(Frozen):
    """Prefixes of one kind at a site, and the routers that lead out of them."""

    prefixes: tuple[AnyNetwork, ...] = Field(min_length=1)
    """Every host's address is in one of them."""
    gateways: tuple[AnyAddress, ...] = ()
    """Routers, at most one of each family."""


class Image(Frozen):
    """The disk image that VMs start from.

    ``source``, ``kernel`` and ``initrd`` are files on the operator's machine (``source`` may be a URL): they are
    uploaded as volumes. With a kernel and an initrd the VM is started by direct kernel boot, else by the boot loader
    in the image.
    """

    source: str
    """The disk image, a file or URL."""
    format: Literal["qcow2", "raw"] = "qcow2"
    """Its format."""
    kernel: str | None = None
    """A kernel to start directly."""
    initrd: str | None = None
    """Its initial RAM disk."""
    command_line: str = ""
    """Its command line."""


def _libvirt_uri(value: str) -> str:
    """A URI of libvirt's QEMU driver (https://libvirt.org/uri.html), whose server is known for sure."""
    form = "write qemu+ssh://root@HOST/system?knownhosts=FILE, or qemu:///system for this machine"
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{value!r} is not a URI: {form}") from None
    driver, _, transport = parts.scheme.partition("+")
    if driver != "qemu" or parts.path not in ("/system", "/session") or (transport in ("", "unix")) == bool(host):
        raise ValueError(f"{value!r} leads to no libvirt with QEMU: {form}")
    query = parse_qs(parts.query, keep_blank_values=True)
    if transport == "ssh" and host and (port or ":" in host):
        # It takes all between @ and / for a name, and puts a port behind it (dialHost in its libvirt/uri/ssh.go).
        raise ValueError(
            "the plugin pulumi-libvirt 0.5.4 reaches a hypervisor over SSH by a name or an IPv4 address alone, at port"
            " 22: leave out the port, and say a name in place of an IPv6 address"
        )
    if "ssh" in transport and not any(query.get("knownhosts", ())):
        raise ValueError("say knownhosts=FILE in it, with the host key of the hypervisor in that file")
    if "no_verify" in query or query.get("known_hosts_verify") == ["ignore"]:
        raise ValueError("the host key of a hypervisor is always verified: leave out no_verify and known_hosts_verify")
    return value


class Hypervisor(Frozen):
    """A libvirt host. ``emulate`` is for machines whose CPU has neither vmx nor svm."""

    uri: Annotated[str, AfterValidator(_libvirt_uri)]
    """How libvirt is reached, as in ``virsh --connect``."""
    pool: str = "default"
    """The storage pool for disks."""
    local_bridge: str = "br-local"
    """The bridge of the site-local network."""
    public_bridge: str = "br-public"
    """The bridge of the public network."""
    emulate: bool = False
    """Emulate machines, where the CPU cannot run them."""
    images: dict[Release, Image] = Field(min_length=1)
    """Debian release to the image that machines of it start from."""


class Site(Frozen):
    """A place that can fail as a whole."""

    hypervisor: Hypervisor | None = None
    """Where its VMs are made; none where all its machines exist already."""
    local: Network
    """The network that the hosts of all sites reach one another by."""
    public: Network | None = None
    """The network that the world reaches hosts by."""


class Gateway(Frozen):
    """Public addresses by which site-local hosts are seen on the internet; part of the network, not of a site."""

    name: HostName
    """Its name in DNS, which its addresses resolve back to."""
    addresses: tuple[AnyAddress, ...] = Field(min_length=1)
    """What others see mail come from."""
    prefixes: tuple[AnyNetwork, ...] = ()
    """What SPF publishes for it; the addresses themselves when empty."""


class VirtualMachine(Frozen):
    """A VM that the stack makes. Memory in MiB, disks in GiB."""

    vcpus: int = Field(default=2, ge=1)
    """Virtual processors."""
    memory: int = Field(default=2048, ge=384)
    """Memory."""
    system_disk: int = Field(default=16, ge=2)
    """The disk that is made anew with the machine."""
    data_disk: int = Field(default=16, ge=1)
    """The disk that outlives it: mail, queues, what was learnt. It keeps its size: ``make up`` tells how to grow it."""
    interfaces: int = Field(default=2, ge=1, le=4)
    """Network cards: the first site-local, the second public, others unused."""


def _host_key(value: str) -> str:
    """An SSH host key as in known_hosts (sshd(8)), of the one kind that hosts show: see templates/ssh."""
    if not re.match(r"ssh-ed25519 [A-Za-z0-9+/=]+", value):
        raise ValueError("must be the key of type ssh-ed25519: /etc/ssh/ssh_host_ed25519_key.pub on the machine")
    return value


class ExistingMachine(Frozen):
    """A machine that is there already and is only configured: a rented server, a container.

    ``generation`` is raised by hand when the machine was installed anew, so that it is filled again.
    """

    host_key: Annotated[str, AfterValidator(_host_key)]
    """Its SSH host key of type ssh-ed25519, as in known_hosts: no other machine is spoken to."""
    generation: str = "1"
    """To be raised by hand when the machine was installed anew."""


class Addresses(Frozen):
    """A host's addresses, at most one per family and network."""

    local: tuple[AnyAddress, ...] = Field(min_length=1, max_length=2)
    """On the site-local network; the first is where the operator reaches it."""
    public: tuple[AnyAddress, ...] = Field(default=(), max_length=2)
    """On the public network."""


class HostSettings(Frozen):
    """A host as the stack file has it; `model.stack.Host` is the same with its name."""

    site: Label
    """Where it is; its name ends in it."""
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    """What it does."""
    addresses: Addresses
    """Where it is reached."""
    machine: VirtualMachine | None = None
    """A VM that the stack makes."""
    existing: ExistingMachine | None = None
    """A machine that is there already. One of the two is said."""
    release: Release | None = None
    """Its Debian, where it is not that of the service."""


def mac_address(host: str, interface: int) -> str:
    """The MAC address of a VM's interface: derived from its name, so that it survives a rebuild.

    The prefix is the one that QEMU uses for locally administered addresses.
    """
    digest = hashlib.sha256(f"{host}/{interface}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])
