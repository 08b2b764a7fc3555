"""What the lab that runs carries: logins with thousands of accounts, sessions and the memory of one, submissions.

Users of its own log in at the first front end, as mail programs do. Everything runs on the machine of the lab, clients
too: so CPU time of the mailbox host's Dovecot is told beside what was reached, and what a core of it would carry.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from lab.network import LAN4, STRANGERS
from lab.pair import FILES, HOSTS
from lab.state import LabError, State, stack
from services import dovecot

ACCOUNTS = (2_000, 10_000)
"""How many accounts the mailbox hosts have, in one round after another."""
AT_ONCE = (1, 4, 16, 48)
"""Clients that log in at the same time: from one who has the host to himself to far more than it has cores."""
LOGINS = 60
"""Of each number of clients, each by a user who was not there before."""
KNEE = 1.1
"""More clients that bring less than a tenth more logins a second only wait."""
DOVECOT = "/sys/fs/cgroup/system.slice/dovecot.service/cpu.stat"
PASSWORD = "a password of the bench"
SESSIONS = 400
SOURCES = [f"{LAN4}.{last}" for last in STRANGERS]
MEMORY = """
import glob, os
shares = []
for process in glob.glob("/proc/[0-9]*"):
    try:
        if os.readlink(process + "/exe").endswith("/dovecot/imap"):
            with open(process + "/smaps_rollup") as rollup:
                shares += [int(line.split()[1]) for line in rollup if line.startswith("Pss:")]
    except OSError:
        pass
print(len(shares), sum(shares))
"""
"""How many IMAP processes a host has, and their memory in KiB, shared pages by their share (proc(5))."""


def crowd(state: State, *steps: dict[str, Any]) -> subprocess.Popen[str]:
    """Many clients at the first front end (lab/crowd.py), under way: they end when their standard input does."""
    door = str(stack().all_hosts["frontend-oak"].addresses.public[0])
    request = {"server": door, "name": "imap.hill.example", "authority": str(state.authority_file), "steps": steps}
    command = state.command_in("client", [state.python, "-m", "lab.crowd"])
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdin
    running.stdin.write(json.dumps(request) + "\n")
    running.stdin.flush()
    return running


def answer(running: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What became of the steps. The clients stay."""
    assert running.stdout
    line = running.stdout.readline()
    if not line:
        raise LabError("the clients of the bench ended before they said anything")
    said: list[dict[str, Any]] = json.loads(line)
    return said


@contextmanager
def users_of_the_bench(state: State, count: int) -> Iterator[list[list[str]]]:
    """Users with a hash as ``make password`` makes it, on both mailbox hosts, gone afterwards."""
    users = [f"crowd{number:05}" for number in range(count)]
    # One hash for all: it costs as much to check, and is made once.
    password = dovecot.hashed(PASSWORD)
    lines = "".join(f"{user}:{password}::::::\n" for user in users)
    for host in HOSTS:
        state.run_in(host, ["tee", "-a", *FILES], stdout=subprocess.DEVNULL, input=lines, text=True, check=True)
        # Those of the round before were there already.
        state.run_in(host, ["systemctl", "restart", dovecot.FORGET], check=True)
    try:
        yield [[user, PASSWORD] for user in users]
    finally:
        for host in HOSTS:
            for file in FILES:
                script = f"grep -v '^crowd' {file} > /tmp/users; cat /tmp/users > {file}; rm /tmp/users"
                state.run_in(host, ["sh", "-c", script], check=True)
            script = "cd /var/vmail/users && ls | grep '^crowd' | xargs -r rm -rf"
            state.run_in(host, ["sh", "-c", script], check=True)


def processor_seconds(state: State) -> float:
    """CPU time that Dovecot of the mailbox host has used, with all that it started."""
    said = state.run_in(HOSTS[0], ["cat", DOVECOT], capture_output=True, text=True, check=True).stdout
    return int(said.split()[1]) / 1e6


def _logins(state: State, console: Console, count: int) -> None:
    """Prints what logins cost with so many accounts, and from how many clients on they only wait."""
    table = Table(title=f"{count} accounts, Debian {state.release}", title_justify="left", show_edge=False)
    for column in ("logins", "clients", "a second", "median, s", "slowest, s", "refused", "CPU each, ms", "a core"):
        table.add_column(column, justify="left" if column == "logins" else "right")
    rates: dict[int, float] = {}
    with users_of_the_bench(state, count) as users:
        for turn, at_once in enumerate(AT_ONCE):
            new = users[turn * LOGINS : (turn + 1) * LOGINS]
            for what in ("first", "again"):
                many = {"do": "visit", "count": LOGINS, "users": new, "source": SOURCES[0], "at_once": at_once}
                before = processor_seconds(state)
                running = crowd(state, many)
                (done,) = _ended(running)
                each = (processor_seconds(state) - before) / LOGINS
                rate = done["in"] / done["seconds"]
                if what == "first":
                    rates[at_once] = rate
                marks = (f"{rate:.0f}", f"{done['median']:.2f}", f"{done['slowest']:.2f}", str(len(done["refused"])))
                table.add_row(what, str(at_once), *marks, f"{each * 1000:.0f}", f"{1 / each:.0f}")
    console.print(table)
    knee = next((few for few, more in pairwise(AT_ONCE) if rates[more] < KNEE * rates[few]), AT_ONCE[-1])
    console.print(f"the knee of first logins: {knee} clients at the same time; more of them only wait\n")


def _ended(running: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What became of the steps of clients that end with them."""
    try:
        return answer(running)
    finally:
        assert running.stdin
        running.stdin.close()
        running.wait()


def bench(state: State, console: Console) -> None:
    """Prints a table for each number of accounts, and one of sessions and submissions."""
    for count in ACCOUNTS:
        _logins(state, console, count)
    with users_of_the_bench(state, LOGINS) as users:
        running = crowd(
            state,
            {"do": "submit", "count": 200, "user": ["ann", state.passwords["ann"]], "sources": SOURCES},
            {"do": "stay", "count": SESSIONS, "users": users, "source": SOURCES[0]},
        )
        try:
            submitted, stayed = answer(running)
            memory = state.run_in(HOSTS[0], ["python3", "-c", MEMORY], capture_output=True, text=True, check=True)
        finally:
            assert running.stdin
            running.stdin.close()
            running.wait()
    sessions, kilobytes = map(int, memory.stdout.split())
    table = Table(title=f"Debian {state.release}, all on one machine", title_justify="left", show_edge=False)
    for column in ("", "a second", "slowest, s", "refused"):
        table.add_column(column, justify="right" if column else "left")
    for what, done in (
        (f"sessions that stay, {SESSIONS} of them", stayed),
        ("submissions (587, four mails a connection)", submitted),
    ):
        table.add_row(what, f"{done['in'] / done['seconds']:.0f}", f"{done['slowest']:.2f}", str(len(done["refused"])))
    console.print(table)
    console.print(f"{sessions} IMAP processes at {HOSTS[0]}, {kilobytes / max(1, sessions) / 1024:.1f} MiB each")
