"""From nothing to a proved mail service, and back to nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab import containers, foreign, image, internet, live, network, people
from lab.mailboxes import Mailboxes
from lab.proof import prove
from lab.state import CACHE, FOLDER, LAB, LabError, State, load, load_or_make, stack
from model.load import load as load_stack
from model.stack import Stack
from ops.name_server import asking_hosts
from services import data_disk

LOCK = Path(f"/run/posthorn-{LAB}.lock")
INFRASTRUCTURE = (internet.NAME, foreign.NAME)
"""Machines of the lab itself, always containers."""
CERTIFICATES_SECONDS = 600.0
"""For eleven emulated machines; containers alone take some ten seconds."""


class Phases:
    """Says what is going on, and what each part of it took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.taken: list[tuple[str, float, float]] = [
            (phase["name"], phase["wall"], phase["cpu"])
            for phase in json.loads(os.environ.get("POSTHORN_SETUP_PHASES", "[]"))
        ]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started, busy = time.monotonic(), _busy_seconds()
        with self.console.status(f"{name} …"):
            if not self.console.is_terminal:
                self.console.print(f"· {name} …")
            yield
        self.taken.append((name, time.monotonic() - started, _busy_seconds() - busy))
        self.console.print(f"✓ {name}: {self.taken[-1][1]:.1f} s")

    def summary(self) -> Table:
        table = Table(title="What took how long", title_justify="left", show_edge=False)
        table.add_column("phase")
        table.add_column("s", justify="right")
        table.add_column("CPU-s", justify="right")
        for name, wall, cpu in self.taken:
            table.add_row(name, f"{wall:.1f}", f"{cpu:.1f}")
        walls, cpus = [wall for _, wall, _ in self.taken], [cpu for *_, cpu in self.taken]
        table.add_row("all", f"{sum(walls):.1f}", f"{sum(cpus):.1f}", style="bold")
        return table


def _busy_seconds() -> float:
    """CPU time that this machine has spent on anything (proc(5)): a lab's daemons are nobody's children here."""
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One command at a time changes the lab."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LabError("another command is starting or removing the lab: wait for it") from None
        yield


def _start_agent(state: State) -> None:
    """An SSH agent with the operator's key: so no key stands in Pulumi's state."""
    if agents():
        return
    state.agent_socket.unlink(missing_ok=True)
    subprocess.run(["ssh-agent", "-s", "-a", str(state.agent_socket)], capture_output=True, check=True)
    subprocess.run(
        ["ssh-add", "-q", str(state.operator_key)],
        env={**os.environ, "SSH_AUTH_SOCK": str(state.agent_socket)},
        check=True,
        capture_output=True,
    )


def agents() -> list[int]:
    """The lab's SSH agents, found by their socket: also one whose lab's state was lost."""
    socket, found = os.fsencode(FOLDER / "agent.sock"), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if socket in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def images(phases: Phases, releases: Collection[int]) -> None:
    """Makes the images that the hosts and the lab's own machines start from, where they are missing."""
    logs = FOLDER.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for needed in sorted({image.OWN, *releases}):
        if not image.is_made(needed):
            with phases.phase(f"Debian {needed} image"):
                image.make(needed, logs / f"image-{needed}.log")
        image.note_use(image.folder(needed))


def infrastructure(phases: Phases, machines: str, virtual: Collection[str] = (), release: int | None = None) -> State:
    """Images, wires, name servers, the foreign host, and machines that answer on SSH. Does only what is missing."""
    lab_stack = stack()
    state = load_or_make(machines, virtual, release)
    images(phases, {state.release_of(host) for host in lab_stack.hosts})
    if not network.exists():
        with phases.phase("network"):
            network.build(lab_stack, [host for host in lab_stack.hosts if host not in state.virtual])
    _start_agent(state)
    hosts = [host for host in lab_stack.all_hosts.values() if host.name not in state.virtual]
    names = [*INFRASTRUCTURE, *(host.name for host in hosts)]
    if any(containers.leader(state, name) is None for name in names):
        with phases.phase(f"{len(names)} containers"):
            for name in names:
                containers.prepare(state, name)
                lower = image.OWN if name in INFRASTRUCTURE else state.release_of(name)
                containers.start(state, name, image.folder(lower) / "root")
            state.save()
            addresses = {host.name: str(host.management_address) for host in hosts}
            addresses |= {foreign.NAME: "203.0.113.25", internet.NAME: "203.0.113.1"}
            containers.wait_for_ssh(state, addresses)
        with phases.phase("name servers and foreign host"):
            internet.configure(state)
            internet.serve_packages(state, {image.OWN, *(state.release_of(host) for host in lab_stack.hosts)})
            internet.wait_until_ready(state)
            foreign.configure(state)
    if state.virtual:
        from lab import vms

        vms.start(phases, state)
    return state


