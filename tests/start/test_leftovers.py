"""A lab that died is recognised and removed, and so is all that a lab leaves."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console

from lab import containers, network, up
from lab.state import FOLDER, load, namespace


def processes_in_the_lab() -> list[str]:
    inodes = {path.stat().st_ino for path in Path("/run/netns").glob(namespace("*"))}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/net").stat().st_ino in inodes:
                found.append(process.name)
        except OSError:
            continue
    return found


def nothing_is_left() -> bool:
    namespaces = any(Path("/run/netns").glob(namespace("*")))
    mounts = namespace("") in Path("/proc/mounts").read_text()
    return not (FOLDER.exists() or containers.running() or namespaces or mounts)


@pytest.fixture(autouse=True)
def no_lab() -> None:
    """The tests' own lab, of an earlier run that was cut or left for a look, is theirs to remove."""
    up.down(Console(width=120))


@pytest.mark.parametrize("state_is_lost", [False, True])
def test_a_lab_starts_where_a_former_one_died(state_is_lost: bool) -> None:
    console = Console(width=120)
    up.up(console, "containers", only_infrastructure=True)
    state = load()
    # Half of it is killed, some of it lives on; with its state lost nobody knows what it was.
    leader = containers.leader(state, "internet")
    assert leader is not None
    os.kill(leader, signal.SIGKILL)
    if state_is_lost:
        shutil.rmtree(FOLDER)
    up.up(console, "containers", only_infrastructure=True)
    assert containers.leader(load(), "internet") is not None
    up.down(console)
    assert nothing_is_left() and not processes_in_the_lab()


def test_a_lab_whose_start_was_cut_half_way_is_removed() -> None:
    console = Console(width=120)
    from lab.state import load_or_make, stack

    load_or_make("containers")
    network.build(stack(), list(stack().hosts)[:2])
    assert not nothing_is_left()
    up.down(console)
    assert nothing_is_left() and not processes_in_the_lab()
