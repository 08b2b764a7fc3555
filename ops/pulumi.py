"""Running Pulumi on a stack, with looks around it before and words that an operator can act on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from model.checks import missing_keys
from model.load import PROJECT, load
from model.network import RELEASES
from model.stack import Stack
from ops.keys import certificates_without_names
from services.data_disk import DEVICE
from services.zones import record_problems

ROOT = Path(__file__).parent.parent
REACH_SECONDS = 3.0
GIB = 2**30
INPUTS = 8
"""How deep the inputs of a resource stand in what Pulumi shows."""
CHANGED_TEXT = re.compile(r"~ [^:]+: *")
COLORS = re.compile(r"\x1b\[[0-9;]*m")
BY_PASSPHRASE = ("", "default", "passphrase")
"""Secrets providers of a stack file that leave it to the back end, or ask for a passphrase."""
OF_HOST = ("", "-system", "-data", "-first-boot", "-secrets", "-files")
"""What follows a host's name in the names of its resources (components/machine.py, components/host.py)."""


class OperatorError(Exception):
    """Something an operator can mend: the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Project:
    """A folder with a Pulumi.yaml and its stack files, and the stack to work on."""

    folder: Path
    stack: str

    @classmethod
    def of(cls, stack: str) -> Project:
        """The project of a stack: the folder in POSTHORN_PROJECT (the lab has one of its own), else this repository."""
        return cls(Path(os.environ.get("POSTHORN_PROJECT", ROOT)), stack)

    @property
    def stack_file(self) -> Path:
        stacks = self.folder / "stacks"
        return (stacks if stacks.is_dir() else self.folder) / f"Pulumi.{self.stack}.yaml"

    def load(self, *, keys_needed: bool = True) -> Stack:
        """The stack without its secrets. Raises `StackError` with everything that is wrong."""
        keys = (missing_keys, certificates_without_names) if keys_needed else ()
        return load(self.stack_file, self.stack, record_problems, *keys)

    def command(self, *arguments: str) -> list[str]:
        """The words of a Pulumi command. Raises `OperatorError` where it could find neither state nor passphrase."""
        if wrong := list(back_end_problems(os.environ, self._secrets_provider())):
            raise OperatorError("\n".join(wrong))
        return ["pulumi", "-C", str(self.folder), *arguments, "--stack", self.stack]

    def _secrets_provider(self) -> str:
        """What encrypts the secrets of the stack file, where that names it (``--secrets-provider`` of Pulumi)."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if found := re.search(r"^secretsprovider:[ \t]*[\"']?([^\s\"'#]+)", self.stack_file.read_text(), re.M):
                return found[1]
        return ""

    def run(self, *arguments: str, text: str | None = None) -> str:
        """Runs a quick Pulumi command and returns what it printed. Raises `OperatorError` with Pulumi's own words."""
        done = subprocess.run(
            self.command(*arguments),
            input=text,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OperatorError((done.stderr or done.stdout).strip())
        return done.stdout

    def show(self, *arguments: str, **variables: str) -> int:
        """Runs a long Pulumi command with its output on the terminal, and returns its exit status.

        ``variables`` of the environment are for the program.
        """
        return subprocess.run(self.command(*arguments), env={**os.environ, **variables}).returncode

    def show_changes(self, *arguments: str, **variables: str) -> int:
        """Runs a Pulumi command that explains changes, prints what changes alone, and returns its exit status."""
        color = "--color=always" if sys.stdout.isatty() else "--color=never"
        command = self.command(*arguments, color)
        with subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True) as process:
            for line in changed_lines(process.stdout or ()):
                print(line, end="", flush=True)
        return process.returncode

    def ensure_exists(self) -> None:
        """Makes the stack in the back end when it is not there yet."""
        listed = subprocess.run(self.command("stack", "select", "--create"), capture_output=True, text=True)
        if listed.returncode:
            raise OperatorError(listed.stderr.strip())


