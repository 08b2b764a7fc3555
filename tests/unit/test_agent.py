"""What the agent does on a host, where that needs neither root nor a host."""

from __future__ import annotations

import errno
import fcntl
import grp
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
        monkeypatch.setattr(os, "chown", self._chown)
        monkeypatch.setattr(os, "fchown", lambda *_: None)

    def file(self, name: str, user: int, group: int) -> None:
        (self.folder / name).write_text(name)
        self.owners[str(self.folder / name)] = user, group

    def of(self, name: str) -> tuple[int, int]:
        return self.owners[str(self.folder / name)]

    def _lstat(self, name: str, *, dir_fd: int) -> Any:
        user, group = self.owners.get(self._path(name, dir_fd), (0, 0))
        return os.stat_result((0, 0, 0, 0, user, group, 0, 0, 0, 0))

    def _chown(self, name: str, user: int, group: int, *, dir_fd: int, follow_symlinks: bool) -> None:
        assert not follow_symlinks
        if not self.changes_left:
            raise InterruptedError("the power is gone")
        self.changes_left -= 1
        self.owners[self._path(name, dir_fd)] = user, group

    @staticmethod
    def _path(name: str, folder: int) -> str:
        return os.path.normpath(os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name))


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


# A host that is a folder, with a systemd that is a table


