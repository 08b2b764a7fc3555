"""Virtual machines on libvirt: the only module that knows the libvirt provider.

pulumi-libvirt is deprecated upstream (0.5.4 is its last release), so nothing of it shows outside: `Hypervisor` and
`Machine` take values of the model, and give a machine's ``generation``.

A machine has a system disk on a base image, which is made anew without regret, and a data disk, which is protected.
Names of volumes end in characters that Pulumi draws at random, except the data disk's: a system disk that is made anew
is a new path, which is the machine's new generation and makes the machine itself new; a data disk is found again by
its name even when the state was lost.

What the provider can change only by replacing, and what that means here:

- machine: vcpu, memory, type, disks, cmdlines, cpu, consoles, xml.xslt → shut down, defined anew, same disks: a reboot
- machine: kernel, initrd, network_interfaces → the same; the provider would accept the change and do nothing
- system disk: size, base_volume_id, pool → the machine is installed anew: new system disk, new first boot
- base image: source is ignored once uploaded; ``--replace`` its volume to install all machines of that site anew
- first-boot data: ignored once written; taken anew together with a new system disk
- data disk: protected, so a change that replaces it is refused; size is ignored and grown on the hypervisor
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import pulumi
import pulumi_libvirt as libvirt

from model.network import Hypervisor as HypervisorSettings
from model.network import Image, Release
from model.stack import Host, Stack
from services.cloud_init import first_boot

R = TypeVar("R", bound=pulumi.Resource)
GIB = 2**30
SHUTDOWN_SECONDS = 90

# Applied to what the provider makes of a domain. No screen: a mail host has nobody before it, and not every QEMU has
# SPICE, which the provider puts in. The serial console, the random number generator and the agent's channel stay.
XSLT = """\
<xsl:stylesheet version="1.0" xmlns:xsl="http://www.w3.org/1999/XSL/Transform">
  <xsl:output omit-xml-declaration="yes"/>
  <xsl:template match="@*|node()"><xsl:copy><xsl:apply-templates select="@*|node()"/></xsl:copy></xsl:template>
  <xsl:template match="/domain/devices/graphics|/domain/devices/video|/domain/devices/audio"/>
{emulation}</xsl:stylesheet>
"""

# An emulated machine translates its code into a cache, of 1 GiB by default: 128 MiB cost no time and save that memory.
# Every device costs time at boot, so those that libvirt adds by itself are refused.
EMULATION = """\
  <xsl:template match="/domain/features"><xsl:copy>
    <xsl:apply-templates select="@*|node()"/><tcg><tb-cache unit="MiB">128</tb-cache></tcg>
  </xsl:copy></xsl:template>
  <xsl:template match="/domain/devices/channel"/>
  <xsl:template match="/domain/devices"><xsl:copy>
    <xsl:apply-templates select="@*|node()"/>
    <controller type="usb" model="none"/><memballoon model="none"/>
  </xsl:copy></xsl:template>
