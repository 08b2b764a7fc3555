"""The disk image of the lab's virtual machines, made of the same root file system as its containers.

An emulated machine pays for every instruction, so the image does little at boot: it is one file system without a
partition table, its kernel is started directly with an initrd that loads six modules and nothing else, and of
cloud-init one of four stages runs, with the modules that a first boot needs. What that is worth stands in
docs/decisions. It carries no identity: no host key, no machine id, no password.

``python -m lab.vm_image ROOT TARGET`` makes one image by hand.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("linux-image-cloud-amd64", "cloud-init", "udev", "busybox-static")
"""What a machine needs beside that of a container."""

SIZE = "2G"
"""Virtual size of the base; a system disk is this large or larger, and its file system grows at the first boot."""

LOAD_ORDER = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")

UNUSED_MODULES = ("kvm_amd", "kvm_intel", "kvm", "ata_piix", "ata_generic", "libata", "serio_raw", "psmouse")

COMMAND_LINE = "root=/dev/vda rw console=ttyS0 quiet mitigations=off net.ifnames=0 systemd.show_status=0"

INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in {" ".join(LOAD_ORDER)}; do
    /bin/busybox insmod "/$module.ko"
done
while ! /bin/busybox mount -t ext4 /dev/vda /root; do
    /bin/busybox sleep 0.1
done
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""

FILES: Mapping[str, str] = {
    "/etc/fstab": "/dev/vda / ext4 rw,x-systemd.growfs 0 0\n",
    "/etc/hostname": "localhost\n",
    "/etc/machine-id": "",
    "/etc/resolv.conf": "",
    # The whole of cloud-init's configuration. The first stage does all: see dsmode in templates/cloud-init.
    "/etc/cloud/cloud.cfg": """\
datasource_list: [NoCloud]
disable_root: false
preserve_hostname: false
ssh: {emit_keys_to_console: false}
cloud_init_modules: [write-files, set_hostname, users-groups, ssh]
cloud_config_modules: []
cloud_final_modules: []
system_info:
  distro: debian
  network: {renderers: [networkd]}
  paths: {cloud_dir: /var/lib/cloud, templates_dir: /etc/cloud/templates}
  ssh_svcname: ssh
""",
    "/etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n",
    # Drivers of devices that QEMU has by default, and the machine no use for.
    "/etc/modprobe.d/lab.conf": "".join(f"blacklist {module}\n" for module in UNUSED_MODULES),
}

ENABLED = ("systemd-networkd.service", "ssh.service")

MASKED = (
    # The other three stages, and the search for the data source: it is NoCloud.
    "cloud-init.service",
    "cloud-config.service",
    "cloud-final.service",
    "cloud-init-hotplugd.socket",
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
    recipe = hashlib.sha256(f"{root.parent.name}\n{Path(__file__).read_text()}".encode()).hexdigest()[:16]
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


def _trim(root: Path) -> None:
    for path in [*root.glob("etc/ssh/ssh_host_*"), *root.glob("boot/initrd*"), *root.glob("var/lib/apt/lists/*_*")]:
        path.unlink()
    for path in root.glob("var/cache/apt/archives/*.deb"):
        path.unlink()
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    for name, text in FILES.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    systemd = root / "etc/systemd/system"
    _run(["systemctl", f"--root={root}", "--quiet", "enable", *ENABLED])
    _run(["systemctl", f"--root={root}", "--quiet", "mask", *MASKED])
    # cloud-init's generator looks for a data source at every boot; the one stage that runs is enabled as it is.
    generators = root / "etc/systemd/system-generators"
    generators.mkdir(exist_ok=True)
    (generators / "cloud-init-generator").symlink_to("/dev/null")
    wants = systemd / "sysinit.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "cloud-init-local.service").symlink_to("/lib/systemd/system/cloud-init-local.service")


def _make_initrd(root: Path, target: Path) -> None:
    modules = next((root / "lib/modules").iterdir())
    folder = root / "mnt/initrd"
    for name in ("bin", "dev", "root"):
        (folder / name).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", folder / "bin/busybox")
    for module in LOAD_ORDER:
        shutil.copy(next(modules.rglob(f"{module}.ko")), folder)
    (folder / "init").write_text(INIT)
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
        _trim(merged)
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
