"""The two mailbox hosts as a pair, with users of their own for a while: for tests and for the benchmark."""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lab import faults
from lab.mailboxes import PASSWORD, Mailboxes, Refused, taken
from lab.state import State
from services import dovecot
from sync.sync import CONFIGURATION, Configuration

HOSTS = ("maildrop-oak", "maildrop-elm")
USERS = tuple(f"pair{number:02}" for number in range(1, 25))
PROGRAM = "posthorn-sync"
MOVABLE = 300
"""Mails of each user that a soak may move and expunge, each once."""
FILES = (dovecot.USERS, dovecot.LOGINS)


def ids(count: int) -> list[str]:
    """Message-IDs that were never used."""
    return [f"<{secrets.token_hex(8)}@far.example>" for _ in range(count)]


def eventually(true: Callable[[], Any], seconds: float = 20) -> Any:
    """What a call returns once it is true. Asserts that this happens in time."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


class Pair:
    """Both hosts: ``a`` and ``b`` take requests of `lab.mailboxes`."""

    def __init__(self, state: State, users: Sequence[str] = USERS) -> None:
        self.state, self.users = state, users
        self.a, self.b = (self.open(host) for host in HOSTS)

    def open(self, host: str) -> Mailboxes:
        """One more reader and writer on a host, for what goes on at the same time."""
        return Mailboxes(self.state.command_in(host, []))

    def run(self, host: str, *command: str) -> subprocess.CompletedProcess[str]:
        return self.state.run_in(host, list(command), capture_output=True, text=True)

    def both(self, *command: str) -> list[subprocess.CompletedProcess[str]]:
        return [self.run(host, *command) for host in HOSTS]

    def status(self, host: str) -> dict[str, Any]:
        """The state of a sync service; empty when it does not answer."""
        text = self.run(host, PROGRAM, "status", "--json").stdout
        value: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
        return value

    def quiet(self) -> bool:
        """Whether both services run, see one another, and have nothing to do."""
        states = [self.status(host) for host in HOSTS]
        return all(
            s and s["peer"]["up"] and not s["refused"] and not s["pending"]["users"] and not s["running"]
            and not s["pass"]["left"] and s["pass"]["at"] for s in states
        )  # fmt: skip

    def initiated_by(self, host: str) -> list[str]:
        """Users whose initiator a host is."""
        configuration = Configuration(**json.loads(self.run(host, "cat", str(CONFIGURATION)).stdout))
        return [user for user in self.users if configuration.initiates(user)]

    def look(self, users: Sequence[str] = ()) -> tuple[Any, Any]:
        """What clients see at both hosts."""
        chosen = list(users or self.users)
        self.a.start("look", users=chosen)
        self.b.start("look", users=chosen)
        one, other = self.a.answer(), self.b.answer()
        return taken(one), taken(other)

    def alike(self, users: Sequence[str] = (), seconds: float = 20) -> dict[str, Any]:
        """Waits until clients see the same at both hosts, UIDs and flags included, and returns it."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                one, other = self.look(users)
            except Refused as refused:
                # Dovecot is on its way up.
                wrong = str(refused)
            else:
                if one == other:
                    return dict(one)
                wrong = "\n".join(differences(one, other))
            assert time.monotonic() < deadline, wrong
            time.sleep(0.05)

    def close(self) -> None:
        self.a.close()
        self.b.close()


def differences(one: Any, other: Any) -> list[str]:
    """What is not the same, folder by folder."""
    lines = []
    for user in one:
        for folder in sorted({*one[user], *other[user]}):
            mine, theirs = one[user].get(folder), other[user].get(folder)
            if mine != theirs:
                lines.append(f"{user} {folder}:\n  {mine}\n  {theirs}")
    return lines


def mails(seen: dict[str, Any], user: str) -> list[str]:
    """Every Message-ID of a user, once for each copy."""
    return sorted(mail[1] for folder in seen[user].values() for mail in folder["mails"])


@contextmanager
def cut(pair: Pair, *, black_hole: bool = False) -> Iterator[None]:
    """The hosts do not reach one another."""
    faults.fail(pair.state, "link", "oak-backbone", black_hole=black_hole)
    try:
        yield
    finally:
        faults.heal(pair.state, "link", "oak-backbone")


@dataclass(frozen=True)
class Soaked:
    """What came of writers at both hosts: Message-IDs, and how long it took until both were alike, in seconds."""

    actions: int
    came: set[str]
    lost: set[str]
    doubled: set[str]
    came_back: set[str]
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.actions} actions, {len(self.came)} mails: {len(self.lost)} lost, {len(self.doubled)} doubled, "
            f"{len(self.came_back)} came back; alike after {self.seconds:.1f} s"
        )


def soak(pair: Pair, users: Sequence[str], seconds: float) -> Soaked:
    """Two writers at each host do what users do. Raises `AssertionError` if the hosts are not alike a minute later."""
    # So many that there is still one to move or to expunge at the end.
    known = {user: ids(MOVABLE) for user in users}
    for user in users:
        pair.a.ask("imap", user=user, steps=[["create", "Work"], ["create", "Old"]])
        pair.a.ask("deliver", user=user, ids=known[user])
    pair.alike(users, 60)
    writers = [pair.open(host) for host in (*HOSTS, *HOSTS)]
    for number, writer in enumerate(writers):
        may = {user: known[user][number :: len(writers)] for user in users}
        writer.start("write", may=may, seconds=seconds, seed=secrets.randbelow(1 << 30))
    told = [writer.finish() for writer in writers]
    for writer in writers:
        writer.close()
    came = {message_id for one in told for message_id in one["came"]} | {i for own in known.values() for i in own}
    went = {message_id for one in told for message_id in one["went"]}
    ended = time.monotonic()
    seen = pair.alike(users, 60)
    counted = Counter(message_id for user in users for message_id in mails(seen, user))
    return Soaked(
        actions=sum(one["actions"] for one in told),
        came=came,
        lost=came - went - set(counted),
        doubled={message_id for message_id, number in counted.items() if number > 1},
        came_back=went & set(counted),
        seconds=time.monotonic() - ended,
    )


@contextmanager
def pair_of(state: State, users: Sequence[str] = USERS) -> Iterator[Pair]:
    """Both hosts with some more users, who are gone afterwards."""
    lines = "".join(f"{user}:{{PLAIN}}{PASSWORD}::::::\n" for user in users)
    for host in HOSTS:
        state.run_in(host, ["tee", "-a", *FILES], stdout=subprocess.DEVNULL, input=lines, text=True, check=True)
    pair = Pair(state, users)
    try:
        # Dovecot looks at the time of a file, in seconds.
        known = f"touch {' '.join(FILES)}; doveadm user {users[-1]}"
        eventually(lambda: all(done.returncode == 0 for done in pair.both("sh", "-c", known)))
        for user in users:
            pair.a.ask("deliver", user=user, ids=ids(1))
        # A client opens the folders that everybody has: they come into being at one host, and are carried over.
        pair.a.ask("look", users=list(users))
        pair.run(HOSTS[0], PROGRAM, "now")
        eventually(pair.quiet, 60)
        pair.alike()
        yield pair
    finally:
        pair.close()
        for host in HOSTS:
            for file in FILES:
                state.run_in(
                    host, ["sh", "-c", f"grep -v '^pair' {file} > /tmp/users; cat /tmp/users > {file}"], check=True
                )
            state.run_in(host, ["rm", "-rf", *(f"/var/vmail/users/{user}" for user in users)], check=True)