"""


@dataclass(frozen=True)
class Base:
    """What machines of one release start from, as it lies on the hypervisor."""

    volume_id: pulumi.Output[str]
    kernel: pulumi.Output[str] | None
    initrd: pulumi.Output[str] | None
    command_line: str


class Hypervisor(pulumi.ComponentResource):
    """The libvirt of a site: the connection to it, and the base images of its machines.

    The connection is made when the provider starts, in a preview too: a site that cannot be reached has to be
    excluded.
    """

    def __init__(
        self,
        name: str,
        settings: HypervisorSettings,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """``name`` is the site's."""
        super().__init__("posthorn:index:Hypervisor", name, None, opts)
        self.name, self.settings = name, settings
        self.provider = libvirt.Provider(
            f"{name}-hypervisor", libvirt.ProviderArgs(uri=settings.uri), pulumi.ResourceOptions(parent=self)
        )
        self._before: list[pulumi.Resource] = []
        self.bases: dict[Release, Base] = {}
        self.shut_down = pulumi.ResourceHook(f"shut-down-{name}", self._shut_down)
        self.register_outputs({})

    def upload(self, releases: Iterable[Release]) -> None:
        """Brings an image of each release there, for the machines that come then."""
        for release in releases:
            self.bases[release] = self._base(f"{self.name}-debian-{release}", self.settings.images[release])

    def _base(self, name: str, image: Image) -> Base:
        kernel = self._upload(f"{name}-kernel", image.kernel, "raw") if image.kernel else None
        initrd = self._upload(f"{name}-initrd", image.initrd, "raw") if image.initrd else None
        return Base(self._upload(name, image.source, image.format), kernel, initrd, image.command_line)

    def _upload(self, name: str, source: str, format_: str) -> pulumi.Output[str]:
        # An image that changes is no reason to install every machine anew: that is for the operator to say.
        opts = self.options(self, ignore_changes=["source", "format"])
        args = libvirt.VolumeArgs(pool=self.settings.pool, source=source, format=format_)
        return self.in_turn(libvirt.Volume(name, args, opts)).id

    def in_turn(self, resource: R) -> R:
        """Notes a resource as the one that the next of this hypervisor has to wait for."""
        self._before = [resource]
        return resource

    def options(
        self, parent: pulumi.Resource, waits_for: Sequence[pulumi.Resource] = (), **more: Any
    ) -> pulumi.ResourceOptions:
        """Options of a resource on this hypervisor.

        One comes after the other: the provider has been seen to stop for ever while it uploaded first-boot data to a
        libvirt over SSH and made machines there at the same time. Images still go to all sites side by side.
        """
        depends_on = [*self._before, *waits_for]
        return pulumi.ResourceOptions(parent=parent, provider=self.provider, depends_on=depends_on, **more)

    def _shut_down(self, args: pulumi.ResourceHookArgs) -> None:
        """Shuts a machine down before it is deleted. The provider itself would only pull its plug."""
        done = subprocess.run(shut_down_command(self.settings.uri, args.id), capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            pulumi.log.warn(f"{args.name} was not shut down cleanly, it is switched off: {''.join(said)}")


def shut_down_command(uri: str, domain: str) -> list[str]:
    """The command that shuts a domain down by ACPI and returns when it is off, or fails after a while.

    Where libvirt is reached over SSH, ``virsh`` runs there, else here: with the URI that the provider goes by.
    """
    script = (
        f"virsh -q shutdown {domain} && for second in $(seq {SHUTDOWN_SECONDS}); do "
        f'case "$(virsh domstate {domain})" in "shut off"*) exit 0;; esac; sleep 1; done; '
        f"echo it did not shut down within {SHUTDOWN_SECONDS} s >&2; exit 1"
    )
    parts = urlsplit(uri)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    by_ssh = "ssh" in parts.scheme
    script = f"export LIBVIRT_DEFAULT_URI={'qemu:///system' if by_ssh else shlex.quote(uri)}; {script}"
    if not by_ssh:
        return ["sh", "-c", script]
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "StrictHostKeyChecking=yes"]
    options += ["-o", f"UserKnownHostsFile={query['knownhosts']}"]
    if "keyfile" in query:
        options += ["-i", query["keyfile"]]
    if parts.port:
        options += ["-p", str(parts.port)]
    return ["ssh", *options, "-l", parts.username or "root", parts.hostname or "", f"sh -c {shlex.quote(script)}"]


