"""Everything that is tested, phase by phase: what ``make test`` runs.

Lab tests bring labs of their own up, beside whatever lab runs, and take them down again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Run:
    """One command of a phase. ``label`` stands before its lines when others run beside it."""

    command: tuple[str, ...]
    label: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


LONG = tuple(f"tests/lab/test_{name}.py" for name in ("operating", "outbound", "replication", "rolling"))
"""About half of what the lab tests of a release take; the other half is all the rest."""


PEOPLE = 40
"""Some of each kind (lab/people.py). A lab that `make lab` starts has five times as many."""


def _in_a_lab(tests: Sequence[str], release: str = "", part: str = "", *, people: int = 0) -> Run:
    """Tests in a lab of their own, with so many people; on a release of Debian, or on that of its stack."""
    label = f"{release}{part}"
    command = ("pytest", "-v", *tests, "--durations=15", "-p", "no:cacheprovider")
    env = {"POSTHORN_LAB": f"test{label}", "POSTHORN_PEOPLE": str(people)}
    env |= {"POSTHORN_RELEASE": release} if release else {}
    return Run(command, label, env)


def _in_two_labs(release: str) -> tuple[Run, ...]:
    """The lab tests of a release, in two halves that take about the same time."""
    rest = ("tests/lab", *(f"--ignore={file}" for file in LONG))
    return (_in_a_lab(rest, release, "a", people=PEOPLE), _in_a_lab(LONG, release, "b"))


def _on_plain(release: str) -> Run:
    """The README's first commands, on a Debian of a release that has never seen the project."""
    return Run(("pytest", "-v", "tests/plain", "-p", "no:cacheprovider"), release, {"POSTHORN_RELEASE": release})


STATIC: Mapping[str, tuple[Run, ...]] = {
    "lint": (Run(("ruff", "check", ".")),),
    "format": (Run(("ruff", "format", "--check", "--quiet", ".")),),
    "types": (Run(("mypy", ".")),),
    "import contracts": (Run(("lint-imports",)),),
    "unit tests": (Run(("pytest", "-q", "tests/unit")),),
}
LAB: Mapping[str, tuple[Run, ...]] = {
    "first commands on a plain Debian 12 and 13": (_on_plain("12"), _on_plain("13")),
    "start over a lab that died": (_in_a_lab(("tests/start",)),),
    # Side by side: such tests wait more than they compute.
    "lab tests in containers, on Debian 12 and 13": (*_in_two_labs("12"), *_in_two_labs("13")),
    "two virtual machines at two sites": (_in_a_lab(("tests/vms",)),),
}


SAID_AGAIN = re.compile(r"^(FAILED|ERROR|E  ) ")
"""What pytest writes of a test that failed, and of why: of tests side by side it stands far up in what was printed."""
SAID_AGAIN_LINES = 12
"""Of each command: the last ones name all tests that failed, or as many as one can read."""


def _performed(run: Run, *, labelled: bool) -> list[str]:
    """Runs a command, its lines behind its label where others run beside it.

    Returns nothing where it went well, else what says why, line by line.
    """
    console.print(f"  {run.label} {' '.join(run.command)}", markup=False)
    process = subprocess.Popen(
        [str(PROGRAMS / run.command[0]), *run.command[1:]],
        cwd=ROOT,
        env={**os.environ, **run.env},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE if labelled else None,
        stderr=subprocess.STDOUT if labelled else None,
    )
    why: list[str] = []
    for line in process.stdout or ():
        sys.stdout.write(f"{run.label} │ {line}")
        sys.stdout.flush()
        if SAID_AGAIN.match(line):
            why.append(f"{run.label} │ {line.rstrip()}")
    if process.wait() == 0:
        return []
    ended = f"{run.label} ended with status {process.returncode}: {' '.join(run.command)}".strip()
    return [*why[-SAID_AGAIN_LINES:], ended]


def perform(runs: tuple[Run, ...]) -> list[str]:
    """Runs the commands of a phase side by side, each once, to the end of the last.

    Returns nothing where all went well, else what says why, line by line.
    """
    with ThreadPoolExecutor() as pool:
        whys = list(pool.map(lambda run: _performed(run, labelled=len(runs) > 1), runs))
    return [line for why in whys for line in why]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the phases in order and stops at the first that fails. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.all", description=__doc__)
    parser.add_argument("--only-unit", action="store_true", help="no lab: no root, no network")
    options = parser.parse_args(arguments)
    taken = [(phase["name"], phase["wall"]) for phase in json.loads(os.environ.get("POSTHORN_SETUP_PHASES", "[]"))]
    for name, runs in (STATIC if options.only_unit else {**STATIC, **LAB}).items():
        console.print(f"\n· {name}", markup=False)
        started = time.monotonic()
        why = perform(runs)
        taken.append((name, time.monotonic() - started))
        console.print(f"{'✗' if why else '✓'} {name}: {taken[-1][1]:.1f} s")
        if why:
            break
    console.print("\nWhat took how long, in seconds:")
    for name, seconds in (*taken, ("all", sum(seconds for _, seconds in taken))):
        console.print(f"  {seconds:7.1f}  {name}")
    for line in why:
        console.print(line, markup=False)
    console.print(f"failed: {name}" if why else "all passed")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
