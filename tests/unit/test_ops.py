"""What an operator is told before anything is touched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
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
from ops.__main__ import _console, main
from ops.render import left_out, render_stack
from services.dovecot import is_hash_of
from tests.unit.conftest import LAB


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "Pulumi.x.yaml").write_text(LAB.read_text())
    monkeypatch.setenv("POSTHORN_PROJECT", str(tmp_path))
    monkeypatch.setenv("PULUMI_BACKEND_URL", f"file://{tmp_path}")
    monkeypatch.setenv("PULUMI_CONFIG_PASSPHRASE", "")
    yield tmp_path


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "PULUMI_BACKEND_URL is not set: say where Pulumi keeps its state"),
        ({}, "PULUMI_CONFIG_PASSPHRASE_FILE is not set: say which file has the passphrase"),
        ({}, "step 4"),
        (
            {"PULUMI_BACKEND_URL": "file:///srv/it is not there"},
            "there is no such folder. Make it once: mkdir -p -m 700 '/srv/it is not there'",
        ),
        ({"PULUMI_BACKEND_URL": "file://~/it-is-not-there"}, "it-is-not-there'"),
        ({"PULUMI_CONFIG_PASSPHRASE_FILE": "/it/is/not/there"}, "cannot be read: No such file or directory"),
        ({"PULUMI_CONFIG_PASSPHRASE_FILE": "/dev/null"}, "the file is empty, write a passphrase into it"),
    ],
)
def test_a_missing_back_end_or_passphrase_is_told_with_the_way_to_it_before_pulumi_is_asked(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    said: str,
) -> None:
    for name in [name for name in os.environ if name.startswith("PULUMI_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=AssertionError("Pulumi was asked")))
    assert main(["keys", "x"]) == 1
    assert said in capsys.readouterr().out


def test_a_back_end_is_taken_in_each_way_that_pulumi_knows(tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_text(json.dumps({"current": f"file://{tmp_path}"}))
    (tmp_path / "passphrase").write_text("secret\n")
    file = {"PULUMI_CONFIG_PASSPHRASE_FILE": str(tmp_path / "passphrase")}
    for variables in (
        {"PULUMI_BACKEND_URL": f"file://{tmp_path}", **file},
        {"PULUMI_BACKEND_URL": f"file://{tmp_path}", "PULUMI_CONFIG_PASSPHRASE": ""},
        {"PULUMI_BACKEND_URL": "s3://bucket", **file},
        {"PULUMI_BACKEND_URL": "https://api.pulumi.com"},
        {"PULUMI_CREDENTIALS_PATH": str(tmp_path), **file},
        {"PULUMI_ACCESS_TOKEN": "pul-1"},
    ):
        assert not list(running.back_end_problems(variables))
    # What pulumi login chose goes before Pulumi's own service.
    logged_in = {"PULUMI_CREDENTIALS_PATH": str(tmp_path), "PULUMI_ACCESS_TOKEN": "pul-1"}
    assert "PULUMI_CONFIG_PASSPHRASE_FILE is not set" in "".join(running.back_end_problems(logged_in))


@pytest.mark.parametrize(
    ("line", "is_asked_for"),
    [
        ("secretsprovider: awskms://alias/posthorn?region=eu-central-1\n", False),
        ('secretsprovider: "hashivault://key" # since May\n', False),
        ("secretsprovider: passphrase\n", True),
        ("secretsprovider:\n", True),
        ("", True),
    ],
)
def test_a_passphrase_is_asked_for_unless_the_stack_file_names_what_encrypts_its_secrets(
    project: Path, monkeypatch: pytest.MonkeyPatch, line: str, is_asked_for: bool
) -> None:
    monkeypatch.delenv("PULUMI_CONFIG_PASSPHRASE")
    monkeypatch.delenv("PULUMI_CONFIG_PASSPHRASE_FILE", raising=False)
    (project / "Pulumi.x.yaml").write_text(line + LAB.read_text())
    told = contextlib.nullcontext() if not is_asked_for else pytest.raises(running.OperatorError, match="PASSPHRASE")
    with told:
        running.Project.of("x").command("preview")


def test_a_wrong_stack_file_ends_in_one_message(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = yaml.safe_load((project / "Pulumi.x.yaml").read_text())
    document["config"]["posthorn:hosts"]["smtp-in-oak"]["site"] = "elm"
    (project / "Pulumi.x.yaml").write_text(yaml.dump(document))
    assert main(["render", "x", "--out", str(project / "out")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "is not valid, nothing was changed" in said
    assert "hosts.smtp-in-oak: a host is named role-site: its name must end in -elm" in said
    assert not (project / "out").exists()


@pytest.mark.parametrize("words", [("down", "--without=elm", "--yes"), ("refresh", "--adopt=hill.example/MX")])
def test_a_command_refuses_a_word_that_it_does_not_go_by(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=AssertionError("Pulumi was asked")))
    command, *flags = words
    assert main([command, "x", *flags]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"make {command} does not go by it" in said


@pytest.mark.parametrize(
    ("stack", "key", "secret", "said"),
    [
        ("x", "posthorn", "c2VjcmV0", "KEY=posthorn: no server under dns.servers takes updates by such a key"),
        ("x", "posthorn-lab", "hunter2", "that is no secret of a TSIG key"),
        ("x", "posthorn-lab", "", "that is no secret of a TSIG key"),
        ("x", "posthorn-lab", "schlüssel", "that is no secret of a TSIG key"),
        ("y", "posthorn-lab", "c2VjcmV0", "there is no such file"),
    ],
)
def test_a_tsig_secret_that_could_never_be_used_is_not_stored(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stack: str,
    key: str,
    secret: str,
    said: str,
) -> None:
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=AssertionError("Pulumi was asked")))
    monkeypatch.setattr("sys.stdin", io.StringIO(secret + "\n"))
    assert main(["tsig", stack, "--key", key]) == 1
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_tsig_key_is_stored_by_the_name_that_the_stack_knows_it_by(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Mock(return_value=subprocess.CompletedProcess([], 0, "", ""))
    monkeypatch.setattr(subprocess, "run", done)
    monkeypatch.setattr("sys.stdin", io.StringIO("c2VjcmV0\n"))
    assert main(["tsig", "x", "--key", "Posthorn-Lab."]) == 0
    assert json.loads(done.call_args.kwargs["input"])["tsig"] == {"posthorn-lab": "c2VjcmV0"}


def test_a_stack_that_is_not_there_is_said_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "y"]) == 1
    assert "there is no such file" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "status"), [(["one", "one"], 0), (["one", "two"], 1), (["", ""], 1)])
def test_a_password_is_asked_for_twice(
    typed: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter(typed)
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    assert main(["password"]) == status
    assert capsys.readouterr().out.startswith("{ARGON2ID}$argon2id$v=19$m=19456,t=2,p=1$") == (status == 0)


def test_rendering_marks_every_secret_and_writes_every_zone(stack: Stack, tmp_path: Path) -> None:
    render_stack(stack, tmp_path / "out")
    assert (tmp_path / "out/hosts/smtp-in-oak/etc/posthorn/tls/host.key").read_text() == "SECRET tls-key\n"
    zones = {path.name.removesuffix(".zone") for path in (tmp_path / "out/zones").iterdir()}
    assert zones == set(stack.dns.zones)


def test_a_rendering_without_keys_says_which_records_it_lacks_and_one_with_keys_says_nothing(
    stack: Stack, keyed_stack: Stack
) -> None:
    said = left_out(stack)
    assert "DKIM and TLSA records are left out" in said and f"make keys STACK={stack.name}" in said
    assert left_out(keyed_stack) == ""


def test_rendering_leaves_a_folder_alone_that_holds_other_things(project: Path, stack: Stack) -> None:
    (project / "out").mkdir()
    (project / "out" / "letter").write_text("dear")
    with pytest.raises(FileExistsError):
        render_stack(stack, project / "out")


def test_only_a_site_that_there_is_can_be_left_out(stack: Stack) -> None:
    with pytest.raises(running.OperatorError, match="the stack has no such site"):
        running.excluded(stack, ["elk"])


@pytest.mark.parametrize(("columns", "is_terminal", "width"), [(None, False, 200), ("120", False, 120)])
def test_what_goes_into_a_mail_is_not_folded(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, is_terminal: bool, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns or "")
    assert _console(columns, is_terminal=is_terminal).width == width


def test_a_host_is_pushed_to_again_by_word(stack: Stack) -> None:
    wanted = ["--replace=**::smtp-in-ash-secrets", "--replace=**::smtp-in-ash-files"]
    assert running.pushed_again(stack, ["smtp-in-ash"], ["elm"]) == wanted
    with pytest.raises(running.OperatorError, match="PUSH=smtp-in-ask: the stack has no such host"):
        running.pushed_again(stack, ["smtp-in-ask"], [])
    with pytest.raises(running.OperatorError, match=r"PUSH=smtp-in-ash: its site is left out \(WITHOUT=ash\)"):
        running.pushed_again(stack, ["smtp-in-ash"], ["ash"])


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


@pytest.mark.parametrize(
    ("held", "problems"),
    [("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJ me", 0), ("", 1)],
)
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
        "maildrop-oak, maildrop-elm, smtp-in-ash would be made anew in one run for another Debian:"
        " one at a time (docs/upgrade-12-to-13.md)"
    ]
    assert running.anew_at_once(parse("lab", "f", config), {"deployment": None}) == []


def test_a_data_disk_that_will_not_grow_by_itself_is_told_with_the_way_to_do_it(keyed_config: dict[str, Any]) -> None:
    config = json.loads(json.dumps(keyed_config))
    sizes = {"smtp-in-oak": 4, "smtp-in-elm": 1, "smtp-out-oak": 8}
    resources = [{"urn": f"urn::{host}-data", "outputs": {"size": 4.0 * 2**30}} for host in sizes]
    for host, size in sizes.items():
        config["hosts"][host]["machine"]["data_disk"] = size
    said = sorted(running.disks_as_they_were(parse("lab", "f", config), {"deployment": {"resources": resources}}))
    assert said == [
        "the data disk of smtp-in-elm has 4 GiB and stays so, though machine.data_disk says 1: a disk is never made"
        " smaller",
        "the data disk of smtp-out-oak has 4 GiB and stays so, though machine.data_disk says 8: to grow it,"
        " virsh blockresize smtp-out-oak vdb 8G on its hypervisor, then resize2fs /dev/vdb on smtp-out-oak,"
        " then make refresh STACK=lab",
    ]


@pytest.mark.parametrize("backend", ["file:///backend", None])
def test_what_a_killed_run_left_is_found_whatever_chose_the_back_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    def process(pid: int, name: str, parent: int, **variables: str | None) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "comm").write_text(f"{name}\n")
        (folder / "stat").write_text(f"{pid} ({name}) S {parent} 0")
        lines = [f"{key}={value}" for key, value in variables.items() if value is not None]
        (folder / "environ").write_text("\0".join([*lines, ""]))

    monkeypatch.setenv("PULUMI_HOME", "/home")
    monkeypatch.delenv("PULUMI_BACKEND_URL", raising=False)
    if backend:
        monkeypatch.setenv("PULUMI_BACKEND_URL", backend)
    process(10, "pulumi-resource", 1, PULUMI_HOME="/home", PULUMI_BACKEND_URL=backend)
    process(11, "pulumi-resource", 99, PULUMI_HOME="/home", PULUMI_BACKEND_URL=backend)
    process(12, "pulumi-resource", 1, PULUMI_HOME="/elsewhere", PULUMI_BACKEND_URL=backend)
    process(13, "pulumi-resource", 1, PULUMI_HOME="/home", PULUMI_BACKEND_URL="file:///other")
    process(14, "postfix", 1, PULUMI_HOME="/home", PULUMI_BACKEND_URL=backend)
    assert list(running.orphans(tmp_path)) == [(10, "pulumi-resource")]


def test_a_password_is_hashed_whole_however_long_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    password = "ü" * 100
    monkeypatch.setattr("sys.stdin", io.StringIO(password + "\n"))
    assert main(["password"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"\{ARGON2ID\}\$argon2id\$v=19\$m=19456,t=2,p=1\$[+/A-Za-z0-9]{22}\$[+/A-Za-z0-9]{43}\n", said)
    assert is_hash_of(said.strip(), password)
    assert not is_hash_of(said.strip(), password[:-1]) and not is_hash_of("{BLF-CRYPT}!", password)


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


def test_a_preview_shows_the_lines_that_change_and_where_they_are_and_nothing_else() -> None:
    shown = """\
