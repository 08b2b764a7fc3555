"""What the agent does on a host, where that needs neither root nor a host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent import agent


class Disk:
    """A folder whose owners are remembered here, since a test may not give files away."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.owners = folder, dict[str, tuple[int, int]]()
        self.changes_left = 10**9
        monkeypatch.setattr(os, "lstat", self._lstat)
        monkeypatch.setattr(os, "lchown", self._lchown)
        monkeypatch.setattr(os, "fchown", lambda *_: None)

    def file(self, name: str, user: int, group: int) -> None:
        (self.folder / name).write_text(name)
        self.owners[str(self.folder / name)] = user, group

    def of(self, name: str) -> tuple[int, int]:
        return self.owners[str(self.folder / name)]

    def _lstat(self, path: str) -> Any:
        user, group = self.owners.get(str(path), (0, 0))
        return os.stat_result((0, 0, 0, 0, user, group, 0, 0, 0, 0))

    def _lchown(self, path: str, user: int, group: int) -> None:
        if not self.changes_left:
            raise InterruptedError("the power is gone")
        self.changes_left -= 1
        self.owners[str(path)] = user, group


BEFORE = {"users": {"root": 0, "postfix": 107, "redis": 105}, "groups": {"root": 0, "postfix": 110, "redis": 104}}
AFTER = {"users": {"root": 0, "postfix": 105, "redis": 107}, "groups": {"root": 0, "postfix": 108, "redis": 104}}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk that was in use before the installation."""
    disk = Disk(tmp_path, monkeypatch)
    agent.give_back([str(tmp_path)], BEFORE)
    disk.file("queued", 107, 110)
    disk.file("learnt", 105, 104)
    disk.file("stranger", 4711, 4711)
    return disk


def is_right(disk: Disk) -> bool:
    return (disk.of("queued"), disk.of("learnt"), disk.of("stranger")) == ((105, 108), (107, 104), (4711, 4711))


def test_a_disk_that_outlived_an_installation_is_given_back_to_its_owners(disk: Disk) -> None:
    agent.give_back([str(disk.folder)], AFTER)
    assert is_right(disk)
    assert json.loads((disk.folder / ".owners").read_text()) == AFTER


@pytest.mark.parametrize("done", range(4))
def test_a_run_that_is_cut_while_files_change_hands_is_finished_by_the_next(disk: Disk, done: int) -> None:
    disk.changes_left = done
    with pytest.raises(InterruptedError):
        agent.give_back([str(disk.folder)], AFTER)
    disk.changes_left = 10**9
    agent.give_back([str(disk.folder)], AFTER)
    assert is_right(disk)


def test_where_no_number_changed_nothing_is_touched(disk: Disk) -> None:
    disk.changes_left = 0
    agent.give_back([str(disk.folder)], BEFORE)


def test_a_folder_that_is_new_has_the_numbers_of_its_owners_from_the_start(disk: Disk) -> None:
    agent.give_back([str(disk.folder / "new")], BEFORE)
    assert json.loads((disk.folder / "new" / ".owners").read_text()) == BEFORE