class Host:
    """A host with ``files``, and with units that do as systemctl(1) says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.units: dict[str, dict[str, str]] = {}
        self.commands: list[str] = []
        self.is_full_for: Callable[[Path], bool] = lambda path: False
        (folder / "units").mkdir()
        monkeypatch.setattr(agent, "HOME", folder / "home")
        monkeypatch.setattr(agent, "UNIT_FOLDER", f"{folder}/units/")
        monkeypatch.setattr(agent, "run", self._run)
        monkeypatch.delenv("SSH_CONNECTION", raising=False)
        monkeypatch.setattr(agent, "install_packages", lambda *_: 0)
        monkeypatch.setattr(agent, "give_back", lambda *_: None)
        monkeypatch.setattr(agent, "of_replaced_programs", set)
        monkeypatch.setattr(os, "fchown", lambda *_: None)
        self._write = agent.write
        monkeypatch.setattr(agent, "write", self._write_or_refuse)

    def path(self, name: str) -> Path:
        return self.folder / name

    def text(self, name: str) -> str:
        return self.path(name).read_text()

    def bundle(self, files: dict[str, str], units: dict[str, list[str]], **more: Any) -> dict[str, Any]:
        """A bundle with files by name, and units by the names of files whose change restarts them."""
        owner, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
        empty: dict[str, Any] = {"packages": [], "replaces": [], "users": {}, "directories": {}, "secrets": {}}
        empty |= {
            "agent": "",
            "ssh_from": ["192.0.2.0/24"],
            "compile": [],
            "checks": [],
            "masked": [],
            "kept": [],
            "health": [],
            "health_seconds": 0,
        }
        return {
            "host": "here",
            **empty,
            "files": {
                str(self.path(name)): {"content": text, "mode": "0644", "owner": owner, "group": group}
                for name, text in files.items()
            },
            "units": {
                unit: {
                    "service": unit.partition(".")[0],
                    "restart_on": [str(self.path(name)) for name in names],
                    "reload_on": [],
                }
                for unit, names in units.items()
            },
            **more,
        }

    def _write_or_refuse(self, path: Path, *rest: Any) -> None:
        if self.is_full_for(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self._write(path, *rest)
        if path.parent == self.folder / "units" and path.name in self.units:
            self.units[path.name]["NeedDaemonReload"] = "yes"

    def _run(self, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        said = ""
        if command[:2] == ("systemctl", "show"):
            asked = command[command.index("--") + 1 :]
            said = "\n\n".join("\n".join(f"{k}={v}" for k, v in self._state(unit).items()) for unit in asked)
        elif command[0] == "systemctl":
            words = [word for word in command[1:] if not word.startswith("--")]
            self.commands.append(" ".join(words))
            self._do(words[0], words[1:], now="--now" in command)
            if "--no-reload" in command:
                for state in self.units.values():
                    state["NeedDaemonReload"] = "yes"
        return subprocess.CompletedProcess(command, 0, said, "")

    def _state(self, unit: str) -> dict[str, str]:
        fresh = {"Id": unit, "ActiveState": "inactive", "UnitFileState": "disabled", "NeedDaemonReload": "no"}
        return self.units.setdefault(unit, fresh)

    def _do(self, verb: str, units: list[str], *, now: bool) -> None:
        if verb == "daemon-reload":
            units = list(self.units)
        for unit in units:
            state = self._state(unit)
            if verb == "daemon-reload":
                state["NeedDaemonReload"] = "no"
            if verb in ("start", "restart") and state["UnitFileState"] != "masked":
                state["ActiveState"] = "active"
            if verb in ("enable", "disable", "mask"):
                state["UnitFileState"] = f"{verb}d" if verb != "mask" else "masked"
            if verb == "unmask":
                state["UnitFileState"] = "disabled"
            if verb == "stop" or (verb == "disable" and now):
                state["ActiveState"] = "inactive"


class Cut(BaseException):
    """The agent is killed."""


def cut(*_: Any) -> Any:
    raise Cut


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def refusal(bundle: dict[str, Any]) -> str:
    """What the agent says of a bundle that it cannot apply."""
    with pytest.raises(agent.Failed) as failure:
        agent.apply(bundle)
    return str(failure.value)


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], str | None]) -> list[dict[str, Any]]:
    """The transaction of a service named nginx, with what it answers."""
    monkeypatch.setitem(agent.PROBES, "test", lambda probe: answer())
    return [{"service": "nginx", "kind": "test"}]


def test_what_starts_others_is_started_after_what_these_wait_for(host: Host) -> None:
    agent.apply(host.bundle({"a": "x"}, {"certificate.timer": ["a"], "learn.path": ["a"], "unbound.service": ["a"]}))
    assert "start unbound.service certificate.timer learn.path" in host.commands


def test_no_unit_waits_for_systemd_after_the_first_push(host: Host) -> None:
    agent.apply(host.bundle({"a": "x"}, {"nginx.service": ["a"], "unbound.service": ["a"]}))
    assert {state["NeedDaemonReload"] for state in host.units.values()} == {"no"}
    assert host.units["nginx.service"]["UnitFileState"] == "enabled"


def test_a_disk_that_is_full_in_the_middle_of_a_change_leaves_the_old_files(host: Host) -> None:
    units = {"nginx.service": ["a", "b"]}
    agent.apply(host.bundle({"a": "old", "b": "old"}, units))
    host.is_full_for = lambda path: path == host.path("b") and host.text("a") == "new"
    said = refusal(host.bundle({"a": "new", "b": "new"}, units))
    assert (host.text("a"), host.text("b")) == ("old", "old")
    assert f"No space left on device: '{host.path('b')}'" in said


def test_a_file_that_cannot_be_put_back_is_named_and_the_others_are_put_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = {"nginx.service": ["a", "b", "c"]}
    agent.apply(host.bundle({"a": "old", "b": "old", "c": "old"}, units))
    replace = os.replace

    def broken(source: Path, target: Path) -> None:
        # It takes two files, and then neither the third nor the first again.
        if target.name == "c" or (target.name == "a" and host.text("a") == "new"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    said = refusal(host.bundle({"a": "new", "b": "new", "c": "new"}, units))
    assert host.text("b") == "old"
    _, _, undone = said.partition("\n")
    assert undone.startswith("Not all files could be put back: ") and f"'{host.path('a')}'" in undone
    # It runs with its former files, and might not come up again with a part of them.
    assert host.commands[-1] == "start nginx.service"
    monkeypatch.setattr(os, "replace", replace)
    agent.apply(host.bundle({"a": "old", "b": "old", "c": "old"}, units))
    assert host.text("a") == "old" and host.commands[-1] == "restart nginx.service"


def test_a_service_that_answers_nonsense_is_not_well_and_its_files_are_put_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.apply(host.bundle({"a": "old"}, {"nginx.service": ["a"]}))
    health = answering(monkeypatch, lambda: b"\xff".decode())
    said = refusal(host.bundle({"a": "new"}, {"nginx.service": ["a"]}, health=health))
    assert host.text("a") == "old"
    assert said.startswith("nginx: test: 'utf-8' codec can't decode")


def test_an_error_that_nobody_thought_of_puts_the_files_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(change: Any) -> None:
        raise KeyError("what")

    agent.apply(host.bundle({"a": "old"}, {"nginx.service": ["a"]}))
    monkeypatch.setattr(agent, "_steady", broken)
    said = refusal(host.bundle({"a": "new"}, {"nginx.service": ["a"]}))
    assert host.text("a") == "old"
    assert said.startswith("KeyError: 'what'\n")


def test_an_error_of_the_system_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent, "HOME", tmp_path / "file" / "home")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        agent.main({"host": "here"})
    assert capsys.readouterr().err.startswith("here: [Errno 20] Not a directory: ")


def test_a_full_disk_names_the_file_that_it_did_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(os, "fsync", full)
    where = next(folder for folder in tmp_path.parents if os.path.ismount(folder))
    said = f"No space left on device (file system {where}): '{tmp_path / 'a'}'"
    with pytest.raises(OSError, match=re.escape(said)):
        agent.write(tmp_path / "a", b"new", 0o644, 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_change_that_fails_brings_back_what_it_retired_and_masked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    both: dict[str, list[str]] = {"nginx.service": ["a"], "webmail.service": []}
    agent.apply(host.bundle({"a": "old"}, both))
    host.units["apache.service"] = {"ActiveState": "active", "UnitFileState": "enabled"}
    host.units["idle.service"] = {"ActiveState": "inactive", "UnitFileState": "disabled"}
    before = {name: dict(state) for name, state in host.units.items()}
    ill = answering(monkeypatch, lambda: "ill")
    one = host.bundle({"a": "new"}, {"nginx.service": ["a"]}, masked=["apache.service", "idle.service"], health=ill)
    assert refusal(one) == "nginx: test: ill\nThe files were put back, and the services run with them as before."
    assert "disable webmail.service" in host.commands and "mask apache.service idle.service" in host.commands
    assert host.units == before


def test_a_unit_that_does_not_come_back_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.apply(host.bundle({"a": "old"}, {"nginx.service": ["a"]}))
    ill = answering(monkeypatch, lambda: host.units["nginx.service"].update(ActiveState="failed") or "ill")
    monkeypatch.setattr(host, "_do", lambda *_, **__: None)
    said = refusal(host.bundle({"a": "new"}, {"nginx.service": ["a"]}, health=ill))
    assert said == "nginx: test: ill\nThe files were put back, but nginx.service did not come back."


def test_a_unit_that_came_with_a_change_that_fails_is_ended_by_the_file_that_describes_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[bool] = []
    do = host._do

    def watched(verb: str, units: list[str], *, now: bool) -> None:
        if verb == "disable":
            there.append(host.path("units/new.service").exists())
        do(verb, units, now=now)

    monkeypatch.setattr(host, "_do", watched)
    ill = answering(monkeypatch, lambda: "ill")
    units: dict[str, list[str]] = {"nginx.service": ["units/new.service"], "new.service": ["units/new.service"]}
    refusal(host.bundle({"units/new.service": "[Unit]"}, units, health=ill))
    assert there == [True] and not host.path("units/new.service").exists()
    assert host.units["new.service"]["ActiveState"] == "inactive"


def test_a_service_that_ran_before_the_first_push_runs_after_it_failed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.units["nginx.service"] = {"ActiveState": "active", "UnitFileState": "enabled"}
    ill = answering(monkeypatch, lambda: "ill")
    refusal(host.bundle({"a": "new"}, {"nginx.service": ["a"]}, health=ill))
    assert host.units["nginx.service"] == {"ActiveState": "active", "UnitFileState": "enabled"}


def test_a_unit_whose_file_is_another_is_linked_where_that_file_says_also_on_the_way_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pushed(target: str, **more: Any) -> dict[str, Any]:
        return host.bundle({"units/nginx.service": f"WantedBy={target}"}, {"nginx.service": ["units/"]}, **more)

    agent.apply(pushed("a.target"))
    assert "reenable nginx.service" not in host.commands, "it was enabled by this very file"
    agent.apply(pushed("b.target"))
    assert host.commands.count("reenable nginx.service") == 1
    assert host.commands[-3:] == ["reenable nginx.service", "daemon-reload", "restart nginx.service"]
    refusal(pushed("c.target", health=answering(monkeypatch, lambda: "ill")))
    assert host.text("units/nginx.service") == "WantedBy=b.target"
    assert host.commands.count("reenable nginx.service") == 3
    assert {state["NeedDaemonReload"] for state in host.units.values()} == {"no"}


def test_a_run_that_was_cut_before_systemd_read_its_units_is_finished_by_the_next(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pushed(text: str) -> dict[str, Any]:
        units: dict[str, list[str]] = {"a.service": ["units/a.service"], "b.service": []}
        return host.bundle({"units/a.service": text, "units/b.service": text}, units)

    agent.apply(pushed("old"))
    with monkeypatch.context() as killed, pytest.raises(Cut):
        killed.setattr(agent, "_units", cut)
        agent.apply(pushed("new"))
    assert agent.difference(pushed("new"))["behind"] == ["a.service", "b.service"]
    host.commands.clear()
    agent.apply(pushed("new"))
    again = ["reenable a.service b.service", "daemon-reload"]
    assert host.commands == [*again, *again, "restart a.service"]
    host.commands.clear()
    agent.apply(pushed("new"))
    assert host.commands == []


def test_a_file_that_a_cut_run_wrote_is_removed_when_the_next_bundle_has_it_no_more(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = {"nginx.service": ["a", "b", "c"]}
    with monkeypatch.context() as killed, pytest.raises(Cut):
        killed.setattr(host, "is_full_for", lambda path: path.name == "c" and cut())
        agent.apply(host.bundle({"a": "1", "b": "1", "c": "1"}, units))
    assert host.path("b").exists() and not host.path("c").exists()
    agent.apply(host.bundle({"a": "1"}, units))
    assert host.path("a").exists() and not host.path("b").exists()


def test_a_file_that_was_there_before_a_change_that_failed_stays_when_the_next_does_without_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.path("a").write_text("of the package")
    ill = answering(monkeypatch, lambda: "ill")
    refusal(host.bundle({"a": "new"}, {"nginx.service": ["a"]}, health=ill))
    agent.apply(host.bundle({}, {"nginx.service": []}))
    assert host.text("a") == "of the package"


@pytest.mark.parametrize("client", ["198.51.100.7", "2001:db8::7", "fe80::7%eth0"])
def test_a_push_that_would_lock_its_sender_out_changes_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", f"{client} 40000 192.0.2.1 22")
    said = refusal(host.bundle({"a": "new"}, {"nginx.service": ["a"]}, ssh_from=["192.0.2.0/24", "2001:db8:1::/48"]))
    assert said.startswith(f"this push comes from {client}, which is in no network of access.ssh_from (192.0.2.0/24, ")
    assert not host.path("a").exists() and not host.commands


@pytest.mark.parametrize("connection", ["192.0.2.7 40000 192.0.2.1 22", "2001:db8:1::7 40000 2001:db8:1::1 22", ""])
def test_a_push_whose_sender_may_come_again_is_applied(
    host: Host, monkeypatch: pytest.MonkeyPatch, connection: str
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", connection)
    agent.apply(host.bundle({"a": "new"}, {"nginx.service": ["a"]}, ssh_from=["192.0.2.0/24", "2001:db8:1::/48"]))
    assert host.text("a") == "new"


def test_a_file_that_somebody_changed_is_put_right_and_who_may_have_read_it_reads_it_again(host: Host) -> None:
    wanted = host.bundle({"a": "right", "b": "right"}, {"nginx.service": ["a"], "redis.service": ["b"]})
    agent.apply(wanted)
    host.commands.clear()
    host.path("a").write_text("by hand")
    agent.apply(wanted)
    assert host.text("a") == "right" and host.commands == ["restart nginx.service"]


def test_a_unit_whose_program_was_upgraded_beside_it_is_started_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = host.bundle({"a": "1"}, {"nginx.service": ["a"], "redis.service": []})
    agent.apply(wanted)
    host.commands.clear()
    monkeypatch.setattr(agent, "of_replaced_programs", lambda: {"redis.service", "other.service"})
    agent.apply(wanted)
    assert host.commands == ["restart redis.service"]


def test_a_process_whose_program_was_replaced_is_found(tmp_path: Path) -> None:
    program = tmp_path / "sleep"
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([program, "60"]) as process:
        unit = Path(f"/proc/{process.pid}/cgroup").read_text().strip().rpartition("/")[2]
        os.replace(shutil.copy(program, tmp_path / "new"), program)
        assert unit in agent.of_replaced_programs()
        process.kill()


def test_a_unit_that_an_earlier_push_masked_runs_when_it_is_wanted_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.units["old.service"] = {"ActiveState": "active", "UnitFileState": "enabled"}
    agent.apply(host.bundle({}, {}, masked=["old.service"]))
    assert host.units["old.service"]["UnitFileState"] == "masked"
    ill = answering(monkeypatch, lambda: "ill")
    refusal(host.bundle({}, {"old.service": []}, health=[ill[0] | {"service": "old"}]))
    assert host.units["old.service"]["UnitFileState"] == "masked"
    agent.apply(host.bundle({}, {"old.service": []}))
    assert host.units["old.service"] == {
        "ActiveState": "active",
        "UnitFileState": "enabled",
        "NeedDaemonReload": "no",
    }


def test_a_unit_that_refuses_to_take_its_former_files_up_is_named_and_asked_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bundle(text: str, **more: Any) -> dict[str, Any]:
        unit = {"nginx.service": {"service": "nginx", "restart_on": [], "reload_on": [str(host.path("a"))]}}
        return host.bundle({"a": text}, {}, **more) | {"units": unit}

    agent.apply(bundle("old"))
    run = host._run

    def refuses(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        if "reload-or-restart" in command:
            return subprocess.CompletedProcess(command, 1, "", "")
        return run(*command, text=text)

    monkeypatch.setattr(agent, "run", refuses)
    ill = answering(monkeypatch, lambda: "ill")
    assert refusal(bundle("new", health=ill)).endswith("The files were put back, but nginx.service did not come back.")
    host.commands.clear()
    agent.apply(bundle("old"))
    assert host.commands == ["reload nginx.service"]


def test_a_unit_that_was_to_run_and_did_not_runs_after_a_push_that_would_have_ended_it_failed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.apply(host.bundle({"a": "1"}, {"nginx.service": ["a"], "redis.service": []}))
    host.units["redis.service"]["ActiveState"] = "failed"
    ill = answering(monkeypatch, lambda: "ill")
    refusal(host.bundle({"a": "2"}, {"nginx.service": ["a"]}, health=ill))
    assert host.units["redis.service"]["ActiveState"] == "active"


def test_a_folder_has_its_former_mode_after_a_push_that_failed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    folder = {str(host.path("folder")): {"mode": "0750", **owner}}
    units = {"nginx.service": ["a"]}
    agent.apply(host.bundle({"a": "1"}, units, directories=folder))
    closed = {str(host.path("folder")): {"mode": "0700", **owner}}
    ill = answering(monkeypatch, lambda: "ill")
    refusal(host.bundle({"a": "2"}, units, directories=closed, health=ill))
    assert host.path("folder").stat().st_mode & 0o777 == 0o750
    agent.apply(host.bundle({"a": "1"}, units, directories=closed))
    assert host.path("folder").stat().st_mode & 0o777 == 0o700 and not host.path("home/undo").exists()


MOUNT = "[Mount]\nWhat=/dev/disk\nWhere={}/srv\n"


def test_a_disk_that_was_mounted_stays_after_a_push_that_failed_and_all_else_goes(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"units/srv.mount": MOUNT.format(host.folder), "units/nginx.service": "[Unit]"}
    units: dict[str, list[str]] = {"srv.mount": [], "nginx.service": ["units/nginx.service"]}
    ill = answering(monkeypatch, lambda: "ill")
    refusal(host.bundle(files, units, health=ill))
    assert [path.name for path in host.path("units").iterdir()] == ["srv.mount"]
    assert host.units["srv.mount"]["ActiveState"] == "active"
    agent.apply(host.bundle({}, {}))
    assert list(host.path("units").iterdir()) == []


def test_a_disk_that_does_not_mount_leaves_no_file_that_asks_for_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise agent.Failed("srv.mount does not start")

    monkeypatch.setattr(agent, "systemctl", broken)
    said = refusal(host.bundle({"units/srv.mount": MOUNT.format(host.folder)}, {"srv.mount": []}))
    assert said.startswith("srv.mount does not start\nThe files were put back")
    assert list(host.path("units").iterdir()) == []


def test_a_second_run_on_a_host_says_for_whom_it_waits_and_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent, "HOME", tmp_path)
    monkeypatch.setattr(agent, "LOCK_SECONDS", 0)
    said = f"another run on this host .process {os.getpid()}, since"
    with agent.host_lock(), pytest.raises(agent.Failed, match=said), agent.host_lock():
        pass
    assert capsys.readouterr().out.startswith("waiting for another run on this host")
    with agent.host_lock():
        pass


def test_a_command_that_hangs_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "PATIENCE", 0.05)
    done = agent.run("sh", "-c", "exec sleep 60")
    assert done.returncode == 124 and agent.words(done) == "sh -c exec sleep 60 had not ended after 0.05 s"


def test_units_of_which_systemd_does_not_tell_are_not_taken_for_fine(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.apply(host.bundle({"a": "1"}, {"nginx.service": ["a"]}))
    dead = subprocess.CompletedProcess((), 1, "", "Failed to connect to bus")
    monkeypatch.setattr(agent, "run", lambda *_, **__: dead)
    assert refusal(host.bundle({"a": "2"}, {"nginx.service": ["a"]})).endswith("Failed to connect to bus")
    assert host.text("a") == "1"


# Packages


class Packages:
    """dpkg and apt, as far as they are asked, with what services are told that want to start while they work."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.at_death = folder / "sbin", folder / "dead"
        self.folder.mkdir()
        self.policy = self.folder / "policy-rc.d"
        self.installed: set[str] = set()
        self.half_done: set[str] = set()
        self.lacks: set[str] = set()
        self.commands: list[str] = []
        self.told: list[str] = []
        self.killed = False
        monkeypatch.setattr(agent, "POLICY", self.policy)
        monkeypatch.setattr(agent, "POLICY_ASIDE", self.folder / "policy-rc.d.aside")
        monkeypatch.setattr(agent, "DPKG_LOCKS", (folder / "lock-frontend", folder / "lock"))
        monkeypatch.setattr(agent, "APT_LOCKS", (folder / "lists",))
        monkeypatch.setattr(agent, "run", self._run)
        monkeypatch.setattr(os, "fchown", lambda *_: None)

    def _run(self, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        said, status = "", 0
        if command[0] == "dpkg-query":
            said = "".join(f"{name} installed\n" for name in command[4:] if name in self.installed)
        elif "--configure" in command:
            self.told.append(self.policy.read_text())
            status = 1 if self.lacks else 0
            self.installed |= self.half_done - self.lacks
            self.half_done &= self.lacks
        elif "--no-remove" in command:
            self.told.append(self.policy.read_text())
            self.installed |= self.half_done
            self.half_done.clear()
        elif command[0] == "apt-get" and not {"--simulate", "--download-only", "update"} & set(command):
            self.told.append(self.policy.read_text())
            if self.killed:
                self.half_done |= set(command[command.index("install") + 1 :])
                shutil.copytree(self.folder, self.at_death)
                raise Cut
            status = 100 if self.half_done else 0
            self.installed |= set(command[command.index("install") + 1 :])
        self.commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, status, said, "E: dpkg was interrupted" if status else "")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    return Packages(tmp_path, monkeypatch)


