"""What a machine is told before anything is put on it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

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
    with pytest.raises(setup.SetupFailed, match="are missing: apt-get install libvirt-clients xsltproc"):
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
