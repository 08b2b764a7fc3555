"""The lab's commands: up, images, down, status, run, operator, proof, reinstall, fail, heal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from rich.console import Console

from lab import bench_users, faults, image, up
from lab.bench_replication import bench
from lab.load import Day
from lab.load import load as people_live
from lab.proof import ProofFailed, prove
from lab.state import RELEASE, LabError, load, stack
from model.base import StackError
from ops.pulumi import OperatorError

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command of the lab. Returns its exit status; expected errors are sentences."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if "--" in given:
        split = given.index("--")
        given, command = given[:split], given[split + 1 :]
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start the lab, bring the stack up in it, and prove that mail flows")
    start.add_argument("--machines", choices=("vms", "containers"), default="containers")
    start.add_argument("--virtual", default="", help="with vms: only these hosts, joined by commas; else all")
    start.add_argument("--release", type=int, choices=image.SUITES, default=RELEASE, help="Debian on the hosts")
    start.add_argument("--only-infrastructure", action="store_true", help="no make up, no proof")
    commands.add_parser("images", help="make the images that a lab starts from, where they are missing")
    commands.add_parser("down", help="remove the lab, and leave nothing behind")
    commands.add_parser("status", help="sites, hosts, addresses and states")
    commands.add_parser("proof", help="send a mail in and a mail out")
    run = commands.add_parser("run", help="run a command: run WHERE -- COMMAND …")
    run.add_argument("where", help="a host, or client, foreign, operator, internet")
    commands.add_parser("bench-replication", help="measure replication")
    commands.add_parser("bench-users", help="measure sessions, logins and submissions")
    day = commands.add_parser("load", help="let the lab's people live a day, and tell what they saw")
    for value in fields(Day):
        day.add_argument(f"--{value.name}", type=float if value.name != "users" else int, default=value.default)
    operator = commands.add_parser("operator", help="run a command as the operator: operator -- COMMAND …")
    operator.add_argument("--stack", default="")
    anew = commands.add_parser("reinstall", help="install a host anew, with the disk that it keeps; make up fills it")
    anew.add_argument("host")
    anew.add_argument("--release", type=int, choices=image.SUITES, help="another Debian than it has")
    anew.add_argument("--blank", action="store_true", help="as after the loss of all its disks")
    for name, words in (("fail", "break a host, a site or a link"), ("heal", "mend it again")):
        fault = commands.add_parser(name, help=words)
        fault.add_argument("kind", choices=faults.KINDS)
        fault.add_argument("name")
        fault.add_argument("--black-hole", action="store_true", help="drop packets, with the link up")
    options = parser.parse_args(given)
    # Hosts' files are made here, and read by daemons of other users; what is secret is given its mode by hand.
    os.umask(0o022)
    try:
        match options.command:
            case "up":
                virtual = [name for name in options.virtual.split(",") if name]
                up.up(
                    console,
                    options.machines,
                    virtual=virtual,
                    release=options.release,
                    only_infrastructure=options.only_infrastructure,
                )
            case "images":
                up.images(up.Phases(console), {RELEASE or stack().service.release})
            case "down":
                up.down(console)
            case "status":
                up.status(console)
            case "proof":
                prove(load(), console)
            case "bench-replication":
                bench(load(), console)
            case "bench-users":
                bench_users.bench(load(), console)
            case "load":
                given_day = Day(**{value.name: getattr(options, value.name) for value in fields(Day)})
                return 0 if people_live(load(), console, given_day) else 1
            case "run":
                os.execvpe(*_exec(options.where, command))
            case "operator":
                os.execvpe(*_exec("operator", command))
            case "reinstall":
                up.reinstall(load(), options.host, options.release, blank=options.blank)
            case "fail":
                faults.fail(load(), options.kind, options.name, black_hole=options.black_hole)
            case "heal":
                faults.heal(load(), options.kind, options.name)
    except (LabError, StackError, OperatorError, ProofFailed) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _exec(where: str, command: list[str]) -> tuple[str, list[str], dict[str, str]]:
    state = load()
    if not command:
        raise LabError("say what to run after --")
    full = state.command_in(where, command)
    extra = state.environment() if where == "operator" else {}
    return full[0], full, {**os.environ, **extra}


if __name__ == "__main__":
    sys.exit(main())
