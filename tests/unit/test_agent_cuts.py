"""A push is a transaction: wherever it is cut, and however full the disk, daemons run with what was pushed well.

The host is a folder. Its daemons know what they read when they were last started or reloaded: that is asked for, not
what the agent believes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from agent import agent
from tests.unit.test_agent import Cut, Host

READS = {"alpha.service": ["a", "units/alpha.service"], "beta.service": ["b", "b.map"], "gamma.service": ["a", "c"]}
"""What each daemon reads. Beta reads its files again when it is reloaded, the others do not."""
AS_BEFORE = "The files were put back, and the services run with them as before."


class Daemons(Host):
    """A host whose daemons run with what they have read, and which can be cut at each step that leaves a trace."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self.runs_with: dict[str, dict[str, str | None]] = {"old.service": {}}
        self.steps = 0
        self.cut_at = self.full_from = self.full_to = 10**9
        self.units["old.service"] = {"ActiveState": "active", "UnitFileState": "enabled", "NeedDaemonReload": "no"}
        monkeypatch.setattr(agent, "say", lambda _: None)
        monkeypatch.setattr(agent, "check_staged", self._compile)
        monkeypatch.setattr(agent, "mount_first", lambda *_: None)
        monkeypatch.setattr(agent, "processes_of", lambda _: set())
        monkeypatch.setitem(agent.PROBES, "test", self._ask)
        for name in ("open", "link", "replace", "unlink", "fsync", "chmod"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _step(self, *, takes_space: bool = False) -> None:
        self.steps += 1
        if self.steps >= self.cut_at:
            # Who is dead does nothing more, also not in what he would do at his end.
            raise Cut
        if takes_space and self.full_from <= self.steps < self.full_to:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _counted(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return do(*arguments, **more)
            self._step(takes_space=name not in ("unlink", "chmod"))
            # To the disk of a test nothing has to be true.
            return None if name == "fsync" else do(*arguments, **more)

        return counted

    def _compile(self, bundle: dict[str, Any], changed: dict[str, Any], *_: Any) -> dict[str, Any]:
        if (path := str(self.path("b"))) not in changed:
            return {}
        made = b"compiled " + changed[path].content
        return {f"{path}.map": {"content": made.hex(), "mode": 0o600, "owner": os.getuid(), "group": os.getgid()}}

    def _ask(self, probe: dict[str, Any]) -> str | None:
        read = self.runs_with.get(f"{probe['service']}.service", {})
        return "is ill" if any("ill" in (text or "") for text in read.values()) else None

    def _run(self, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        if command[:2] == ("systemctl", "show") or command[0] != "systemctl":
            return super()._run(*command, text=text)
        self._step()
        done = super()._run(*command, text=text)
        self._step()
        return done

    def _do(self, verb: str, units: list[str], *, now: bool) -> None:
        """Of one command each unit is done for itself; one that crashes is down."""
        super()._do(verb, units, now=now)
        for unit in units:
            state = self._state(unit)
            if verb == "restart" or (verb == "start" and unit not in self.runs_with):
                self._read(unit)
            if verb.startswith("reload") and state["ActiveState"] == "active":
                self._read(unit)
            if state["ActiveState"] != "active":
                self.runs_with.pop(unit, None)

    def _read(self, unit: str) -> None:
        read = {name: self._text(name) for name in READS.get(unit, [])}
        self.runs_with[unit] = read
        if "crash" in read.values():
            self.units[unit]["ActiveState"] = "failed"

    def _text(self, name: str) -> str | None:
        return self.text(name) if self.path(name).exists() else None

    def boot(self) -> None:
        """The power comes back: what is enabled starts, and reads what there is."""
        self.runs_with.clear()
        for unit, state in self.units.items():
            state["ActiveState"] = "inactive"
            if state["UnitFileState"] == "enabled":
                self._do("start", [unit], now=False)

    @property
    def now(self) -> dict[str, Any]:
        """All that a push may change here."""
        files = [*itertools.chain(*READS.values()), "b.map"]
        running = {u: self.runs_with.get(u) for u, state in self.units.items() if state["ActiveState"] == "active"}
        enabled = {unit: state["UnitFileState"] for unit, state in self.units.items()}
        return {
            "files": {name: text for name in files if (text := self._text(name)) is not None},
            "running": running,
            "enabled": {unit: state for unit, state in enabled.items() if state != "disabled"},
        }

    @property
    def litter(self) -> list[str]:
        """What is left of pushes, but for a half of the agent's own notes, which it writes over."""
        found = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")]
        return [p for p in found if p == "home/undo" or (p.endswith(".push") and p != "home/.state.json.push")]

    def wanted(self, a: str, b: str, c: str | None, *, masked: bool = False) -> dict[str, Any]:
        """A bundle whose files say this; without ``c`` it has no gamma."""
        files = {"a": a, "b": b, "units/alpha.service": f"[Unit] {a}"} | ({"c": c} if c else {})
        units = {name: [f for f in READS[name] if f != "b.map"] for name in READS if c or name != "gamma.service"}
        bundle = self.bundle(files, units, masked=["old.service"] if masked else [])
        for name, unit in bundle["units"].items():
            if name == "beta.service":
                unit["restart_on"], unit["reload_on"] = [], unit["restart_on"]
        bundle["health"] = [{"service": name.partition(".")[0], "kind": "test"} for name in units]
        bundle["compile"] = [{"service": "beta", "run": [], "of": str(self.path("b"))}]
        return bundle

    def asked_for(self, bundle: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        """What a host is like after a bundle was pushed well. What was masked once stays so."""
        files = {name: bundle["files"].get(str(self.path(name)), {}).get("content") for name in ("a", "b", "c")}
        files |= {"units/alpha.service": f"[Unit] {files['a']}", "b.map": f"compiled {files['b']}"}
        units = {name: {file: files[file] for file in READS[name]} for name in bundle["units"]}
        masked = bool(bundle["masked"]) or before["enabled"].get("old.service") == "masked"
        return {
            "files": {name: text for name, text in files.items() if text is not None},
            "running": units | ({} if masked else {"old.service": {}}),
            "enabled": dict.fromkeys(units, "enabled") | {"old.service": "masked" if masked else "enabled"},
        }


@contextmanager
def folder() -> Iterator[Daemons]:
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as name:
        host = Daemons(Path(name), monkeypatch)
        yield host
        monkeypatch.undo()


class Pushes(RuleBasedStateMachine):
    """Pushes of any bundles, each of which may be cut, or find a full disk for a while; and power failures."""

    def __init__(self) -> None:
        super().__init__()
        self.context = folder()
        self.host = self.context.__enter__()
        self.may_be = [self.host.now]
        """What the host has by its last push that went well: either of two, where one was cut at its very end."""
        self.is_dirty = False
        """Whether a push was cut, or could not be taken back, since then."""

    def teardown(self) -> None:
        self.context.__exit__(None, None, None)

    @rule(
        a=st.sampled_from(["1", "2", "ill a", "crash"]),
        b=st.sampled_from(["1", "2", "ill b"]),
        c=st.sampled_from([None, "1", "2", "crash"]),
        masked=st.booleans(),
        fault=st.sampled_from(["none", "cut", "full"]),
        at=st.integers(1, 90),
        long=st.integers(1, 40),
    )
    def push(self, a: str, b: str, c: str | None, masked: bool, fault: str, at: int, long: int) -> None:
        host, bundle = self.host, self.host.wanted(a, b, c, masked=masked)
        host.steps = 0
        host.cut_at = at if fault == "cut" else 10**9
        host.full_from, host.full_to = (at, at + long) if fault == "full" else (10**9, 10**9)
        would_be = [host.asked_for(bundle, before) for before in self.may_be]
        try:
            agent.apply(bundle)
        except Cut:
            self.is_dirty = True
            self.may_be += would_be
        except (agent.Failed, OSError) as failure:
            self._failed(str(failure))
        else:
            assert host.now in would_be
            self._leaves_no_litter()
            self.may_be, self.is_dirty = [host.now], False
        host.cut_at = host.full_from = 10**9

    def _failed(self, said: str) -> None:
        if said.endswith(AS_BEFORE):
            assert self.host.now in self.may_be, said
            self._leaves_no_litter()
            self.may_be, self.is_dirty = [self.host.now], False
        elif "put back" in said:
            self.is_dirty = True
        if not self.is_dirty:
            assert self.host.now in self.may_be, said

    def _leaves_no_litter(self) -> None:
        # Where the disk does not say that the end of a push is written, what it kept stays for the next one.
        assert self.host.litter in ([], ["home/undo"] if self.host.full_from < 10**9 else [])

    @rule()
    def lose_power(self) -> None:
        self.host.boot()
        assert self.is_dirty or self.host.now in self.may_be


def test_what_daemons_run_with_is_what_was_last_pushed_well_wherever_pushes_are_cut() -> None:
    run_state_machine_as_test(
        Pushes,
        settings=settings(max_examples=80, stateful_step_count=8, deadline=None, derandomize=True, database=None),
    )


BUNDLES = {"same": ("2", "2", "2"), "before": ("1", "1", None), "third": ("3", "3", "3")}


@pytest.mark.parametrize("after", BUNDLES)
@pytest.mark.parametrize("is_ill", [False, True], ids=["well", "ill"])
def test_a_push_that_is_cut_at_any_step_leaves_nothing_that_the_next_one_does_not_mend(
    after: str, is_ill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cut_at in itertools.count(1):
        with folder() as host:
            cut_one, next_one = host.wanted(*BUNDLES["same"]), host.wanted(*BUNDLES[after])
            agent.apply(host.wanted(*BUNDLES["before"]))
            good = host.now
            host.steps, host.cut_at = 0, cut_at
            is_over = False
            with contextlib.suppress(Cut):
                agent.apply(cut_one)
                is_over = True
            host.cut_at = 10**9
            if is_ill:
                monkeypatch.setitem(agent.PROBES, "test", lambda _: "is ill")
            try:
                agent.apply(next_one)
            except agent.Failed as failure:
                assert is_ill and str(failure) == f"alpha: test: is ill\n{AS_BEFORE}"
                assert host.now in (good, host.asked_for(cut_one, good)), cut_at
            else:
                # Where a push has nothing to do, it asks nobody.
                assert host.now == host.asked_for(next_one, good), cut_at
            assert host.litter == [], cut_at
        if is_over:
            assert cut_at > 50
            return


def test_a_disk_that_is_full_from_any_step_on_leaves_the_host_with_what_it_had() -> None:
    for full_from in itertools.count(1):
        with folder() as host:
            agent.apply(host.wanted(*BUNDLES["before"]))
            good = host.now
            host.steps, host.full_from = 0, full_from
            try:
                agent.apply(host.wanted(*BUNDLES["same"]))
            except (agent.Failed, OSError) as failure:
                said = str(failure)
            else:
                return
            assert "No space left on device (file system /" in said
            host.full_from = 10**9
            if "put back" not in said:
                assert host.now == good, full_from
            agent.apply(host.wanted(*BUNDLES["third"]))
            assert host.now == host.asked_for(host.wanted(*BUNDLES["third"]), good)


@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["one file system", "two"])
def test_what_is_put_back_has_its_mode_and_takes_no_space(is_elsewhere: bool) -> None:
    with folder() as host, pytest.MonkeyPatch.context() as monkeypatch:
        agent.apply(host.wanted("1", "1", None))
        os.chmod(host.path("a"), 0o640)
        host.path("c").symlink_to("elsewhere")
        if is_elsewhere:

            def link(*_: Any, **__: Any) -> None:
                raise OSError(errno.EXDEV, "Invalid cross-device link")

            monkeypatch.setattr(os, "link", link)
            monkeypatch.setattr(os, "fchown", lambda *_: None)
        before = host.path("a").stat()
        with pytest.raises(agent.Failed) as failure:
            agent.apply(host.wanted("ill", "2", "2"))
        assert str(failure.value).endswith(AS_BEFORE)
        assert host.path("a").stat().st_mode == before.st_mode and host.text("a") == "1"
        assert (host.path("a").stat().st_ino == before.st_ino) != is_elsewhere
        assert os.readlink(host.path("c")) == "elsewhere"


def test_what_is_kept_of_secrets_is_root_s_alone() -> None:
    with folder() as host:
        agent.apply(host.wanted("1", "1", None))
        with pytest.MonkeyPatch.context() as killed, pytest.raises(Cut):
            killed.setattr(agent, "_units", lambda _: (_ for _ in ()).throw(Cut()))
            agent.apply(host.wanted("2", "2", None))
        kept = host.path("home/undo")
        assert kept.stat().st_mode & 0o777 == 0o700 and len(list(kept.iterdir())) == 4
        assert host.path("home/state.json").stat().st_mode & 0o777 == 0o600
        assert json.loads(host.path("home/state.json").read_text())["units"]["alpha.service"] == {}
        assert agent.difference(host.wanted("1", "1", None))["behind"] == ["alpha.service", "beta.service"]
        shutil.rmtree(kept.parent)
