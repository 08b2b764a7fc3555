"""What the lab remembers between commands, and how to run a command inside it."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab.people import PEOPLE
from model.load import load as load_stack
from model.stack import Host, Stack
from ops.keys import ssh_key
from ops.stackfile import write_atomically

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posthorn"
LAB = os.environ.get("POSTHORN_LAB") or "lab"
"""Which lab: several stand side by side, and know nothing of one another. The tests have one of their own."""
RELEASE = int(os.environ.get("POSTHORN_RELEASE") or 0) or None
"""The Debian release of the hosts of a lab that is made, where that is not to be the committed stack's."""
WANTED_PEOPLE = os.environ.get("POSTHORN_PEOPLE") or str(len(PEOPLE))
"""How many people a lab has that is made (lab/people.py). Each pass of posthorn-sync looks at all of them, so tests
that have many passes do with few or none."""
FOLDER = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "posthorn" / LAB
PREFIX = f"posthorn-{LAB}-"
RESOLVER = "203.0.113.54"


class LabError(Exception):
    """Something went wrong in the lab: the message says what, where, and what to do."""


if not (LAB.isascii() and LAB.isalnum() and len(LAB) <= 12 and LAB != "logs"):
    # A hyphen could make one lab's names begin like another's.
    sys.exit(f"POSTHORN_LAB={LAB}: a lab's name is up to twelve letters and digits")


if not WANTED_PEOPLE.isdecimal():
    sys.exit(f"POSTHORN_PEOPLE={WANTED_PEOPLE}: how many people a lab has is a number")


def namespace(name: str) -> str:
    """The network namespace of a part of the lab."""
    return PREFIX + name


