"""The cache of the lab's images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab import image, up
from lab.__main__ import main

DAY = 86400.0


def test_an_image_that_no_lab_was_started_from_for_a_month_is_removed(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    for name, days in (("debian-12-old", 31), ("debian-12-used", 2), ("vm-old", 40)):
        (tmp_path / name / "root").mkdir(parents=True)
        os.utime(tmp_path / name, (now - days * DAY,) * 2)
    (tmp_path / "debian-12-old.lock").touch()
    os.utime(tmp_path / "debian-12-old.lock", (now - 31 * DAY,) * 2)
    removed = [path.name for path in image.forget(tmp_path, now)]
    assert removed == ["debian-12-old", "debian-12-old.lock", "vm-old"]
    assert [path.name for path in tmp_path.iterdir()] == ["debian-12-used"]


def test_starting_a_lab_keeps_its_image(tmp_path: Path) -> None:
    used = tmp_path / "debian-12-x"
    used.mkdir()
    os.utime(used, (0, 0))
    image.note_use(used)
    assert not image.forget(tmp_path, used.stat().st_mtime + DAY) and used.exists()


def test_the_lab_s_files_can_be_read_by_daemons_whatever_the_operator_s_umask_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(up, "status", lambda console: (tmp_path / "file").touch())
    before = os.umask(0o077)
    try:
        assert main(["status"]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
