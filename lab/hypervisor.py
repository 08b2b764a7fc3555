"""A libvirt host per site, each in a world of its own: network, mounts, processes.

Site and hypervisor share a network namespace, so its bridges are the site's, and a site that is cut has a hypervisor
that is cut. Everything of one hypervisor, its VMs included, lives in one process namespace and dies with its first
process. It is reached as in production, by ``qemu+ssh`` with a pinned host key.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tools import setup

START_SECONDS = 30
STOP_SECONDS = 10

LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0770"
host_uuid = "{uuid}"
"""

QEMU_CONF = """\
# The lab is one machine for one person, and every file of it is root's.
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
# No virtlogd beside it, no cgroups (those of several hypervisors would clash), no mount namespace in this one.
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
"""

POOL = """\
<pool type="dir"><name>default</name><target><path>{path}</path></target></pool>
"""

SSHD_CONF = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
Subsystem sftp internal-sftp
"""

# The shell stays the first process of its namespace: it reaps what libvirt leaves, else libvirt waits for zombies.
INIT = """\
set -e
mount --make-rprivate /
for pair in run:/run/libvirt lib:/var/lib/libvirt etc:/etc/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
    mkdir -p "${pair#*:}"
    mount --bind "$1/${pair%%:*}" "${pair#*:}"
done
mkdir -p /run/sshd
/usr/sbin/sshd -D -e -f "$1/sshd_config" &
/usr/sbin/libvirtd --pid /run/libvirt/libvirtd.pid &
wait
"""


class HypervisorError(Exception):
    """A hypervisor that did not start. Carries the end of its log."""


def emulates() -> bool:
    """Whether VMs have to be emulated here: what a set-up asks too, before it chooses them."""
    return bool(setup.why_emulated(setup.CPU.read_text(), setup.KVM))


@dataclass(frozen=True)
class Hypervisor:
    """The libvirt host of one site. ``folder`` is where all of it is kept; stopping removes that."""

    site: str
    namespace: str
    address: str
    """Where its sshd listens: the site's address on the backbone."""
    folder: Path

    @property
    def uri(self) -> str:
        """How the operator reaches it: with the keys of his SSH agent, and nothing but the pinned host key."""
        return f"qemu+ssh://root@{self.address}/system?sshauth=agent&knownhosts={self.folder}/known_hosts"

    @property
    def local_uri(self) -> str:
        """How this machine reaches it even when its site is cut."""
        return f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock"

    def settings(self) -> dict[str, str | bool]:
        """The hypervisor as a stack file says it (see `model.network.Hypervisor`), but for its images."""
        return {"uri": self.uri, "emulate": emulates()}

    def start(self, authorized_keys: str) -> None:
        """Starts it, if it does not run. ``authorized_keys`` are those who may log in, the operator alone.

        Raises `HypervisorError` when it is not there within half a minute.
        """
        if self.running():
            return
        self._prepare(authorized_keys)
        log = (self.folder / "console.log").open("wb")
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command += ["bash", "-c", INIT, f"hypervisor-{self.site}", str(self.folder)]
        with log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # `ip netns exec` and `unshare` replace themselves, so this is the process whose end is the end of all.
        (self.folder / "pid").write_text(f"{process.pid}\n")
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise HypervisorError(f"the hypervisor of {self.site} did not start:\n{self._last_words()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it with all its VMs, as a power cut would, and removes what it kept."""
        pid = self._pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + STOP_SECONDS
            while self._pid() is not None and time.monotonic() < deadline:
                self._reap(pid)
                time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)

    def running(self) -> bool:
        return self._pid() is not None

    def machines(self) -> dict[str, str]:
        """Its VMs by name, with their state in libvirt's words."""
        listed = subprocess.run(
            ["virsh", "-c", self.local_uri, "-q", "list", "--all"], capture_output=True, text=True, timeout=10
        )
        rows = (line.split(None, 2) for line in listed.stdout.splitlines() if line.strip())
        return {name: state.strip() for _, name, state in rows}

    def _prepare(self, authorized_keys: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("run", "lib", "log/qemu", "cache", "etc/qemu/networks", "etc/storage/autostart", "pool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o700)
        write = {
            "etc/libvirtd.conf": LIBVIRTD_CONF.format(uuid=uuid.uuid4()),
            "etc/qemu.conf": QEMU_CONF,
            "etc/storage/default.xml": POOL.format(path=self.folder / "pool"),
            "sshd_config": SSHD_CONF.format(address=self.address, folder=self.folder),
            "authorized_keys": authorized_keys.rstrip() + "\n",
        }
        for name, text in write.items():
            (self.folder / name).write_text(text)
        (self.folder / "etc/storage/autostart/default.xml").symlink_to("/etc/libvirt/storage/default.xml")
        key = self.folder / "host_key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.site, "-f", str(key)], check=True)
        kind, public = key.with_suffix(".pub").read_text().split()[:2]
        (self.folder / "known_hosts").write_text(f"{self.address} {kind} {public}\n")

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as libvirt:
            try:
                libvirt.connect(str(self.folder / "run/libvirt-sock"))
            except OSError:
                return False
        listening = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Hltn", f"src {self.address}:22"], capture_output=True
        )
        return bool(listening.stdout)

    def _pid(self) -> int | None:
        """The first process, unless it is gone or another has its number now."""
        try:
            pid = int((self.folder / "pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self.folder) in words else None

    @staticmethod
    def _reap(pid: int) -> None:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return

    def _last_words(self) -> str:
        return (self.folder / "console.log").read_text(errors="replace")[-2000:]
