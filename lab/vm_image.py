"""The disk image of the lab's virtual machines, made of the same root file system as its containers.

An emulated machine pays for every instruction, so the image does little at boot: it is one file system without a
partition table, its kernel is started directly with an initrd that loads six modules and nothing else, only devices
that are used are announced, and a small script reads the first-boot data that cloud-init would read elsewhere. What
that is worth stands in docs/decisions. It carries no identity: no host key, no machine id, no password.

``python -m lab.vm_image ROOT TARGET`` makes one image by hand.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import repository

PACKAGES = ("linux-image-cloud-amd64", "udev", "busybox-static")
"""What a machine needs beside that of a container."""

SIZE = "2G"
"""Virtual size of the base; a system disk is this large or larger, and its file system grows at the first boot."""

LOAD_ORDER = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")

UNUSED_MODULES = ("kvm_amd", "kvm_intel", "kvm", "ata_piix", "ata_generic", "libata", "serio_raw", "psmouse")

COMMAND_LINE = "root=/dev/vda rw console=ttyS0 quiet mitigations=off net.ifnames=0 systemd.show_status=0"

INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in {modules}; do
    /bin/busybox insmod "/$module.ko"
done
while ! /bin/busybox mount -t ext4 /dev/vda /root; do
    /bin/busybox sleep 0.1
done
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""

FIRST_BOOT_UNIT = """\
[Unit]
Description=Name, keys and addresses of this machine, from its NoCloud disk
DefaultDependencies=no
ConditionPathExists=!/var/lib/first-boot
Before=network-pre.target ssh.service systemd-networkd.service systemd-hostnamed.service shutdown.target
Wants=network-pre.target
After=systemd-remount-fs.service
RequiresMountsFor=/etc /var/lib
Conflicts=shutdown.target

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -I -S /usr/local/sbin/first-boot
RemainAfterExit=yes

[Install]
WantedBy=sysinit.target
"""

FIRST_BOOT = '''"""Does what cloud-init would do with the first-boot data of this project, in a tenth of its time."""
import json
import os
import socket
import subprocess


def put(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)


os.makedirs("/run/first-boot", mode=0o700, exist_ok=True)
subprocess.run(["mount", "-t", "iso9660", "-o", "ro", "/dev/vdc", "/run/first-boot"], check=True)
user = json.loads(open("/run/first-boot/user-data").read().partition("\\n")[2])
network = json.load(open("/run/first-boot/network-config"))
subprocess.run(["umount", "/run/first-boot"], check=True)

put("/etc/hostname", user["hostname"] + "\\n")
socket.sethostname(user["hostname"])
put("/etc/ssh/ssh_host_ed25519_key", user["ssh_keys"]["ed25519_private"], 0o600)
put("/etc/ssh/ssh_host_ed25519_key.pub", user["ssh_keys"]["ed25519_public"] + "\\n")
os.makedirs("/root/.ssh", mode=0o700, exist_ok=True)
put("/root/.ssh/authorized_keys", "\\n".join(user["users"][0]["ssh_authorized_keys"]) + "\\n", 0o600)
for file in user["write_files"]:
    put(file["path"], file["content"])
for name, wanted in network["ethernets"].items():
    lines = ["[Match]", "MACAddress=" + wanted["match"]["macaddress"], "[Network]", "DHCP=no", "IPv6AcceptRA=no"]
    lines += ["Address=" + address for address in wanted.get("addresses", [])]
    for route in wanted.get("routes", []):
        lines += ["[Route]", "Gateway=" + route["via"]]
    put("/etc/systemd/network/90-first-boot-" + name + ".network", "\\n".join(lines) + "\\n")
put("/var/lib/first-boot", "")
'''

FILES: Mapping[str, str] = {
    "/etc/fstab": "/dev/vda / ext4 rw,x-systemd.growfs 0 0\n",
    "/etc/hostname": "localhost\n",
    "/etc/machine-id": "",
    "/etc/resolv.conf": "",
    "/etc/systemd/system/first-boot.service": FIRST_BOOT_UNIT,
    "/usr/local/sbin/first-boot": FIRST_BOOT,
    # Coldplug of what is used, not of a hundred terminals.
    "/etc/systemd/system/systemd-udev-trigger.service.d/lab.conf": """\
[Service]
ExecStart=
ExecStart=udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=net \
    --subsystem-match=virtio
# The power button, by which a machine is shut down.
ExecStartPost=-/sbin/modprobe button
""",
    "/etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n",
    # Eleven emulated machines on two cores start a daemon in minutes, not in seconds.
    "/etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultTimeoutStartSec=10min\n",
    # Drivers of devices that QEMU has by default, and the machine no use for.
    "/etc/modprobe.d/lab.conf": "".join(f"blacklist {module}\n" for module in UNUSED_MODULES),
}

ENABLED = ("systemd-networkd.service", "ssh.service", "first-boot.service")

GENERATORS = (
    "cryptsetup debug getty gpt-auto hibernate-resume integritysetup rc-local run ssh system-update sysv tpm2 "
    "veritysetup"
)
"""Parts of systemd that look for units to make, and would find none here."""

MASKED = (
    # What an emulated machine has no use for.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "systemd-networkd-wait-online.service",
    "systemd-pstore.service",
    "systemd-remount-fs.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-hwdb-update.service",
    "ldconfig.service",
    "systemd-journal-catalog-update.service",
    "systemd-binfmt.service",
    "systemd-sysusers.service",
    "systemd-random-seed.service",
    "systemd-modules-load.service",
    "systemd-network-generator.service",
    "systemd-journal-flush.service",
    "kmod-static-nodes.service",
    "proc-sys-fs-binfmt_misc.automount",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "modprobe@.service",
)


class ImageError(Exception):
    """An image that could not be made. Carries what the failing program said."""


@dataclass(frozen=True)
class VmImage:
    """A finished image: files on this machine."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    def settings(self) -> dict[str, str]:
        """The image as a stack file says it (see `model.network.Image`)."""
        return {
            "source": str(self.disk),
            "kernel": str(self.kernel),
            "initrd": str(self.initrd),
            "command_line": COMMAND_LINE,
        }


