"""What an operator is told before anything is touched."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from model.load import load, parse
from model.stack import Stack
from ops import pulumi as running
from ops import ssh
from ops.__main__ import main
from ops.render import render_stack
from tests.unit.conftest import LAB


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "Pulumi.x.yaml").write_text(LAB.read_text())
    monkeypatch.setenv("POSTHORN_PROJECT", str(tmp_path))
    yield tmp_path


def test_a_wrong_stack_file_ends_in_one_message(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = yaml.safe_load((project / "Pulumi.x.yaml").read_text())
    document["config"]["posthorn:hosts"]["smtp-in-oak"]["site"] = "elm"
    (project / "Pulumi.x.yaml").write_text(yaml.dump(document))
    assert main(["render", "x", "--out", str(project / "out")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "is not valid, nothing was changed" in said
    assert "hosts.smtp-in-oak: a host is named role-site: its name must end in -elm" in said
    assert not (project / "out").exists()


def test_a_stack_that_is_not_there_is_said_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "y"]) == 1
    assert "there is no such file" in capsys.readouterr().out


def test_rendering_marks_every_secret_and_writes_every_zone(stack: Stack, tmp_path: Path) -> None:
    render_stack(stack, tmp_path / "out")
    assert (tmp_path / "out/hosts/smtp-in-oak/etc/posthorn/tls/host.key").read_text() == "SECRET tls-key\n"
    zones = {path.name.removesuffix(".zone") for path in (tmp_path / "out/zones").iterdir()}
    assert zones == set(stack.dns.zones)


def test_rendering_leaves_a_folder_alone_that_holds_other_things(project: Path, stack: Stack) -> None:
    (project / "out").mkdir()
    (project / "out" / "letter").write_text("dear")
    with pytest.raises(FileExistsError):
        render_stack(stack, project / "out")


def test_a_site_that_is_left_out_takes_every_resource_with_it(stack: Stack) -> None:
    arguments = running.excluded(stack, ["elm"])
    assert {"--exclude=**::elm-*", "--exclude=**::smtp-in-elm", "--exclude=**::maildrop-elm-*"} <= set(arguments)
    with pytest.raises(running.OperatorError, match="the stack has no such site"):
        running.excluded(stack, ["elk"])


def test_whoever_does_not_answer_is_named_with_the_way_around(
    keyed_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(json.dumps(keyed_config))
    for host in config["hosts"].values():
        del host["machine"]
        host["existing"] = {"host_key": "ssh-ed25519 AAAA"}
    stack = parse("lab", "f", config)

    def connect(where: tuple[str, int], **_: object) -> contextlib.AbstractContextManager[Mock]:
        if where[0].startswith("198.18.2."):
            raise ConnectionRefusedError(111, "Connection refused")
        return contextlib.nullcontext(Mock(recv=Mock(return_value=b"")))

    monkeypatch.setattr(socket, "create_connection", connect)
    said = running.unreachable(stack)
    assert len(said) == 4
    assert (
        "host smtp-in-elm does not answer at 198.18.2.11 port 22 (Connection refused); if the site is lost: WITHOUT=elm"
        in said
    )
    assert running.unreachable(stack, ["elm"]) == []


def test_a_hypervisor_that_does_not_answer_is_named_by_its_site(
    keyed_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(where: tuple[str, int], **_: object) -> contextlib.AbstractContextManager[Mock]:
        if where == ("198.19.0.3", 22):
            raise TimeoutError("timed out")
        return contextlib.nullcontext(Mock(recv=Mock(return_value=b"")))

    monkeypatch.setattr(socket, "create_connection", connect)
    assert running.unreachable(keyed_stack) == [
        "the hypervisor of site ash does not answer at 198.19.0.3 port 22 (timed out); if the site is lost: WITHOUT=ash"
    ]
    assert running.unreachable(keyed_stack, ["ash"]) == []


@pytest.mark.parametrize(("held", "problems"), [("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me", 0), ("", 1)])
def test_a_push_that_would_lock_its_operator_out_is_not_started(
    keyed_stack: Stack, monkeypatch: pytest.MonkeyPatch, held: str, problems: int
) -> None:
    def listing(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0 if held else 1, held + "\n", "")

    monkeypatch.setattr(subprocess, "run", listing)
    assert len(running.locked_out(keyed_stack)) == problems


def test_every_stack_of_the_repository_is_valid() -> None:
    for file in LAB.parent.glob("Pulumi.*.yaml"):
        assert load(file).hosts


def test_machines_are_made_anew_for_another_debian_one_at_a_time(keyed_config: dict[str, Any]) -> None:
    def state_of(*hosts: str) -> dict[str, Any]:
        images = [{"urn": f"urn::{site}-debian-12", "id": f"/pool/{site}"} for site in keyed_config["sites"]]
        disks = [
            {"urn": f"urn::{host}-system", "inputs": {"baseVolumeId": f"/pool/{host.rpartition('-')[2]}"}}
            for host in hosts
        ]
        return {"deployment": {"resources": [*images, *disks]}}

    running_on_12 = state_of("maildrop-oak", "maildrop-elm", "smtp-in-ash")
    config = json.loads(json.dumps(keyed_config))
    config["hosts"]["maildrop-elm"]["release"] = 13
    assert running.anew_at_once(parse("lab", "f", config), running_on_12) == []
    config["service"]["release"] = 13
    assert running.anew_at_once(parse("lab", "f", config), running_on_12) == [
        "maildrop-oak, maildrop-elm, smtp-in-ash would be made anew at once for another Debian:"
        " one at a time (docs/upgrade-12-to-13.md)"
    ]
    assert running.anew_at_once(parse("lab", "f", config), {"deployment": None}) == []


def test_what_holds_data_is_unprotected_by_the_name_that_down_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    urn = "urn:pulumi:x::posthorn::posthorn:index:Machine$libvirt:index/volume:Volume::maildrop-oak-data"
    state = {"deployment": {"resources": [{"urn": urn, "protect": True}, {"urn": "urn:x::smtp-in-oak-system"}]}}
    asked: list[tuple[str, ...]] = []

    def run(self: running.Project, *arguments: str, text: str | None = None) -> str:
        asked.append(arguments)
        return json.dumps(state)

    monkeypatch.setattr(running.Project, "run", run)
    assert main(["unprotect", "x", "--name", "maildrop-oak-data"]) == 0
    assert asked[-1] == ("state", "unprotect", urn, "--yes")
    assert main(["unprotect", "x", "--name", "smtp-in-oak-system"]) == 1
    assert "protected: maildrop-oak-data" in " ".join(capsys.readouterr().out.split())


def test_an_operator_goes_to_a_host_with_the_pinned_key_alone(keyed_stack: Stack) -> None:
    words = ssh.command(keyed_stack, "smtp-in-oak", "postqueue -p")
    key = " ".join(keyed_stack.all_hosts["smtp-in-oak"].host_key(keyed_stack.keys).split()[:2])
    assert f"KnownHostsCommand=/bin/echo %H {key}" in words and "UserKnownHostsFile=none" in words
    assert words[-2:] == ["root@198.18.1.11", "postqueue -p"]
    assert f"smtp-in-oak,198.18.1.11 {key}" in list(ssh.known_hosts(keyed_stack))
    with pytest.raises(running.OperatorError, match="no such host"):
        ssh.command(keyed_stack, "smtp-in-oat")
