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


def nothing_is_left() -> bool:
    namespaces = any(Path("/run/netns").glob(namespace("*")))
    mounts = namespace("") in Path("/proc/mounts").read_text()
    return not (FOLDER.exists() or containers.running() or namespaces or mounts)


def alive(processes: list[int]) -> list[int]:
    """Those that still run; one that ended and was not yet waited for does not."""
    stats = (Path(f"/proc/{process}/stat") for process in processes)
    return [int(s.parent.name) for s in stats if s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z"]


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
    lived = [*network.processes(), *up.agents()]
    assert len(up.agents()) == 1
    up.down(console)
    assert nothing_is_left() and not alive(lived)


def test_a_lab_whose_start_was_cut_half_way_is_removed() -> None:
    console = Console(width=120)
    from lab.state import load_or_make, stack

    load_or_make("containers")
    network.build(stack(), list(stack().hosts)[:2])
    assert not nothing_is_left()
    up.down(console)
    assert nothing_is_left()