def leave_half_done(packages: Packages) -> None:
    """A push that is killed while apt installs: nothing of what it would do at its end is done."""
    packages.killed = True
    with pytest.raises(Cut):
        agent.install_packages(["nginx", "dovecot"], [])
    packages.killed = False
    shutil.rmtree(packages.folder)
    packages.at_death.rename(packages.folder)
    packages.commands.clear()
    packages.told.clear()


def test_nothing_starts_while_packages_are_installed_and_afterwards_all_may(packages: Packages) -> None:
    assert agent.install_packages(["nginx", "dovecot"], []) == 2
    assert packages.told and all("exit 101" in policy for policy in packages.told)
    assert not packages.policy.exists()
    packages.commands.clear()
    assert agent.install_packages(["nginx", "dovecot"], []) == 0
    assert [command.split()[0] for command in packages.commands] == ["dpkg-query"]


def test_a_push_that_was_killed_while_it_installed_is_finished_by_the_next(packages: Packages) -> None:
    leave_half_done(packages)
    assert packages.policy.exists()
    agent.install_packages(["nginx", "dovecot", "redis"], [])
    assert packages.installed == {"nginx", "dovecot", "redis"} and not packages.half_done
    assert packages.told and all("exit 101" in policy for policy in packages.told)
    assert not packages.policy.exists()