class Machine(pulumi.ComponentResource):
    """A VM of a host. Its data disk comes first, before the images and machines of its hypervisor.

    What is protected keeps all that it depends on when the stack is removed: so that is other data disks alone.
    """

    def __init__(
        self, name: str, stack: Stack, host: Host, hypervisor: Hypervisor, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("posthorn:index:Machine", name, None, opts)
        if host.machine is None:
            raise ValueError(f"{name} is a machine that exists already")
        self._name, self._stack, self._host = name, stack, host
        self._hypervisor, self._pool = hypervisor, hypervisor.settings.pool
        volume = libvirt.VolumeArgs(
            name=f"{name}-data", pool=self._pool, size=host.machine.data_disk * GIB, format="qcow2"
        )
        kept = hypervisor.options(self, protect=True, ignore_changes=["size", "format"])
        self._data = hypervisor.in_turn(libvirt.Volume(f"{name}-data", volume, kept))
        self.register_outputs({})

    def make(self, waits_for: Sequence[pulumi.Resource]) -> pulumi.Output[str]:
        """Makes system disk, first boot and the machine, once others are there. The image has to be uploaded.

        Returns another value whenever the system disk was made anew: what was on it has to be put there again. And
        whenever the machine was switched off for a change: the push then waits until its units run again.
        """
        assert self._host.machine is not None
        base = self._hypervisor.bases[self._stack.release_of(self._host)]
        size = self._host.machine.system_disk * GIB
        volume = libvirt.VolumeArgs(pool=self._pool, base_volume_id=base.volume_id, size=size, format="qcow2")
        opts = self._hypervisor.options(self, waits_for)
        system = self._hypervisor.in_turn(libvirt.Volume(f"{self._name}-system", volume, opts))
        seed = self._seed(system)
        domain = self._domain(base, [system.id, self._data.id, seed], waits_for)
        return pulumi.Output.all(system.id, domain.id).apply(lambda ids: " ".join(map(str, ids)))

    def _seed(self, system: libvirt.Volume) -> pulumi.Output[str]:
        """The disk with the first-boot data: the id of its volume."""
        data = first_boot(self._stack, self._host)
        disk = libvirt.CloudInitDisk(
            f"{self._name}-first-boot",
            libvirt.CloudInitDiskArgs(
                pool=self._pool,
                user_data=pulumi.Output.secret(data.user_data),
                meta_data=data.meta_data,
                network_config=data.network_config,
            ),
            self._hypervisor.options(
                self,
                ignore_changes=["user_data", "meta_data", "network_config"],
                replacement_trigger=system.id,
                additional_secret_outputs=["user_data"],
            ),
        )
        self._hypervisor.in_turn(disk)
        # The provider's id is the volume's key and a generation of its own.
        return disk.id.apply(lambda key: key.split(";")[0])

    def _domain(
        self, base: Base, disks: list[pulumi.Output[str]], waits_for: Sequence[pulumi.Resource]
    ) -> libvirt.Domain:
        host = self._host
        assert host.machine is not None
        settings = self._hypervisor.settings
        bridges = (settings.local_bridge, settings.public_bridge, settings.local_bridge, settings.local_bridge)
        domain = libvirt.Domain(
            self._name,
            libvirt.DomainArgs(
                name=self._name,
                type="qemu" if settings.emulate else "kvm",
                # The hypervisors of a stack need not be alike, and machines do not move between them.
                cpu=None if settings.emulate else libvirt.DomainCpuArgs(mode="host-passthrough"),
                vcpu=host.machine.vcpus,
                memory=host.machine.memory,
                kernel=base.kernel,
                initrd=base.initrd,
                cmdlines=canonical_command_line(base.command_line) if base.kernel else None,
                disks=[libvirt.DomainDiskArgs(volume_id=disk) for disk in disks],
                network_interfaces=[
                    libvirt.DomainNetworkInterfaceArgs(bridge=bridge, mac=host.mac(index).upper())
                    for index, bridge in enumerate(bridges[: host.machine.interfaces])
                ],
                consoles=[libvirt.DomainConsoleArgs(type="pty", target_type="serial", target_port="0")],
                autostart=True,
                xml=libvirt.DomainXmlArgs(xslt=XSLT.format(emulation=EMULATION if settings.emulate else "")),
            ),
            self._hypervisor.options(
                self,
                waits_for,
                # Its name is taken until it is gone.
                delete_before_replace=True,
                replace_on_changes=["kernel", "initrd", "network_interfaces"],
                hooks=pulumi.ResourceHookBinding(before_delete=[self._hypervisor.shut_down]),
            ),
        )
        return self._hypervisor.in_turn(domain)


def canonical_command_line(text: str) -> list[dict[str, str]]:
    """A kernel's command line in the form in which the provider reads it back, else every preview shows a change.

    That is: settings by key, a further group where a key comes again, and last all words without a value.
    """
    groups: list[dict[str, str]] = [{}]
    flags = []
    for word in sorted(text.split()):
        key, equals, value = word.partition("=")
        if not equals:
            flags.append(word)
            continue
        if key in groups[-1]:
            groups.append({})
        groups[-1][key] = value
    return [group for group in groups if group] + ([{"_": " ".join(flags)}] if flags else [])