Previewing update (x):
  pulumi:pulumi:Stack: (same)
    [urn=urn:pulumi:x::posthorn::pulumi:pulumi:Stack::posthorn-x]
    ~ command:remote:Command: (update)
        [id=command]
        [urn=urn:pulumi:x::posthorn::Platform$command:remote:Command::smtp-in-oak-files]
      \x1b[33m~ stdin: (json) {\x1b[0m
            agent      : "Brings a host to what a bundle says."
          ~ files      : {
              ~ /etc/postfix/virtual: {
                  ~ content:\x20
                        ben@hill.example ben@inside.example
                      + garden@hill.example ben@inside.example
                        ...
                    mode   : "0644"

                }
                /etc/postfix/transport: {
                    content: "inside.example maildrop:"
                }
            }
          ~ secrets    : {
              ~ /etc/dovecot/logins: {
                  ~ version: "1" => "2"
                }
            }
        }
Resources:
    ~ 1 to update
    181 unchanged
Diagnostics:
  pulumi:pulumi:Stack (posthorn-x):
    error: Program failed with an unhandled exception:
            deep below
"""
    lines = [line.strip() for line in running.changed_lines(shown.splitlines(keepends=True))]
    assert lines == [
        "Previewing update (x):",
        "pulumi:pulumi:Stack: (same)",
        "[urn=urn:pulumi:x::posthorn::pulumi:pulumi:Stack::posthorn-x]",
        "~ command:remote:Command: (update)",
        "[urn=urn:pulumi:x::posthorn::Platform$command:remote:Command::smtp-in-oak-files]",
        "\x1b[33m~ stdin: (json) {\x1b[0m",
        "~ files      : {",
        "~ /etc/postfix/virtual: {",
        "~ content:",
        "ben@hill.example ben@inside.example",
        "+ garden@hill.example ben@inside.example",
        "...",
        "~ secrets    : {",
        "~ /etc/dovecot/logins: {",
        '~ version: "1" => "2"',
        "Resources:",
        "~ 1 to update",
        "181 unchanged",
        "Diagnostics:",
        "pulumi:pulumi:Stack (posthorn-x):",
        "error: Program failed with an unhandled exception:",
        "deep below",
    ]