def test_a_package_that_was_unpacked_without_what_it_depends_on_is_finished_too(packages: Packages) -> None:
    leave_half_done(packages)
    packages.lacks = {"dovecot"}
    agent.install_packages(["nginx", "dovecot"], [])
    assert packages.installed == {"nginx", "dovecot"} and not packages.policy.exists()


def test_services_may_start_again_also_where_apt_finished_after_the_push_was_killed(packages: Packages) -> None:
    leave_half_done(packages)
    packages.installed, packages.half_done = {"nginx", "dovecot"}, set()
    assert agent.install_packages(["nginx", "dovecot"], []) == 0
    assert not packages.policy.exists()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_policy_of_the_host_s_own_is_there_again_afterwards(packages: Packages, is_killed: bool) -> None:
    own = "#!/bin/sh\nexit 101\n"
    packages.policy.write_text(own)
    packages.policy.chmod(0o755)
    if is_killed:
        leave_half_done(packages)
    agent.install_packages(["nginx"], [])
    assert packages.policy.read_text() == own and os.access(packages.policy, os.X_OK)
    assert own not in packages.told


def test_a_policy_that_had_stepped_aside_when_a_push_was_killed_comes_back(packages: Packages) -> None:
    packages.installed = {"nginx"}
    packages.policy.with_name("policy-rc.d.aside").write_text("#!/bin/sh\nexit 0\n")
    agent.install_packages(["nginx"], [])
    assert packages.policy.read_text() == "#!/bin/sh\nexit 0\n"