def back_end_problems(variables: Mapping[str, str], secrets_provider: str = "") -> Iterator[str]:
    """What keeps Pulumi from finding its state and passphrase, a sentence each, by the variables of the environment.

    Pulumi itself would ask for an account of its maker's where none is named: who has one may have its token alone.
    ``secrets_provider`` is what the stack file names.
    """
    back_end = variables.get("PULUMI_BACKEND_URL") or _logged_in(variables)
    if not back_end and variables.get("PULUMI_ACCESS_TOKEN"):
        back_end = "https:"
    if not back_end:
        yield (
            "PULUMI_BACKEND_URL is not set: say where Pulumi keeps its state, for example"
            " export PULUMI_BACKEND_URL=file:///srv/posthorn-state (README.md, Use it for yours, step 4)"
        )
    folder = state_folder(back_end)
    if folder and not folder.is_dir():
        yield f"PULUMI_BACKEND_URL={back_end}: there is no such folder. Make it once: mkdir -p -m 700 '{folder}'"
    # Pulumi's own service encrypts without one, and so does whatever else a stack file names.
    if secrets_provider not in BY_PASSPHRASE or "PULUMI_CONFIG_PASSPHRASE" in variables:
        return
    if back_end.startswith(("http:", "https:")) and secrets_provider != "passphrase":
        return
    file = variables.get("PULUMI_CONFIG_PASSPHRASE_FILE", "")
    if not file:
        yield (
            "PULUMI_CONFIG_PASSPHRASE_FILE is not set: say which file has the passphrase that secrets are encrypted by,"
            " for example export PULUMI_CONFIG_PASSPHRASE_FILE=/root/posthorn-passphrase (README.md, Use it for yours,"
            " step 4)"
        )
        return
    try:
        if not Path(file).read_text().strip():
            yield f"PULUMI_CONFIG_PASSPHRASE_FILE={file}: the file is empty, write a passphrase into it"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        yield f"PULUMI_CONFIG_PASSPHRASE_FILE={file} cannot be read: {reason}"


def _logged_in(variables: Mapping[str, str]) -> str:
    """The back end that ``pulumi login`` chose, where it was run."""
    credentials = Path(variables.get("PULUMI_CREDENTIALS_PATH") or variables.get("PULUMI_HOME", ""), "credentials.json")
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads(credentials.read_text()).get("current") or "")
    return ""


def state_folder(back_end: str) -> Path | None:
    """The folder of a back end that is one (``file://``), as Pulumi reads it."""
    if not back_end.startswith("file://"):
        return None
    return Path(unquote(urlsplit(back_end).netloc + urlsplit(back_end).path).replace("~", str(Path.home()), 1))


