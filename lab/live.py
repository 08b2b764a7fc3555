"""The live stack files of the lab: the committed stack, and what was made on the day."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from lab import people
from lab.state import State
from model.load import PROJECT, READ_OTHERWISE
from ops.stackfile import write_atomically
from services.dovecot import hashed, is_hash_of

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "stacks" / "Pulumi.lab.yaml"


class _NoAliases(yaml.SafeDumper):
    """YAML without anchors: Pulumi rewrites the file, and each host is to stand on its own."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Whatever another reader would take for a number is written in quotes.
_NoAliases.add_implicit_resolver(*READ_OTHERWISE)


def _kept(before: dict[str, Any], account: str, password: str) -> str:
    """The hash that the live file has already, so that a second run changes nothing; else a new one."""
    known = before.get(f"{PROJECT}:accounts", {}).get(account, {}).get("password", "")
    return str(known) if is_hash_of(known, password) else hashed(password)


def _people(state: State, before: dict[str, Any], config: dict[str, Any]) -> None:
    """Adds the people of the lab, with their addresses."""
    one = state.people[0]
    config[f"{PROJECT}:accounts"] |= people.accounts(state.people, _kept(before, one, state.passwords[one]))
    config[f"{PROJECT}:domains"][people.DOMAIN]["aliases"] |= people.aliases(state.people)


def live_configuration(state: State, before: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a live stack. ``before`` is the present one, whose keys are kept."""
    config: dict[str, Any] = copy.deepcopy(yaml.safe_load(SOURCE.read_text())["config"])

    def part(key: str) -> dict[str, Any]:
        return config[f"{PROJECT}:{key}"]  # type: ignore[no-any-return]

    part("service")["release"] = state.release
    part("access")["operators"] = [state.operator_public_key]
    part("dns")["resolver"]["trust_anchor"] = list(state.trust_anchor)
    part("service")["authorities"] = [state.world_authority, state.acme_https, state.world_file.read_text()]
    part("dns")["servers"]["lab"]["key"] = state.tsig_name
    for name, account in part("accounts").items():
        account["password"] = _kept(before, name, state.passwords[name])
    if state.people:
        _people(state, before, config)
    for name, user in part("machine_users").items():
        user["password"] = state.passwords[name]
    for name, host in part("hosts").items():
        if name in state.releases:
            host["release"] = state.releases[name]
        if name not in state.virtual:
            del host["machine"]
            host["existing"] = {"host_key": state.host_keys[name], "generation": state.generations[name]}
    for name, site in part("sites").items():
        if state.virtual:
            site["hypervisor"] |= state.hypervisors[name]
        else:
            del site["hypervisor"]
    if keys := before.get(f"{PROJECT}:keys"):
        config[f"{PROJECT}:keys"] = keys
    return config


def dump(document: dict[str, Any]) -> str:
    """A stack file's text."""
    return yaml.dump(document, Dumper=_NoAliases, sort_keys=False)


def write(state: State) -> Path:
    """Writes the lab's own Pulumi project with the live stack file, and returns its folder."""
    folder = state.folder / "project"
    folder.mkdir(parents=True, exist_ok=True)
    project = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())
    project["main"], project["stackConfigDir"] = str(ROOT), "."
    write_atomically(folder / "Pulumi.yaml", yaml.dump(project, sort_keys=False))
    file = folder / f"Pulumi.lab-{state.machines}.yaml"
    document: dict[str, Any] = yaml.safe_load(file.read_text()) if file.exists() else {}
    before = document.get("config", {})
    config = live_configuration(state, before)
    if config != before:
        write_atomically(file, dump(document | {"config": config}), 0o600)
    return folder