@dataclass
class State:
    """The lab as it stands. What was made on the day is kept here, and nowhere in the repository."""

    folder: Path = FOLDER
    machines: str = "containers"
    virtual: tuple[str, ...] = ()
    """Hosts that are virtual machines; the others are containers."""
    release: int = 12
    """The Debian release of the stack's hosts …"""
    releases: dict[str, int] = field(default_factory=dict)
    """… and of those that were installed anew with another one."""
    people: tuple[str, ...] = ()
    """Who lives in it, beside the accounts of its stack."""
    passwords: dict[str, str] = field(default_factory=dict)
    tsig_name: str = "posthorn-lab"
    tsig_secret: str = ""
    operator_public_key: str = ""
    host_keys: dict[str, str] = field(default_factory=dict)
    generations: dict[str, str] = field(default_factory=dict)
    trust_anchor: tuple[str, ...] = ()
    world_authority: str = ""
    """The certificate (PEM) of the authority that the lab's internet believes."""
    acme_https: str = ""
    """The authority behind the HTTPS of the ACME server."""
    hypervisors: dict[str, dict[str, Any]] = field(default_factory=dict)

    # Files

    @property
    def file(self) -> Path:
        return self.folder / "state.json"

    @property
    def operator_key(self) -> Path:
        return self.folder / "operator"

    @property
    def agent_socket(self) -> Path:
        return self.folder / "agent.sock"

    @property
    def known_hosts(self) -> Path:
        """The hosts' keys, for ssh; there from the first ``make up`` on."""
        return self.folder / "known_hosts"

    @property
    def passphrase_file(self) -> Path:
        return self.folder / "passphrase"

    @property
    def authority_file(self) -> Path:
        """The certificates of the stack's own authority and of the one that the world believes."""
        return self.folder / "authority.pem"

    @property
    def world_file(self) -> Path:
        """The certificate of the authority that the lab's world believes, and it alone: Pebble's root."""
        return self.folder / "world.pem"

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def python(self) -> str:
        return sys.executable

    def save(self) -> None:
        """Writes it down, readable by root alone."""
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_atomically(self.file, json.dumps(values, indent=1), 0o600)

    def release_of(self, host: str) -> int:
        """The Debian release of a host of the stack."""
        return self.releases.get(host, self.release)

    # Running things

    def environment(self) -> dict[str, str]:
        """The variables that the operator's programs need inside the lab."""
        return {
            "PULUMI_BACKEND_URL": f"file://{self.folder / 'backend'}",
            "PULUMI_CONFIG_PASSPHRASE_FILE": str(self.passphrase_file),
            "PULUMI_DIY_BACKEND_DISABLE_CHECKPOINT_BACKUPS": "true",
            "SSH_AUTH_SOCK": str(self.agent_socket),
            "POSTHORN_PROJECT": str(self.project),
        }

    def command_in(self, where: str, command: list[str]) -> list[str]:
        """The command that runs another one somewhere in the lab.

        In a container it enters the container; in the client's and the operator's namespaces it sees this machine's
        files, with the lab's resolver. A virtual machine is asked over SSH, once ``make up`` has filled it.
        """
        from lab.containers import leader

        if (pid := leader(self, where)) is not None:
            return [
                "nsenter",
                "-t",
                str(pid),
                "--mount",
                "--uts",
                "--ipc",
                "--net",
                "--pid",
                "--root",
                "--wd",
                *command,
            ]
        if where in self.virtual:
            return self.command_in("operator", self._ssh(stack().all_hosts[where], shlex.join(command)))
        if not Path("/run/netns", namespace(where)).exists():
            raise LabError(f"there is no {where} in the lab, or it is not running: see python -m lab status")
        resolv = self.folder / "resolv.conf"
        # A mount namespace of its own: nothing of this is left behind.
        script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{namespace(where)}"]
        return [*enter, "unshare", "--mount", "sh", "-c", script, str(resolv), *command]

    def _ssh(self, host: Host, command: str) -> list[str]:
        """The operator's way to a host whose key stands in the lab's ``known_hosts``."""
        options = [f"UserKnownHostsFile={self.known_hosts}", "IdentitiesOnly=yes", "BatchMode=yes", "ConnectTimeout=20"]
        words = [word for option in options for word in ("-o", option)]
        return ["ssh", "-i", str(self.operator_key), *words, f"root@{host.management_address}", command]

    def run_in(self, where: str, command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Runs a command somewhere in the lab: a host, client, foreign, operator or internet."""
        env = {**os.environ, **options.pop("env", {})}
        if where == "operator":
            env |= self.environment()
        options.setdefault("cwd", ROOT)
        return subprocess.run(self.command_in(where, command), env=env, **options)


def stack() -> Stack:
    """The lab's stack as it is committed: hosts, sites and addresses."""
    return load_stack(ROOT / "stacks" / "Pulumi.lab.yaml")


def load() -> State:
    """The lab's state. Raises `LabError` when there is no lab."""
    if not (FOLDER / "state.json").exists():
        raise LabError("there is no lab: start one with make lab")
    values = json.loads((FOLDER / "state.json").read_text())
    values |= {name: tuple(values[name]) for name in ("trust_anchor", "virtual", "people")}
    return State(**values)


def load_or_make(machines: str, virtual: Collection[str] = (), release: int | None = None) -> State:
    """The lab's state, made with fresh keys and passwords when there is none.

    With VMs, ``virtual`` names the hosts that are to be some; without it all are. ``release`` is the Debian release of
    the hosts; without it that of a running lab, or of the committed stack. Raises `LabError` when a running lab is
    another one.
    """
    if (FOLDER / "state.json").exists():
        state = load()
        if state.machines != machines:
            raise LabError(f"the lab runs with {state.machines}: make lab-down first, or MACHINES={state.machines}")
        if release not in (None, state.release):
            raise LabError(f"the lab runs Debian {state.release}: make lab-down first, or RELEASE={state.release}")
        return state
    FOLDER.mkdir(parents=True, exist_ok=True, mode=0o700)
    (FOLDER / "backend").mkdir(exist_ok=True)
    lab_stack = stack()
    if unknown := set(virtual) - set(lab_stack.hosts):
        raise LabError(f"there is no host {', '.join(sorted(unknown))} (hosts: {', '.join(lab_stack.hosts)})")
    state = State(
        machines=machines,
        virtual=tuple(virtual or lab_stack.hosts) if machines == "vms" else (),
        release=release or lab_stack.service.release,
    )
    public, private = ssh_key("operator")
    state.operator_public_key = public
    write_atomically(state.operator_key, private, 0o600)
    write_atomically(state.passphrase_file, secrets.token_urlsafe(24), 0o600)
    write_atomically(FOLDER / "resolv.conf", f"nameserver {RESOLVER}\noptions timeout:2\n")
    state.tsig_secret = base64.b64encode(secrets.token_bytes(32)).decode()
    state.passwords = {name: secrets.token_urlsafe(12) for name in (*lab_stack.accounts, *lab_stack.machine_users)}
    state.people = PEOPLE[: int(WANTED_PEOPLE)]
    state.passwords |= dict.fromkeys(state.people, secrets.token_urlsafe(12))
    state.generations = dict.fromkeys(lab_stack.hosts, "1")
    state.save()
    return state