def test_an_apt_that_outlived_its_push_is_waited_for_before_anything_may_start(
    packages: Packages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_half_done(packages)
    there = []

    def lock(file: Any, how: int) -> None:
        there.append(packages.policy.exists())
        held = {"lock-frontend": 2, "lock": 4}[Path(file.name).name]
        if len(there) <= held:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", lock)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    agent.install_packages(["nginx"], [])
    # Its dpkg is at work longer than apt itself: apt may have been killed, too.
    assert there == [True] * 5
    assert capsys.readouterr().out == "waiting for apt or dpkg\n" * 2


def test_who_fetches_lists_of_packages_just_now_is_waited_for(
    packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = []

    def lock(file: Any, how: int) -> None:
        there.append((Path(file.name).name, len(packages.commands)))
        if len(there) == 2:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", lock)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert agent.install_packages(["nginx"], []) == 1
    # Whether something is missing was asked twice by then, and a run that was cut finished.
    assert [name for name, _ in there] == ["lock-frontend", "lock", "lock", "lists"]
    assert not any("apt-get" in command for command in packages.commands[: there[-1][1]])


def test_nothing_starts_of_what_a_push_installs_and_what_is_upgraded_beside_it_does(tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    agent.write(policy, agent.NOTHING_STARTS, 0o755, os.getuid(), os.getgid())
    assert agent.run(str(policy), "nginx", "start").returncode == 101
    beside = {name: value for name, value in os.environ.items() if name != agent.IN_A_PUSH}
    assert subprocess.run([policy, "nginx", "restart"], env=beside).returncode == 0


def test_an_apt_that_works_for_ever_is_not_waited_for_as_long(
    packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock(file: Any, how: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", lock)
    monkeypatch.setattr(agent, "LOCK_SECONDS", 0)
    with pytest.raises(agent.Failed, match="apt or dpkg has held this host"):
        agent.install_packages(["nginx"], [])
    assert not packages.policy.exists()


# Who listens

SS = """\
udp   UNCONN 0      0      198.18.1.14:53        0.0.0.0:*
udp   UNCONN 0      0      127.0.0.1:53          0.0.0.0:*
tcp   LISTEN 0      4096   198.18.1.14:53        0.0.0.0:*
tcp   LISTEN 0      4096   [2001:db8:1:1::14]:53     [::]:*
tcp   LISTEN 0      100        0.0.0.0:25        0.0.0.0:*
tcp   LISTEN 0      100           [::]:25           [::]:*
tcp   LISTEN 0      4096             *:12345           *:*
tcp   LISTEN 0      4096   127.0.0.53%lo:5355     0.0.0.0:*
tcp   LISTEN 0      511  [fe80::1]%eth0:80         [::]:*
"""
BOTH = ["198.18.1.14", "2001:db8:1:1::14"]


def hears(host: Host, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], str]) -> None:
    """A host on which ss(8) prints these lines."""
    run = agent.run

    def listing(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        if command[0] == "ss":
            return subprocess.CompletedProcess(command, 0, lines(), "")
        return run(*command, text=text)

    monkeypatch.setattr(agent, "run", listing)


def listener(port: int, addresses: list[str], protocol: str = "tcp", service: str = "nginx") -> dict[str, Any]:
    return {"service": service, "kind": "listen", "protocol": protocol, "port": port, "addresses": addresses}


@pytest.mark.parametrize(
    ("probe", "deaf"),
    [
        (listener(25, [*BOTH, "198.51.100.2"]), None),
        (listener(12345, BOTH), None),
        (listener(53, BOTH), None),
        (listener(53, BOTH, "udp"), "nobody listens at 2001:db8:1:1::14 (udp)"),
        (listener(53, ["198.51.100.2", *BOTH]), "nobody listens at 198.51.100.2 (tcp)"),
        (listener(80, BOTH), "nobody listens at 198.18.1.14, 2001:db8:1:1::14 (tcp)"),
        (listener(443, ["198.18.1.14"]), "nobody listens at 198.18.1.14 (tcp)"),
    ],
    ids=[
        "any of each family",
        "any of both at once",
        "by name",
        "one over udp",
        "another",
        "on its link alone",
        "none",
    ],
)
def test_a_listener_counts_for_the_addresses_that_it_is_bound_to(
    host: Host, monkeypatch: pytest.MonkeyPatch, probe: dict[str, Any], deaf: str | None
) -> None:
    hears(host, monkeypatch, lambda: SS)
    assert agent.probe_listen(probe) == deaf


def test_a_daemon_that_bound_one_of_two_addresses_is_a_push_that_failed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    hears(host, monkeypatch, lambda: "tcp LISTEN 0 9 [2001:db8:1:1::14]:11333 [::]:*\n")
    wanted = host.bundle({"a": "new"}, {"rspamd.service": ["a"]}, health=[listener(11333, BOTH, service="rspamd")])
    assert refusal(wanted).startswith("rspamd: port 11333: nobody listens at 198.18.1.14 (tcp)\n")


def test_a_daemon_that_missed_an_address_is_started_again_by_a_push_that_changes_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = "tcp LISTEN 0 9 0.0.0.0:11333 0.0.0.0:*\ntcp LISTEN 0 9 [::]:11333 [::]:*\n"
    heard = [both]
    hears(host, monkeypatch, lambda: heard[0])
    wanted = host.bundle(
        {"a": "as it is"},
        {"rspamd.service": ["a"], "rspamd.timer": [], "nginx.service": []},
        health=[listener(11333, BOTH, service="rspamd")],
    )
    agent.apply(wanted)
    heard[0] = "tcp LISTEN 0 9 [::]:11333 [::]:*\n"
    found = agent.difference(wanted)
    assert found["behind"] == []
    host.commands.clear()
    # It stays deaf: that is no success, whatever else the push did.
    assert "nobody listens at 198.18.1.14" in refusal(wanted)
    assert host.commands[0] == "restart rspamd.service"
    do = host._do

    def binds(verb: str, units: list[str], *, now: bool) -> None:
        heard[0] = both
        do(verb, units, now=now)

    monkeypatch.setattr(host, "_do", binds)
    host.commands.clear()
    agent.apply(wanted)
    assert host.commands == ["restart rspamd.service"]
    host.commands.clear()
    agent.apply(wanted)
    assert host.commands == []


def test_where_nobody_is_to_listen_for_now_nobody_is_started_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    hears(host, monkeypatch, lambda: "")
    host.path("filling").touch()
    probe = listener(993, BOTH, service="dovecot") | {"unless": str(host.path("filling"))}
    wanted = host.bundle({"a": "as it is"}, {"dovecot.service": ["a"]}, health=[probe])
    agent.apply(wanted)
    host.commands.clear()
    agent.apply(wanted)
    assert host.commands == []


def test_a_host_that_cannot_tell_who_listens_is_not_believed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess((), 127, "", "ss: there is no such command")
    monkeypatch.setattr(agent, "run", lambda *_, **__: failed)
    with pytest.raises(agent.Failed, match="nobody can tell who listens: ss: there is no such command"):
        agent.probe_listen(listener(25, BOTH))


def test_an_address_that_the_host_does_not_have_is_named() -> None:
    assert agent.probe_addresses({"addresses": ["127.0.0.1"]}) is None
    said = agent.probe_addresses({"addresses": ["127.0.0.1", "192.0.2.77"]})
    assert said == "192.0.2.77: Cannot assign requested address"


# Who answers after a reload

DAEMON = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def daemon() -> Iterator[tuple[int, int]]:
    """A process that answers over HTTP, and its port."""
    with subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.pid, int(process.stdout.readline())
        process.kill()


def asked(daemon: tuple[int, int], former: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What the health of a daemon is when ss(8) says that it is this process which answers."""
    pid, port = daemon
    probe = {"service": "nginx", "kind": "http", "address": "127.0.0.1", "port": port, "path": "/", "tls": False}

    def holder(*command: str) -> subprocess.CompletedProcess[str]:
        assert command[0] == "ss" and re.fullmatch(rf"\( sport = :{port} and dport = :\d+ \)", command[-1])
        held = f'0 0 127.0.0.1:{port} 127.0.0.1:40000 users:(("nginx",pid={pid},fd=3))\n'
        return subprocess.CompletedProcess(command, 0, held, "")

    monkeypatch.setattr(agent, "run", holder)
    try:
        agent.wait_until_healthy([{**probe, "server_name": "here", "status": [200]}], 0, former)
    except agent.Failed as failure:
        return str(failure)
    return None


def test_an_answer_of_a_process_of_before_the_reload_is_no_health(
    daemon: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = asked(daemon, {agent.process(str(daemon[0]))}, monkeypatch)
    assert said == f"nginx: 127.0.0.1 port {daemon[1]}: what answers has not taken up its new files"


def test_an_answer_of_a_new_process_counts_also_when_it_has_the_number_of_a_former_one(
    daemon: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(daemon, {(str(daemon[0]), "17"), agent.process(str(os.getpid()))}, monkeypatch) is None


def test_where_nothing_was_reloaded_nobody_asks_who_answers(
    daemon: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: str) -> subprocess.CompletedProcess[str]:
        raise AssertionError

    probe = {"kind": "http", "address": "127.0.0.1", "port": daemon[1], "path": "/", "tls": False, "status": [200]}
    monkeypatch.setattr(agent, "run", nobody)
    assert agent.probe_http({**probe, "server_name": "here"}) is None


def test_the_processes_of_what_is_reloaded_are_known_before_it_is(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = str(host.path("a")), []

    def known(units: list[str]) -> set[tuple[str, str]]:
        seen.append((units, list(host.commands)))
        return {("11", "100")}

    def former(probe: dict[str, Any]) -> None:
        seen.append(probe["former"])

    unit = {"nginx.service": {"service": "nginx", "restart_on": [], "reload_on": [path]}}
    agent.apply(host.bundle({"a": "old"}, {}) | {"units": unit})
    host.commands.clear()
    monkeypatch.setattr(agent, "processes_of", known)
    monkeypatch.setitem(agent.PROBES, "test", former)
    agent.apply(host.bundle({"a": "new"}, {}, health=[{"service": "nginx", "kind": "test"}]) | {"units": unit})
    assert seen == [(["nginx.service"], []), {("11", "100")}]
    assert host.commands == ["reload nginx.service"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"files": []}', '{"undo": {}}', '{"undo": {"paths": {}}}', "\0\0"]
)
def test_a_damaged_note_of_a_host_is_told_and_nothing_is_changed(host: Host, text: str) -> None:
    agent.apply(host.bundle({"a": "old"}, {"nginx.service": ["a"]}))
    (host.path("home") / "undo").mkdir()
    (host.path("home") / "state.json").write_text(text)
    said = refusal(host.bundle({"a": "new"}, {"nginx.service": ["a"]}))
    assert "state.json is damaged, and nothing was changed" in said and "move it away" in said
    assert host.text("a") == "old" and (host.path("home") / "undo").exists()


def test_a_former_file_that_is_lost_does_not_keep_a_later_push_from_the_host(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    units = {"nginx.service": ["a", "b"]}
    agent.apply(host.bundle({"a": "old", "b": "old"}, units))
    with monkeypatch.context() as one_push:
        one_push.setattr(agent, "_units", cut)
        with pytest.raises(Cut):
            agent.apply(host.bundle({"a": "new", "b": "new"}, units))
    note = json.loads((host.path("home") / "state.json").read_text())["undo"]["paths"]
    (host.path("home") / "undo" / note[str(host.path("a"))]).unlink()
    agent.apply(host.bundle({"a": "newer", "b": "newer"}, units))
    assert (host.text("a"), host.text("b")) == ("newer", "newer")
    assert f"what stood there before is lost, and is not put back: {host.path('a')}\n" in capsys.readouterr().out


def test_a_folder_that_a_service_replaced_by_a_link_is_not_given_to_it(host: Host, tmp_path: Path) -> None:
    theirs, roots = tmp_path / "theirs", tmp_path / "roots"
    (theirs / "temp").mkdir(parents=True)
    roots.mkdir(mode=0o711)
    me = pwd.getpwuid(os.getuid()).pw_name
    wanted = {"owner": me, "group": grp.getgrgid(os.getgid()).gr_name, "mode": "0700"}
    bundle = host.bundle({}, {}, directories={str(theirs / "temp"): wanted, str(theirs / "temp/deep"): wanted})
    agent.apply(bundle)
    # Others may write beside it, as a service may in its own folder.
    theirs.chmod(0o777)
    (theirs / "temp" / "deep").rmdir()
    (theirs / "temp").rmdir()
    (theirs / "temp").symlink_to(roots)
    assert f"{theirs}/temp: temp is no folder" in refusal(bundle)
    assert roots.stat().st_mode & 0o777 == 0o711 and not (roots / "deep").exists()
    theirs.chmod(0o755)
    if os.getuid() == 0:
        # Root alone may have put it now: an operator keeps the folder elsewhere.
        agent.apply(bundle)
        assert (roots / "deep").is_dir()


# What a push says of a host that is held back


@pytest.mark.parametrize(
    ("text", "said"), [("say the word on it\n", ["h: say the word on it"]), (None, []), ("", ["h: it serves not all"])]
)
def test_a_push_to_a_host_that_serves_nobody_yet_says_what_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: list[str]
) -> None:
    held = tmp_path / "filling"
    if text is not None:
        held.write_text(text)
    agent._serves_nobody_yet({"host": "h", "health": [{"unless": str(held)}, {"unless": str(held)}, {"kind": "dns"}]})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(line.startswith(start) for line, start in zip(lines, said, strict=True))


@pytest.mark.parametrize(("status", "missing"), [("installed", []), ("half-configured", ["nginx"])])
def test_a_package_is_there_whether_or_not_it_is_held(
    monkeypatch: pytest.MonkeyPatch, status: str, missing: list[str]
) -> None:
    # With apt-mark hold the wanted action is "hold", the status is what it was (dpkg-query(1)).
    def asked(*command: str) -> subprocess.CompletedProcess[str]:
        assert command[3] == "${Package} ${db:Status-Status}\n"
        return subprocess.CompletedProcess(command, 0, f"nginx {status}\n", "")

    monkeypatch.setattr(agent, "run", asked)
    assert agent._missing(["nginx"]) == missing