def changed_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines of ``pulumi preview --diff`` that say what changes, and of what.

    Where one word changes of an input that is JSON, Pulumi shows all of the input: thousands of lines for a host.
    """
    text: int | None = None
    told = False
    for line in lines:
        plain = COLORS.sub("", line).rstrip("\n")
        said = plain.lstrip()
        depth = len(plain) - len(said)
        told = told or plain.startswith("Diagnostics")
        if text is not None and depth >= text + 4:
            # A text that changes, with the lines around.
            yield line
            continue
        text = depth if CHANGED_TEXT.fullmatch(said) else None
        if told or (said and depth < INPUTS) or said.startswith(("~", "+", "-", "[urn=")):
            yield line


def excluded(stack: Stack, sites: Sequence[str]) -> list[str]:
    """Pulumi arguments that leave out every resource of some sites.

    By their whole names: ``home-*`` would leave out what is at a site named home-b too.
    """
    names = []
    for site in sites:
        if site not in stack.sites:
            raise OperatorError(f"WITHOUT={site}: the stack has no such site (sites: {', '.join(stack.sites)})")
        # The stack itself may be called like a site.
        names += [f"Hypervisor::{site}", f"::{site}-hypervisor"]
        names += [f"::{site}-debian-{release}{part}" for release in RELEASES for part in ("", "-kernel", "-initrd")]
        names += [f"::{host.name}{part}" for host in stack.hosts_at(site) for part in OF_HOST]
    return [f"--exclude=**{name}" for name in names]


def pushed_again(stack: Stack, hosts: Sequence[str], without: Sequence[str]) -> list[str]:
    """Pulumi arguments that push to some hosts again although nothing changed, which puts right what somebody changed.

    Raises `OperatorError` for a host that the stack does not have, or whose site is left out.
    """
    for name in hosts:
        if name not in stack.all_hosts:
            raise OperatorError(f"PUSH={name}: the stack has no such host (hosts: {', '.join(stack.all_hosts)})")
        if stack.all_hosts[name].site in without:
            raise OperatorError(f"PUSH={name}: its site is left out (WITHOUT={stack.all_hosts[name].site})")
    return [f"--replace=**::{name}-{part}" for name in hosts for part in ("secrets", "files")]


def left_behind(project: Project, exported: Mapping[str, Any]) -> Iterator[str]:
    """What a killed run left, each with the way to clear it."""
    if base := state_folder(os.environ.get("PULUMI_BACKEND_URL", "")):
        for lock in sorted((base / ".pulumi" / "locks" / "organization" / PROJECT / project.stack).glob("*.json")):
            holder = json.loads(lock.read_text() or "{}")
            yield (
                f"the stack is locked since {holder.get('timestamp', '?')} by process {holder.get('pid', '?')}"
                f" of {holder.get('username', '?')}@{holder.get('hostname', '?')}:"
                f" if that is gone, run make unlock STACK={project.stack}"
            )
    for pid, name in orphans():
        yield f"process {pid} ({name}) of an earlier run still runs: make unlock STACK={project.stack} ends it"
    for operation in (exported.get("deployment") or {}).get("pending_operations") or []:
        urn = operation["resource"]["urn"].rpartition("::")[2]
        yield (
            f"an earlier run was cut while it was {operation['type']} {urn}: see whether that was done, then run"
            f" make refresh STACK={project.stack}, which asks and clears it"
        )


def anew_at_once(stack: Stack, exported: Mapping[str, Any]) -> list[str]:
    """A problem when more than one machine would be made anew for another Debian: the service goes on, host by host.

    ``exported`` is the state (``pulumi stack export``), in which a system disk lies over the image of its release.
    """
    by_name = _by_name(exported)
    images = {
        by_name[name].get("id"): release
        for release in RELEASES
        for site in stack.sites
        if (name := f"{site}-debian-{release}") in by_name
    }
    other = []
    for host in stack.all_hosts.values():
        disk = by_name.get(f"{host.name}-system", {}).get("inputs", {})
        if images.get(disk.get("baseVolumeId"), stack.release_of(host)) != stack.release_of(host):
            other.append(host.name)
    if len(other) < 2:
        return []
    hosts = ", ".join(other)
    return [f"{hosts} would be made anew in one run for another Debian: one at a time (docs/upgrade-12-to-13.md)"]


def _by_name(exported: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The resources of a state by their names, but for those that only wait to be deleted."""
    resources = (exported.get("deployment") or {}).get("resources") or []
    return {r["urn"].rpartition("::")[2]: r for r in resources if not r.get("delete")}


def has_machines(stack: Stack, exported: Mapping[str, Any]) -> bool:
    """Whether a machine of the stack was made already, by its state."""
    resources = _by_name(exported)
    return any(f"{host}-system" in resources for host in stack.all_hosts)


def disks_as_they_were(stack: Stack, exported: Mapping[str, Any]) -> Iterator[str]:
    """What to do for each data disk that is not as large as the stack says: ``up`` never changes one, it holds data."""
    resources = _by_name(exported)
    for host in stack.all_hosts.values():
        disk = resources.get(f"{host.name}-data")
        if disk is None or host.machine is None:
            continue
        there, said = round(disk["outputs"]["size"] / GIB), host.machine.data_disk
        if there == said:
            continue
        grow = (
            f"to grow it, virsh blockresize {host.name} {DEVICE.removeprefix('/dev/')} {said}G on its hypervisor, then"
            f" resize2fs {DEVICE} on {host.name}, then make refresh STACK={stack.name}"
        )
        way = grow if said > there else "a disk is never made smaller"
        yield f"the data disk of {host.name} has {there} GiB and stays so, though machine.data_disk says {said}: {way}"


