"""The libvirt way: two hosts of the stack as virtual machines at two sites, made, proved, and removed.

The others are containers, so that the whole service is there: a mail that is proved passes through both machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lab import faults, up, vms
from lab.state import FOLDER, RELEASE, State, load, namespace
from tests.lab.conftest import Lab
from tests.lab.steps import eventually, id_of, in_mailbox, mail

VIRTUAL = ("maildrop-oak", "smtp-in-elm")


@pytest.fixture(scope="module")
def state() -> Iterator[State]:
    console = Console(highlight=False, width=160)
    up.down(console)
    try:
        up.up(console, "vms", virtual=VIRTUAL, release=RELEASE)
        yield load()
    finally:
        up.down(console)


def ops(state: State, *arguments: str) -> str:
    done = Lab(state).ops(*arguments)
    assert done.returncode == 0, done.stdout
    return str(done.stdout)


def test_the_proof_went_through_two_virtual_machines_at_two_sites(state: State) -> None:
    assert vms.states(state) == dict.fromkeys(VIRTUAL, "running")


def test_a_second_up_changes_nothing(state: State) -> None:
    printed = ops(state, "up", "lab-vms", "--yes")
    assert not [line for line in printed.splitlines() if line.strip().startswith(("+ ", "~ ", "- "))]


def test_a_refresh_finds_nothing_changed(state: State) -> None:
    printed = ops(state, "refresh", "lab-vms", "--yes")
    assert " unchanged" in printed and "updated" not in printed


def test_a_hypervisor_that_is_cut_off_is_named_and_the_other_sites_go_on_without_it(state: State) -> None:
    faults.fail(state, "site", "elm", black_hole=True)
    try:
        refused = Lab(state).ops("up", "lab-vms", "--yes")
        assert refused.returncode == 1 and "Traceback" not in refused.stdout
        assert "the hypervisor of site elm does not answer at 198.19.0.2 port 22" in refused.stdout
        assert "WITHOUT=elm" in refused.stdout
        ops(state, "up", "lab-vms", "--yes", "--without", "elm")
    finally:
        faults.heal(state, "site", "elm")


def test_a_machine_is_upgraded_and_the_mail_in_its_queue_comes_from_the_new_one(state: State) -> None:
    lab, host = Lab(state), "smtp-in-elm"
    text = mail(to="ann@hill.example").removesuffix(".\r\n")
    lab.run(host, "systemctl", "stop", "postfix@-")
    assert lab.run(host, "sendmail", "-f", "bob@far.example", "ann@hill.example", text=text).returncode == 0
    up.reinstall(state, host, 13)
    printed = ops(state, "up", "lab-vms", "--yes")
    assert f"{host}-data" not in printed, "the disk that is kept is left alone"
    assert lab.run(host, "sh", "-c", ". /etc/os-release; echo $VERSION_ID").stdout.strip() == "13"
    assert in_mailbox(lab, "ann", id_of(text))


def test_dovecot_goes_with_the_disk_of_the_mail_and_comes_back_with_it(state: State) -> None:
    lab, host = Lab(state), "maildrop-oak"

    def dovecot() -> str:
        return lab.run(host, "systemctl", "is-active", "dovecot").stdout.strip()

    lab.run(host, "umount", "--lazy", "/var/vmail")
    eventually(lambda: dovecot() == "inactive")
    assert lab.run(host, "mount", "--bind", "/data/var/vmail", "/var/vmail").returncode == 0
    eventually(lambda: dovecot() == "active")


def test_machines_are_switched_off_site_by_site_and_a_data_disk_is_left_as_it_is(state: State) -> None:
    def larger(config: dict[str, Any]) -> None:
        for host in VIRTUAL:
            config["hosts"][host]["machine"] |= {"memory": 640, "data_disk": 2}

    Lab(state).change(larger)
    printed = ops(state, "up", "lab-vms", "--yes")
    assert "the data disk of smtp-in-elm has 1 GiB and stays so, though machine.data_disk says 2" in printed
    assert "was not shut down cleanly" not in printed
    lines = printed.splitlines()
    # Mailbox hosts come before all others.
    served = next(index for index, line in enumerate(lines) if "maildrop-oak-files created" in line)
    switched_off = next(index for index, line in enumerate(lines) if "Domain smtp-in-elm " in line)
    assert served < switched_off
    assert vms.states(state) == dict.fromkeys(VIRTUAL, "running")


def test_down_removes_the_machines_keeps_their_data_and_says_how_to_remove_it(state: State) -> None:
    printed = ops(state, "down", "lab-vms", "--yes")
    assert vms.states(state) == {}
    for host in VIRTUAL:
        site = host.rpartition("-")[2]
        assert (FOLDER / "hypervisors" / site / "pool" / f"{host}-data").exists()
        assert f"make unprotect STACK=lab-vms NAME={host}-data" in printed


def test_after_lab_down_nothing_is_left(state: State) -> None:
    up.down(Console(width=160))
    assert not FOLDER.exists()
    assert not list(Path("/run/netns").glob(namespace("*")))
    assert namespace("") not in Path("/proc/mounts").read_text()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        assert b"qemu-system" not in command or str(FOLDER).encode() not in command