def image(root: Path, images: Path) -> VmImage:
    """The image of a root file system, made if it is not there.

    ``root`` lies in a directory whose name stands for its content; ``images`` is where images are kept. The image
    appears there whole or not at all. Raises `ImageError`.
    """
    sources = "".join(repository.host_files(root.parent).values())
    recipe = hashlib.sha256(f"{root.parent.name}\n{sources}\n{Path(__file__).read_text()}".encode()).hexdigest()[:16]
    target = images / f"vm-{recipe}"
    if not target.is_dir():
        # In a mount namespace of its own, so that no mount outlives the build.
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "lab.vm_image", root, target]
        done = subprocess.run(
            [str(word) for word in command],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise ImageError(f"the image of the virtual machines could not be made:\n{done.stdout[-4000:]}")
    return VmImage(target)


def _run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise ImageError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def _install(root: Path) -> None:
    """Adds the packages, starts nothing, and makes no initrd: ours takes its place."""
    guard = root / "usr/sbin/policy-rc.d"
    guard.write_text("#!/bin/sh\nexit 101\n")
    guard.chmod(0o755)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    _run(["mount", "-t", "proc", "proc", root / "proc"])
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "INITRD": "No", "LC_ALL": "C"}
    options = ["-qq", "-o", "Dpkg::Options::=--force-unsafe-io", "-o", "APT::Sandbox::User=root"]
    _run(["chroot", root, "apt-get", *options, "update"], quiet)
    _run(["chroot", root, "apt-get", *options, "install", "--yes", "--no-install-recommends", *PACKAGES], quiet)
    _run(["umount", root / "proc"])
    guard.unlink()


def _trim(root: Path, files: Mapping[str, str]) -> None:
    for path in [*root.glob("etc/ssh/ssh_host_*"), *root.glob("boot/initrd*"), *root.glob("var/lib/apt/lists/*_*")]:
        path.unlink()
    for path in root.glob("var/cache/apt/archives/*.deb"):
        path.unlink()
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    for name, text in {**FILES, **files}.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    _run(["systemctl", f"--root={root}", "--quiet", "enable", *ENABLED])
    _run(["systemctl", f"--root={root}", "--quiet", "mask", *MASKED])
    generators = root / "etc/systemd/system-generators"
    generators.mkdir(exist_ok=True)
    for name in GENERATORS.split():
        (generators / f"systemd-{name}-generator").symlink_to("/dev/null")


def _make_initrd(root: Path, target: Path) -> None:
    modules = next((root / "lib/modules").iterdir())
    folder = root / "mnt/initrd"
    for name in ("bin", "dev", "root"):
        (folder / name).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", folder / "bin/busybox")
    # What is not a module is in the kernel, as most of these since Debian 13; there modules are compressed, too.
    found = {module: next(modules.rglob(f"{module}.ko*"), None) for module in LOAD_ORDER}
    for module, file in found.items():
        if file:
            text = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
            (folder / f"{module}.ko").write_bytes(text)
    (folder / "init").write_text(INIT.format(modules=" ".join(module for module, file in found.items() if file)))
    (folder / "init").chmod(0o755)
    # cpio came with the kernel.
    _run(["chroot", root, "sh", "-ec", "cd /mnt/initrd; find . | cpio --quiet -o -H newc > ../initrd.cpio"])
    shutil.move(root / "mnt/initrd.cpio", target)
    shutil.rmtree(folder)


def build(root: Path, target: Path) -> None:
    """Makes an image at ``target``. To be called in a mount namespace of its own."""
    work = target.with_name(f".{target.name}.{os.getpid()}")
    upper, mounts, merged, result = (work / name for name in ("upper", "work", "merged", "result"))
    try:
        for folder in (upper, mounts, merged, result):
            folder.mkdir(parents=True)
        _run(["mount", "-t", "overlay", "-o", f"lowerdir={root},upperdir={upper},workdir={mounts}", "overlay", merged])
        _install(merged)
        _trim(merged, repository.host_files(root.parent))
        _make_initrd(merged, result / "initrd")
        shutil.move(next((merged / "boot").glob("vmlinuz-*")), result / "kernel")
        raw = work / "disk.raw"
        prezeroed = ["-E", "assume_storage_prezeroed=1,root_owner=0:0", "-m", "1", "-L", "system"]
        _run(["mkfs.ext4", "-q", *prezeroed, "-d", merged, raw, SIZE])
        _run(["qemu-img", "convert", "-O", "qcow2", raw, result / "disk.qcow2"])
        _run(["umount", merged])
        result.rename(target)
    finally:
        subprocess.run(["umount", "--recursive", "--quiet", str(merged)], stderr=subprocess.DEVNULL)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
    except ImageError as error:
        sys.exit(str(error))