def _ops(state: State, *arguments: str, text: str | None = None, quiet: bool = False) -> str:
    done = state.run_in(
        "operator", [sys.executable, "-m", "ops", *arguments], input=text, capture_output=quiet, text=True
    )
    if done.returncode:
        raise LabError((done.stdout + done.stderr).strip() if quiet else f"ops {arguments[0]} failed")
    return done.stdout or ""


def wait_for_certificates(state: State, live: Stack) -> None:
    """Waits until each host shows the world a certificate that it believes.

    Raises `LabError` with the last words of one that does not get any.
    """
    deadline = time.monotonic() + CERTIFICATES_SECONDS
    script = (
        "issuer() { openssl x509 -in /etc/posthorn/tls/public.pem -noout -issuer; };"
        " case $(issuer) in *Pebble*) ;; *) systemctl start posthorn-certificate ;; esac; issuer;"
        " journalctl -u posthorn-certificate -n 3 -o cat"
    )

    def asked(name: str) -> str:
        command = ["sh", "-c", script]
        return str(state.run_in(name, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout)

    waiting = [host.name for host in asking_hosts(live)]
    while waiting:
        with ThreadPoolExecutor(len(waiting)) as pool:
            said = dict(zip(waiting, pool.map(asked, waiting), strict=True))
        waiting = [name for name, text in said.items() if not re.search(r"^issuer=.*Pebble", text, re.MULTILINE)]
        if waiting and time.monotonic() > deadline:
            words = said[waiting[0]].strip()
            raise LabError(f"{', '.join(waiting)}: no certificate from Pebble; {waiting[0]} says: {words}")


def _people(phases: Phases, state: State) -> None:
    """Fills the mailboxes of the lab's people, once."""
    done = state.folder / "people-moved-in"
    if state.people and not done.exists():
        with phases.phase("mail and filters of its people"):
            mailboxes = Mailboxes(state.command_in(people.HOST, []))
            try:
                people.move_in(mailboxes, state.people)
            finally:
                mailboxes.close()
        done.touch()


def _check(state: State, name: str) -> None:
    """All has to be as the stack says. What was just pushed may still be settling: it is asked up to three times."""
    command = [sys.executable, "-m", "ops", "check", name]
    if all(state.run_in("operator", command).returncode == 1 for _ in range(3)):
        raise LabError("something is wrong: see above")


def up(
    console: Console,
    machines: str,
    *,
    virtual: Collection[str] = (),
    release: int | None = None,
    only_infrastructure: bool = False,
) -> None:
    """Starts the lab, brings the stack up in it, and proves that mail flows. Does only what is missing."""
    phases = Phases(console)
    with _lock():
        if _died():
            with phases.phase("removing a lab that died"):
                _remove()
        state = infrastructure(phases, machines, virtual, release)
        if only_infrastructure:
            return
        name = f"lab-{machines}"
        project = live.write(state)
        with phases.phase("keys"):
            _ops(state, "keys", name, quiet=True)
            if not (state.folder / "tsig-stored").exists():
                _ops(state, "tsig", name, "--key", state.tsig_name, text=state.tsig_secret + "\n", quiet=True)
                (state.folder / "tsig-stored").touch()
            live_stack = load_stack(project / f"Pulumi.{name}.yaml", name)
            keys = (f"{h.management_address} {h.host_key(live_stack.keys)}\n" for h in live_stack.all_hosts.values())
            state.known_hosts.write_text("".join(keys))
            state.authority_file.write_text(live_stack.keys.public.believed + state.world_file.read_text())
            rules = _ops(state, "update-keys", name, "--server", "knot", quiet=True)
            internet.allow(state, rules, [host.fqdn for host in asking_hosts(live_stack)])
        with phases.phase("make up"):
            # Whoever holds the lab's lock now is not running any more: this one does.
            _ops(state, "unlock", name, quiet=True)
            _ops(state, "up", name, "--yes")
        with phases.phase("certificates"):
            wait_for_certificates(state, live_stack)
        with phases.phase("proof"):
            prove(state, console)
        _people(phases, state)
        with phases.phase("check"):
            _check(state, name)
    console.print(phases.summary())
    status(console)


def reinstall(state: State, name: str, release: int | None = None, *, blank: bool = False) -> None:
    """Installs a host anew, and has it answer on SSH: ``make up`` fills it again.

    What lies on the data disk of a virtual machine stays, unless it is to be ``blank``. Virtual machines are made anew
    by ``make up`` itself, which is told so here. Raises `LabError` for a host that the lab does not have.
    """
    host = stack().all_hosts.get(name)
    if host is None:
        raise LabError(f"there is no host {name} (hosts: {', '.join(stack().hosts)})")
    with _lock():
        if release is not None:
            state.releases[name] = release
        state.save()
        root = image.make(state.release_of(name), state.folder.parent / "logs" / "image.log")
        internet.serve_packages(state, {state.release_of(name)})
        if name in state.virtual:
            from lab import vms

            vms.start(Phases(Console(quiet=True)), state)
        else:
            containers.reinstall(state, name, () if blank else data_disk.kept(host))
            containers.start(state, name, root)
            containers.wait_for_ssh(state, {name: str(host.management_address)})
            state.generations[name] = str(int(state.generations[name]) + 1)
            state.save()
        live.write(state)


def _died() -> bool:
    """Whether there is something of a lab that does not run any more: it was killed, or the machine was restarted."""
    try:
        state = load()
    except LabError:
        return FOLDER.exists() or network.exists() or bool(containers.running() or agents())
    return not network.exists() or containers.leader(state, internet.NAME) is None


def _remove() -> tuple[int, int]:
    """Removes a lab, whole or in parts: its own things alone, known by their names. Returns how many of two kinds."""
    with contextlib.suppress(LabError):
        state = load()
        if state.virtual:
            from lab import vms

            vms.stop(state)
    for agent in agents():
        os.kill(agent, signal.SIGTERM)
    machines, namespaces = containers.stop_all(), network.remove()
    shutil.rmtree(FOLDER, ignore_errors=True)
    return machines, namespaces


def down(console: Console) -> None:
    """Removes the lab: processes, namespaces, control groups and files. Also what a lab without state left."""
    with _lock():
        started = time.monotonic()
        machines, namespaces = _remove()
        _remove_what_labs_share()
    LOCK.unlink(missing_ok=True)
    took = time.monotonic() - started
    console.print(f"the lab is gone: {machines} containers, {namespaces} namespaces, {took:.1f} s")


def _remove_what_labs_share() -> None:
    """Logs, and images that are not used any more: they go with the last lab."""
    base = FOLDER.parent
    if base.exists() and all(path.name == "logs" for path in base.iterdir()):
        shutil.rmtree(base, ignore_errors=True)
        image.forget(CACHE / "images", time.time())


def status(console: Console) -> None:
    """Prints sites, hosts, addresses and states."""
    state, lab_stack = load(), stack()
    table = Table(title=f"The lab: {state.machines}", title_justify="left", show_edge=False)
    for column in ("site", "host", "roles", "site-local", "public", "state"):
        table.add_column(column, overflow="fold")
    machines: dict[str, str] = {}
    if state.virtual:
        from lab import vms

        machines = vms.states(state)
    for site in lab_stack.sites:
        for host in lab_stack.hosts_at(site):
            if host.name in state.virtual:
                now = f"VM {machines.get(host.name, 'not made')}"
            else:
                now = "running" if containers.leader(state, host.name) is not None else "off"
            table.add_row(
                site,
                host.name,
                ", ".join(role.value for role in host.roles),
                str(host.local4),
                str(host.public4 or ""),
                f"[green]{now}" if now.endswith("running") else f"[red]{now}",
            )
    console.print(table)
    console.print(f"memory of all its processes: {network.memory():.0f} MiB")
    console.print(PICTURE, markup=False)


PICTURE = """
   foreign 203.0.113.25 ┐
   client  203.0.113.80 ┼─ internet ─┬──────────── oak  198.51.100.0/28   198.18.1.0/24
   DNS     203.0.113.53 ┘            ├──────────── elm  198.51.100.16/28  198.18.2.0/24
                                     └──────────── ash  198.51.100.32/28  198.18.3.0/24
   operator 198.19.0.10 ─────────────── backbone ─ (oak, elm and ash, site-local)
"""
