"""The lab of the tests: the one that runs, else one that is made for them and removed again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lab import live, up
from lab.state import FOLDER, RELEASE, LabError, State, load
from model.load import load as load_stack
from model.stack import Stack
from services.bundle import bundle
from services.postfix import units

PUSH = "import json,sys\nb=json.load(sys.stdin)\ng={'__name__':'agent'}\nexec(b['agent'],g)\ng['main'](b)"
"""What runs on a host with a bundle on its standard input."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is tried in labs of another release; a lab whose release nobody names takes all."""
    if RELEASE is None:
        return
    wanted = {item: item.get_closest_marker("on_release") for item in items}
    others = [item for item, mark in wanted.items() if mark and mark.args[0] != RELEASE]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@dataclass
class Lab:
    """The running lab, with the operator's commands."""

    state: State
    came_up: tuple[float, float] = (0.0, 0.0)
    """From when to when it was brought up, in seconds since the epoch: no test has provoked what was logged then."""

    @property
    def stack_name(self) -> str:
        return f"lab-{self.state.machines}"

    @property
    def stack_file(self) -> Path:
        return self.state.project / f"Pulumi.{self.stack_name}.yaml"

    def stack(self) -> Stack:
        """The live stack, as its file is now."""
        return load_stack(self.stack_file, self.stack_name)

    def postfix(self, host: str) -> str:
        """The unit of Postfix on a host, which is another on each release."""
        stack = self.stack()
        return units(stack, stack.all_hosts[host])[-1].name

    def run(self, where: str, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host or in a part of the lab."""
        return self.state.run_in(where, list(command), input=text, capture_output=True, text=True)

    def ops(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One of the operator's commands (``make up`` and its like), with all that it printed in ``stdout``."""
        command = [self.state.python, "-m", "ops", *arguments]
        return self.state.run_in(
            "operator", command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={"COLUMNS": "250"}
        )

    def up(self, *arguments: str) -> str:
        """``make up``, which has to succeed. Returns what it printed."""
        done = self.ops("up", self.stack_name, "--yes", *arguments)
        assert done.returncode == 0, done.stdout
        return str(done.stdout)

    def push(
        self, host: str, edit: Callable[[dict[str, Any]], None] = lambda wanted: None, program: str = PUSH
    ) -> subprocess.CompletedProcess[str]:
        """Pushes the host's present bundle, altered by ``edit``, straight to its agent, as ``program`` starts it."""
        from agent import SOURCE

        wanted = bundle(self.stack(), self.stack().all_hosts[host])
        # Rendering without a passphrase leaves placeholders where secrets have versions: those on the host stand.
        script = (
            "import json,glob;print(json.dumps([p.rsplit('/',1)[1] for p in glob.glob('/var/lib/posthorn/secrets/*')]))"
        )
        stored = json.loads(self.run(host, "python3", "-c", script).stdout)
        for secret in wanted["secrets"].values():
            secret["version"] = next(n.rpartition(".")[2] for n in stored if n.rpartition(".")[0] == secret["name"])
        edit(wanted)
        return self.run(host, "python3", "-c", program, text=json.dumps({"agent": SOURCE, **wanted}))

    def change(self, edit: Any) -> None:
        """Changes the live stack file: ``edit`` gets its configuration to alter."""
        import yaml

        document = yaml.safe_load(self.stack_file.read_text())
        edit({key.removeprefix("posthorn:"): value for key, value in document["config"].items()})
        self.stack_file.write_text(live.dump(document))

    def client(self, action: str, **request: Any) -> dict[str, Any]:
        """One action of the mail client: fetch or submit. A refusal is in the answer's ``error``."""
        request = {"action": action, "authority": str(self.state.authority_file), "seconds": 60, **request}
        if "user" in request:
            request.setdefault("password", self.state.passwords.get(request["user"], ""))
        done = self.run("client", self.state.python, "-m", "lab.client", text=json.dumps(request))
        answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()}
        return answer


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Labs of a release come up one after another: that takes all of a machine, while their tests mostly wait."""
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with (FOLDER.parent / f"coming-up-{RELEASE}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A lab in containers, brought up and proved."""
    console = Console(highlight=False, width=160)
    try:
        state = load()
        mine = False
    except LabError:
        mine = True
    else:
        if state.machines != "containers":
            pytest.fail(f"the lab runs with {state.machines}: make lab-down first", pytrace=False)
    with _one_at_a_time():
        began = time.time()
        up.up(console, "containers", release=RELEASE)
        came_up = (began, time.time())
    try:
        yield Lab(load(), came_up)
    finally:
        if mine:
            up.down(console)


@pytest.fixture
def unchanged(lab: Lab) -> Iterator[Lab]:
    """The lab, with its stack file and hosts put back afterwards."""
    before = lab.stack_file.read_text()
    yield lab
    if lab.stack_file.read_text() != before:
        lab.stack_file.write_text(before)
        lab.up()
