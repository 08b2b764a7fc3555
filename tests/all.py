"""Everything that is tested, phase by phase: what ``make test`` runs.

Lab tests bring labs of their own up, beside whatever lab runs, and take them down again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
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


def _lab_tests(release: str) -> Run:
    """All lab tests on one release of Debian, in a lab of their own."""
    command = ("pytest", "-v", "tests/lab", "--durations=15")
    return Run(command, release, {"POSTHORN_LAB": f"test{release}", "POSTHORN_RELEASE": release})


STATIC: Mapping[str, tuple[Run, ...]] = {
    "lint": (Run(("ruff", "check", ".")),),
    "format": (Run(("ruff", "format", "--check", "--quiet", ".")),),
    "types": (Run(("mypy", ".")),),
    "import contracts": (Run(("lint-imports",)),),
    "unit tests": (Run(("pytest", "-q", "tests/unit")),),
}
LAB: Mapping[str, tuple[Run, ...]] = {
    "start over a lab that died": (Run(("pytest", "-v", "tests/start")),),
    # Side by side: such tests wait more than they compute.
    "lab tests in containers, on Debian 12 and 13": (_lab_tests("12"), _lab_tests("13")),
    "two virtual machines at two sites": (Run(("pytest", "-v", "tests/vms")),),
}


def _start(run: Run, *, piped: bool) -> subprocess.Popen[str]:
    console.print(f"  {' '.join(run.command)} {run.label}", markup=False)
    return subprocess.Popen(
        [str(PROGRAMS / run.command[0]), *run.command[1:]],
        cwd=ROOT,
        env={**os.environ, **run.env},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE if piped else None,
        stderr=subprocess.STDOUT if piped else None,
    )


def _carry(run: Run, process: subprocess.Popen[str]) -> None:
    """Prints what a run says, each line behind its label."""
    for line in process.stdout or ():
        sys.stdout.write(f"{run.label} │ {line}")
        sys.stdout.flush()


def perform(runs: tuple[Run, ...]) -> bool:
    """Runs the commands of a phase side by side, to the end of the last. Returns whether all went well."""
    processes = [_start(run, piped=len(runs) > 1) for run in runs]
    carriers = [threading.Thread(target=_carry, args=pair) for pair in zip(runs, processes, strict=True)]
    for carrier in carriers:
        carrier.start()
    for carrier in carriers:
        carrier.join()
    return {process.wait() for process in processes} == {0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the phases in order and stops at the first that fails. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.all", description=__doc__)
    parser.add_argument("--only-unit", action="store_true", help="no lab: no root, no network")
    options = parser.parse_args(arguments)
    taken = [(phase["name"], phase["wall"]) for phase in json.loads(os.environ.get("POSTHORN_SETUP_PHASES", "[]"))]
    failed = ""
    for name, runs in (STATIC if options.only_unit else {**STATIC, **LAB}).items():
        console.print(f"\n· {name}", markup=False)
        started = time.monotonic()
        well = perform(runs)
        taken.append((name, time.monotonic() - started))
        console.print(f"{'✓' if well else '✗'} {name}: {taken[-1][1]:.1f} s")
        if not well:
            failed = name
            break
    console.print("\nWhat took how long, in seconds:")
    for name, seconds in (*taken, ("all", sum(seconds for _, seconds in taken))):
        console.print(f"  {seconds:7.1f}  {name}")
    console.print(f"failed: {failed}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
