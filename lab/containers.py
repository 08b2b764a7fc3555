"""Whole Debian machines as systemd-nspawn containers, in network namespaces that are ready before them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from lab import repository
from lab.state import LAB, LabError, State, namespace
from ops.keys import ssh_key
from ops.stackfile import write_atomically

LAUNCHER = r"""
echo $$ > "$CGROUP/cgroup.procs"
# The container sees control groups as on a plain Debian, whatever this machine has.
umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup
# nspawn leaves folders below /run/systemd: here they end with this mount namespace.
mount -t tmpfs -o mode=755 tmpfs /run/systemd
mount -t overlay "$NETNS" -o "lowerdir=$LOWER,upperdir=$MACHINE/upper,workdir=$MACHINE/work" "$MACHINE/root"
export SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
while :; do
    rc=0
    systemd-nspawn --quiet --settings=no --register=no --keep-unit --boot --machine="$NAME" \
        --directory="$MACHINE/root" --network-namespace-path="/run/netns/$NETNS" --capability=CAP_NET_ADMIN \
        --resolv-conf=off --timezone=off --link-journal=no --console=pipe || rc=$?
    [ $rc = 133 ] || break  # 133: the machine reboots
done
"""
WATCHES = Path("/proc/sys/fs/inotify/max_user_instances")
WATCHES_NEEDED = 1024
"""inotify(7): a container takes five to ten of the 128 that a machine has by default, and ends silently without."""
START_SECONDS = 60.0
POLL_SECONDS = 0.05


def _cgroups() -> Path:
    hybrid = Path("/sys/fs/cgroup/unified")
    return (hybrid if hybrid.is_dir() else Path("/sys/fs/cgroup")) / "posthorn" / LAB


def machine_folder(state: State, name: str) -> Path:
    return state.folder / "machines" / name


def upper(state: State, name: str) -> Path:
    """The folder that holds what a machine has changed; readable from outside while it runs."""
    return machine_folder(state, name) / "upper"


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _launcher(state: State, name: str) -> int | None:
    """The launcher's process, if it is still the one that was started: a process id is soon somebody else's."""
    try:
        pid, started = (machine_folder(state, name) / "pid").read_text().split()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    return int(pid) if stat.rpartition(")")[2].split()[19] == started else None


def leader(state: State, name: str) -> int | None:
    """The process that is number 1 inside a machine; None when the machine does not run."""
    launcher = _launcher(state, name)
    for nspawn in _children(launcher) if launcher else ():
        for child in _children(nspawn):
            return child
    return None


def prepare(state: State, name: str, *, host_key: bool = True) -> None:
    """Makes the writable layer of a machine that has none: its name, its SSH host key, the operator's key."""
    folder = machine_folder(state, name)
    if (folder / "ready").exists():
        return
    for part in ("upper", "work", "root"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    top = folder / "upper"
    (top / "etc" / "ssh").mkdir(parents=True)
    (top / "root" / ".ssh").mkdir(parents=True, mode=0o700)
    os.chmod(top / "root", 0o700)
    (top / "etc" / "hostname").write_text(f"{name}\n")
    (top / "etc" / "resolv.conf").write_text((state.folder / "resolv.conf").read_text())
    (top / "root" / ".ssh" / "authorized_keys").write_text(f"{state.operator_public_key}\n")
    if host_key:
        public, private = ssh_key(name)
        write_atomically(top / "etc" / "ssh" / "ssh_host_ed25519_key", private, 0o600)
        write_atomically(top / "etc" / "ssh" / "ssh_host_ed25519_key.pub", public + "\n")
        state.host_keys[name] = public
    (folder / "ready").touch()


def start(state: State, name: str, lower: Path) -> None:
    """Starts a machine that was prepared, with the package sources of its image. Does nothing when it runs."""
    if leader(state, name) is not None:
        return
    if int(WATCHES.read_text()) < WATCHES_NEEDED:
        WATCHES.write_text(str(WATCHES_NEEDED))
    folder = machine_folder(state, name)
    for path, text in repository.host_files(lower.parent).items():
        (folder / "upper" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "upper" / path).write_text(text)
    cgroup = _cgroups() / name
    # A group that was killed once remembers it: systemd 257 starts processes right in their groups, and the kernel ends
    # those that come from a killed group into a new one.
    _clear(cgroup, time.monotonic() + START_SECONDS)
    cgroup.mkdir(parents=True, exist_ok=True)
    variables = {
        "NAME": name,
        "CGROUP": str(cgroup),
        "LOWER": str(lower),
        "MACHINE": str(folder),
        "NETNS": namespace(name),
    }
    with (folder / "console.log").open("ab") as console:
        launcher = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "bash", "-ec", LAUNCHER],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
            env={**os.environ, **variables},
        )
    started = Path(f"/proc/{launcher.pid}/stat").read_text().rpartition(")")[2].split()[19]
    (folder / "pid").write_text(f"{launcher.pid} {started}")


