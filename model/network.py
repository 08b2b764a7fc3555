"""Sites, gateways and hosts: where the service runs, and under which addresses."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, IPvAnyAddress, IPvAnyNetwork

from model.base import DnsName, Frozen, Label


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

    prefixes: tuple[IPvAnyNetwork, ...] = Field(min_length=1)
    gateways: tuple[IPvAnyAddress, ...] = ()


class Image(Frozen):
    """The disk image that VMs start from.

    ``source``, ``kernel`` and ``initrd`` are files on the operator's machine (``source`` may be a URL): they are
    uploaded as volumes. With a kernel and an initrd the VM is started by direct kernel boot, else by the boot loader
    in the image.
    """

    source: str
    format: Literal["qcow2", "raw"] = "qcow2"
    kernel: str | None = None
    initrd: str | None = None
    command_line: str = ""


class Hypervisor(Frozen):
    """A libvirt host. ``emulate`` is for machines whose CPU has neither vmx nor svm."""

    uri: str
    pool: str = "default"
    local_bridge: str = "br-local"
    public_bridge: str = "br-public"
    emulate: bool = False
    images: dict[Release, Image] = Field(min_length=1)


class Site(Frozen):
    """A place that can fail as a whole."""

    hypervisor: Hypervisor | None = None
    local: Network
    public: Network | None = None


class Gateway(Frozen):
    """Public addresses by which site-local hosts are seen on the internet; part of the network, not of a site."""

    name: DnsName
    addresses: tuple[IPvAnyAddress, ...] = Field(min_length=1)
    prefixes: tuple[IPvAnyNetwork, ...] = ()
    """What SPF publishes for it; the addresses themselves when empty."""


class VirtualMachine(Frozen):
    """A VM that the stack makes. Memory in MiB, disks in GiB."""

    vcpus: int = Field(default=2, ge=1)
    memory: int = Field(default=2048, ge=384)
    system_disk: int = Field(default=16, ge=2)
    data_disk: int = Field(default=16, ge=1)
    interfaces: int = Field(default=2, ge=1, le=4)


class ExistingMachine(Frozen):
    """A machine that is there already and is only configured: a rented server, a container.

    ``generation`` is raised by hand when the machine was installed anew, so that it is filled again.
    """

    host_key: str = Field(pattern=r"^(ssh-ed25519|ecdsa-sha2-nistp256|ssh-rsa) [A-Za-z0-9+/=]+")
    generation: str = "1"


class Addresses(Frozen):
    """A host's addresses, at most one per family and network."""

    local: tuple[IPvAnyAddress, ...] = Field(min_length=1, max_length=2)
    public: tuple[IPvAnyAddress, ...] = Field(default=(), max_length=2)


class HostSettings(Frozen):
    """A host as the stack file has it; `model.stack.Host` is the same with its name."""

    site: Label
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    addresses: Addresses
    machine: VirtualMachine | None = None
    existing: ExistingMachine | None = None
    release: Release | None = None


def mac_address(host: str, interface: int) -> str:
    """The MAC address of a VM's interface: derived from its name, so that it survives a rebuild.

    The prefix is the one that QEMU uses for locally administered addresses.
    """
    digest = hashlib.sha256(f"{host}/{interface}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])
