"""A working day of the lab's people in a minute: they read, wait, write and click while strangers write to them.

Tells how much of each was done and how long it took, and whether every mail that was taken arrived, once.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from lab import foreign
from lab.network import CLIENT, LAN4, STRANGERS
from lab.people import DOMAIN, FULL
from lab.state import LabError, State, stack
from model.network import Role

ABROAD = "bob@far.example"
WRITERS = 8
"""Mails that strangers hand to their own mail server at once."""
ABROAD_SECONDS = 90.0
SHOWN = 20
"""Of what was wrong, equal words once."""


@dataclass(frozen=True)
class Day:
    """What the people do: how many there are, for how many seconds, and how much a second of each."""

    users: int = 0
    """All of the lab's whose mailboxes are not full, where it is nought."""
    seconds: float = 60.0
    inbound: float = 5.0
    submissions: float = 2.0
    clicks: float = 2.0

    def __post_init__(self) -> None:
        if min(self.users, self.seconds, self.inbound, self.submissions, self.clicks) < 0:
            raise LabError("a day has no less than nothing of anything")


@dataclass
class Told:
    """What became of a day."""

    day: Day
    people: int
    said: dict[str, Any]
    """What the users saw (lab/habits.py)."""
    inbound: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Message-ID of strangers' mails to who they are for, and when they were handed over."""
    abroad: set[str] = field(default_factory=set)
    """Message-IDs of the users' mails that arrived abroad."""

    @property
    def lost(self) -> list[str]:
        """Mails that were taken and did not arrive."""
        gone = [m for m, (to, _) in self.said["submitted"].items() if to == ABROAD and m not in self.abroad]
        return [*self.said["missing"], *gone]

    @property
    def wrong(self) -> list[str]:
        """All that a user would complain about, a sentence each."""
        found = [f"{message_id} did not arrive" for message_id in self.lost]
        for message_id, seen in self.said["arrived"].items():
            found += [
                f"{message_id} arrived {n} times for {user}" for user, n in Counter(u for u, _ in seen).items() if n > 1
            ]
            wanted = self.inbound.get(message_id) or self.said["submitted"].get(message_id)
            found += [f"{message_id} came to {user}" for user, _ in seen if wanted and wanted[0] != f"{user}@{DOMAIN}"]
        for what in ("logins", "mails", "pages"):
            found += [f"{what}: {words}" for words in self.said[what]["refused"]]
        return [*found, *(f"a session ended: {words}" for words in self.said["ended"])]

    def ways(self, mails: dict[str, tuple[str, float]]) -> list[float]:
        """Seconds from when mails were taken to when a session of their user was told."""
        arrived = self.said["arrived"]
        return [arrived[message_id][0][1] - at for message_id, (_, at) in mails.items() if message_id in arrived]

    def table(self) -> Table:
        """For people."""
        day, said = self.day, self.said
        table = Table(title=f"{self.people} users for {day.seconds:.0f} s", title_justify="left", show_edge=False)
        for column in ("", "done", "a second", "median, s", "95 %", "slowest", "refused"):
            table.add_column(column, justify="right" if column else "left")

        def row(what: str, times: Sequence[float], seconds: float, refused: int = 0) -> None:
            ordered = sorted(times) or [0.0]
            marks = (ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)], ordered[-1])
            rate = f"{len(times) / seconds:.1f}" if seconds else ""
            table.add_row(what, str(len(times)), rate, *(f"{mark:.2f}" for mark in marks), str(refused))

        logins, mails, pages = said["logins"], said["mails"], said["pages"]
        row("IMAP sessions opened, that wait (IDLE)", logins["times"], said["opened_in"], len(logins["refused"]))
        row("mails submitted (465, each with a login)", mails["times"], day.seconds, len(mails["refused"]))
        row("pages of the webmail", pages["times"], day.seconds, len(pages["refused"]))
        row("mails from abroad, until the user is told", self.ways(self.inbound), day.seconds)
        row("mails among users, until the user is told", self.ways(said["submitted"]), day.seconds)
        row("mails that arrived abroad", [0.0] * len(self.abroad), day.seconds)
        return table


def live(state: State, day: Day) -> Told:
    """Lets the people live a day. Raises `LabError` where it cannot begin."""
    people = [name for name in state.people if name not in FULL]
    if not 1 <= (day.users or len(people)) <= len(people):
        more = "make lab-down first, and start one with more (POSTHORN_PEOPLE)"
        raise LabError(f"this lab has {len(people)} people whose mailboxes are not full: {more}")
    people = people[: day.users or len(people)]
    doors = [host.addresses.public[0] for host in stack().hosts_with(Role.FRONTEND) if host.addresses.public]
    request = {
        "doors": [str(door) for door in doors],
        "imap": f"imap.{DOMAIN}",
        "smtp": f"smtp-out.{DOMAIN}",
        "webmail": f"webmail.{DOMAIN}",
        "authority": str(state.authority_file),
        "users": [(name, state.passwords[name]) for name in people],
        "domain": DOMAIN,
        "abroad": ABROAD,
        "sources": [f"{LAN4}.{last}" for last in STRANGERS if last not in range(66, 73)],
        "at_home": f"{LAN4}.{CLIENT}",
        "seconds": day.seconds,
        "submissions": day.submissions,
        "clicks": day.clicks,
    }
    command = state.command_in("client", [state.python, "-m", "lab.habits"])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin and running.stdout
        running.stdin.write(json.dumps(request) + "\n")
        running.stdin.flush()
        if running.stdout.readline().strip() != "ready":
            raise LabError("the people of the lab did not begin their day: see above")
        inbound = _write_to(state, people, day)
        running.stdin.write(json.dumps(list(inbound)) + "\n")
        running.stdin.flush()
        said = json.loads(running.stdout.readline() or "null")
    if said is None:
        raise LabError("the people of the lab did not end their day: see above")
    abroad = {message_id for message_id, (to, _) in said["submitted"].items() if to == ABROAD}
    return Told(day, len(people), said, inbound, _arrived_abroad(state, abroad))


def _write_to(state: State, people: Sequence[str], day: Day) -> dict[str, tuple[str, float]]:
    """Strangers write to the people at a rate. Returns Message-ID to address and time."""
    began, sent = time.monotonic(), dict[str, tuple[str, float]]()

    def write(number: int) -> None:
        time.sleep(max(0.0, began + number / day.inbound - time.monotonic()))
        to, at = f"{random.choice(people)}@{DOMAIN}", time.time()
        sent[foreign.send(state, sender=ABROAD, to=to, subject="A word from abroad")] = (to, at)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(int(day.inbound * day.seconds))))
    return sent


def _arrived_abroad(state: State, wanted: set[str]) -> set[str]:
    """Which of some mails the mailbox abroad has, waited for."""
    deadline = time.monotonic() + ABROAD_SECONDS
    while True:
        heads = [mail.partition("\n\n")[0] for mail in foreign.mails(state)]
        found = {message_id for message_id in wanted if any(message_id in head for head in heads)}
        if found == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def load(state: State, console: Console, day: Day) -> bool:
    """Prints the table of a day, and whatever was wrong. Returns whether nothing was."""
    told = live(state, day)
    console.print(told.table())
    wrong = Counter(told.wrong)
    for words, times in wrong.most_common(SHOWN):
        console.print(f"{words}{f' ({times} times)' if times > 1 else ''}", style="red", markup=False)
    if len(wrong) > SHOWN:
        console.print(f"… and {len(wrong) - SHOWN} more", style="red")
    if not told.wrong:
        console.print("every mail that was taken arrived, once; nobody was refused, and no session ended")
    return not told.wrong