WAIT = """
import asyncio, json, sys

async def banner(address):
    while True:
        try:
            reader, writer = await asyncio.open_connection(address, 22)
            said = await asyncio.wait_for(reader.read(4), 10)
            # Leave is taken as a client does it, or an error would stand in the server's journal.
            writer.write(b"SSH-2.0-lab\\r\\n")
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
            if said == b"SSH-":
                return
        except (OSError, TimeoutError):
            pass
        await asyncio.sleep(0.05)

async def main(machines, seconds):
    waiting = {asyncio.create_task(banner(address)): name for name, address in machines.items()}
    _, late = await asyncio.wait(waiting, timeout=seconds)
    print(*(waiting[task] for task in late))
    for task in late:
        task.cancel()

asyncio.run(main(json.loads(sys.argv[1]), float(sys.argv[2])))
"""


def wait_for_ssh(state: State, addresses: Mapping[str, str]) -> None:
    """Waits until every machine (name to address) shows an SSH banner to the operator.

    Raises `LabError` when one takes too long, with its last words when it has ended.
    """
    command = [state.python, "-c", WAIT, json.dumps(dict(addresses)), str(START_SECONDS)]
    done = state.run_in("operator", command, capture_output=True, text=True)
    late = done.stdout.split()
    if done.returncode:
        raise LabError(f"nobody could look whether machines answer on SSH: {done.stderr.strip()}")
    if late:
        lines = [f"{', '.join(late)} did not answer on SSH within {START_SECONDS:.0f} s"]
        for name in (name for name in late if leader(state, name) is None):
            said = (machine_folder(state, name) / "console.log").read_text(errors="replace")
            lines.append(f"{name} has ended: {said[-300:].strip()}")
        raise LabError("\n".join(lines))


def kill(name: str) -> None:
    """Takes the power from a machine: every process of it ends at once."""
    with contextlib.suppress(OSError):
        (_cgroups() / name / "cgroup.kill").write_text("1")


def wait_for_end(state: State, name: str) -> None:
    """Waits until a machine that was killed has ended, START_SECONDS at most: before, it cannot be started again."""
    deadline = time.monotonic() + START_SECONDS
    while _launcher(state, name) is not None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def running() -> list[str]:
    """Machines that have processes, also of a lab whose state was lost."""
    return [path.name for path in sorted(_cgroups().glob("*")) if path.is_dir()]


def _clear(group: Path, deadline: float) -> None:
    """Removes the control groups of a machine that was killed, once its last process is gone."""
    while any(p.read_text().strip() for p in group.rglob("cgroup.procs")) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for inner in sorted(group.rglob("*"), key=lambda path: -len(path.parts)):
        if inner.is_dir():
            with contextlib.suppress(OSError):
                inner.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()


def stop_all() -> int:
    """Takes the power from all machines, waits for their end, and removes their control groups."""
    names = running()
    for name in names:
        kill(name)
    deadline = time.monotonic() + START_SECONDS
    for name in names:
        _clear(_cgroups() / name, deadline)
    for group in (_cgroups(), _cgroups().parent):
        # The outer one goes with the last lab.
        with contextlib.suppress(OSError):
            group.rmdir()
    return len(names)


def reinstall(state: State, name: str, keep: Collection[str] = ()) -> None:
    """Installs a machine anew, and leaves it off: of all that it wrote, only the paths of ``keep`` are there again.

    Its SSH host key is the stack's, so whoever installs it puts that there again.
    """
    kill(name)
    wait_for_end(state, name)
    folder = machine_folder(state, name)
    former = folder.with_name(f".{name}")
    folder.rename(former)
    prepare(state, name, host_key=False)
    keys = [path.relative_to(former / "upper") for path in (former / "upper/etc/ssh").glob("ssh_host_ed25519_key*")]
    for path in (*keys, *(Path(path.lstrip("/")) for path in keep)):
        if (former / "upper" / path).exists():
            target = folder / "upper" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            (former / "upper" / path).rename(target)
    shutil.rmtree(former)
