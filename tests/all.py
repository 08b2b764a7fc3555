"""Everything that is tested, phase by phase: what ``make test`` runs.

The lab tests bring their own lab up and take it down again; a lab that runs already is taken as it is, and left.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
console = Console(highlight=False, soft_wrap=True)

STATIC: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lint", ("ruff", "check", ".")),
    ("format", ("ruff", "format", "--check", "--quiet", ".")),
    ("types", ("mypy", ".")),
    ("import contracts", ("lint-imports",)),
    ("unit tests", ("pytest", "-q", "tests/unit")),
)
LAB: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("start over a lab that died", ("pytest", "-v", "tests/start")),
    ("lab tests in containers", ("pytest", "-v", "tests/lab", "--durations=10")),
    ("two virtual machines at two sites", ("pytest", "-v", "tests/vms")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the phases in order and stops at the first that fails. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.all", description=__doc__)
    parser.add_argument("--only-unit", action="store_true", help="no lab: no root, no network")
    options = parser.parse_args(arguments)
    taken: list[tuple[str, float]] = []
    failed = ""
    for name, command in STATIC if options.only_unit else (*STATIC, *LAB):
        console.print(f"\n· {name}: {' '.join(command)}", markup=False)
        started = time.monotonic()
        status = subprocess.run([str(PROGRAMS / command[0]), *command[1:]], cwd=ROOT).returncode
        taken.append((name, time.monotonic() - started))
        console.print(f"{'✗' if status else '✓'} {name}: {taken[-1][1]:.1f} s")
        if status:
            failed = name
            break
    console.print("\nWhat took how long, in seconds:")
    for name, seconds in taken:
        console.print(f"  {seconds:7.1f}  {name}")
    console.print(f"failed: {failed}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