def locked_out(stack: Stack) -> list[str]:
    """A problem when none of the keys that may log in is at hand: a push would be refused, or be the last one."""
    done = subprocess.run(["ssh-add", "-L"], capture_output=True, text=True)
    held = {tuple(line.split()[:2]) for line in done.stdout.splitlines()} if done.returncode == 0 else set()
    if held & {tuple(key.split()[:2]) for key in stack.access.operators}:
        return []
    return ["the SSH agent holds none of the keys under access.operators: run ssh-add with one of them"]


def orphans(processes: Path = Path("/proc")) -> Iterator[tuple[int, str]]:
    """Plugins of Pulumi whose run was killed: (process id, name).

    Those alone that have our home of Pulumi, and our back end: which no variable names where ``pulumi login`` chose it.
    """
    ours = [os.environ.get(name) for name in ("PULUMI_HOME", "PULUMI_BACKEND_URL")]
    for process in processes.glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            environment = os.fsdecode((process / "environ").read_bytes())
        except (OSError, UnicodeDecodeError):
            continue
        variables = dict(line.partition("=")[::2] for line in environment.split("\0"))
        theirs = [variables.get(name) for name in ("PULUMI_HOME", "PULUMI_BACKEND_URL")]
        if name.startswith(("pulumi-resource", "pulumi-languag")) and parent == "1" and theirs == ours:
            yield int(process.name), name


def unlock(project: Project) -> list[str]:
    """Clears what a killed run left on this machine: its plugins and its lock. Returns what was done."""
    done = []
    for pid, name in list(orphans()):
        os.kill(pid, signal.SIGTERM)
        done.append(f"ended process {pid} ({name})")
    project.run("cancel", "--yes")
    done.append(f"removed the lock of {project.stack}")
    return done


def _endpoints(stack: Stack, without: Sequence[str]) -> Iterator[tuple[str, str, int, str, bool]]:
    for name, site in stack.sites.items():
        if name in without or site.hypervisor is None or not any(host.machine for host in stack.hosts_at(name)):
            continue
        uri = urlsplit(site.hypervisor.uri)
        if "ssh" in uri.scheme and uri.hostname:
            yield f"the hypervisor of site {name}", uri.hostname, uri.port or 22, name, True
    for host in stack.all_hosts.values():
        if host.existing and host.site not in without:
            yield f"host {host.name}", str(host.management_address), 22, host.site, True
    for name, server in stack.dns.servers.items():
        yield f"DNS server {name}", str(server.address), server.port, "", False


def _part_from(connection: socket.socket) -> None:
    """Takes leave of an SSH server as a client does, or an error would stand in its journal (RFC 4253 section 4.2)."""
    connection.sendall(b"SSH-2.0-posthorn\r\n")
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(4096):
        pass


def unreachable(stack: Stack, without: Sequence[str] = ()) -> list[str]:
    """Hypervisors, existing hosts and DNS servers that do not answer, all asked at once."""

    def ask(endpoint: tuple[str, str, int, str, bool]) -> str | None:
        what, address, port, site, by_ssh = endpoint
        try:
            with socket.create_connection((address, port), timeout=REACH_SECONDS) as connection:
                if by_ssh:
                    _part_from(connection)
                return None
        except OSError as error:
            way = f"; if the site is lost: WITHOUT={site}" if site else ""
            return f"{what} does not answer at {address} port {port} ({error.strerror or error}){way}"

    endpoints = list(_endpoints(stack, without))
    with ThreadPoolExecutor(max_workers=max(1, len(endpoints))) as pool:
        return [problem for problem in pool.map(ask, endpoints) if problem]
