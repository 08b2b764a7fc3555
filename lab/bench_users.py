"""What the lab that runs carries: sessions and the memory of one, logins a second, submissions a second.

Users of its own log in at the first front end, as mail programs do. Everything runs on the machine of the lab, clients
too: the figures say more of one release, or of one change, beside another than of a host of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from lab.network import LAN4, STRANGERS
from lab.pair import FILES, HOSTS
from lab.state import LabError, State, stack
from services.dovecot import hashed

USERS = tuple(f"crowd{number:02}" for number in range(1, 61))
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
def users_of_the_bench(state: State) -> Iterator[list[list[str]]]:
    """Users with hashes as ``make password`` makes them, on both mailbox hosts, gone afterwards."""
    lines = "".join(f"{user}:{hashed(PASSWORD)}::::::\n" for user in USERS)
    for host in HOSTS:
        state.run_in(host, ["tee", "-a", *FILES], stdout=subprocess.DEVNULL, input=lines, text=True, check=True)
    try:
        yield [[user, PASSWORD] for user in USERS]
    finally:
        for host in HOSTS:
            for file in FILES:
                script = f"grep -v '^crowd' {file} > /tmp/users; cat /tmp/users > {file}; rm /tmp/users"
                state.run_in(host, ["sh", "-c", script], check=True)
            state.run_in(host, ["rm", "-rf", *(f"/var/vmail/users/{user}" for user in USERS)], check=True)


def bench(state: State, console: Console) -> None:
    """Prints one table."""
    with users_of_the_bench(state) as users:
        many = {"users": users, "source": SOURCES[0]}
        running = crowd(
            state,
            {"do": "visit", "count": len(users), **many},
            {"do": "visit", "count": 5 * len(users), **many},
            {"do": "submit", "count": 200, "user": ["ann", state.passwords["ann"]], "sources": SOURCES},
            {"do": "stay", "count": SESSIONS, **many},
        )
        try:
            first, again, submitted, stayed = answer(running)
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
        ("first logins (IMAPS)", first),
        ("logins of those who were there before", again),
        (f"sessions that stay, {SESSIONS} of them", stayed),
        ("submissions (587, four mails a connection)", submitted),
    ):
        table.add_row(what, f"{done['in'] / done['seconds']:.0f}", f"{done['slowest']:.2f}", str(len(done["refused"])))
    console.print(table)
    console.print(f"{sessions} IMAP processes at {HOSTS[0]}, {kilobytes / max(1, sessions) / 1024:.1f} MiB each")
