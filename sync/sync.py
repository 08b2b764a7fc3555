#!/usr/bin/python3
"""posthorn-sync: keeps the mailboxes of two hosts alike, and keeps a wrong store from serving or being copied.

Dovecot says by its event exporter who changed something; of each user one host is the initiator, and runs
`doveadm sync` with the other. Whatever was missed (this program was down, the peer was away) a pass over all users
finds: at the start, when the peer returns, and every some minutes. Runs as the owner of the mail, with Python's
standard library alone.

Only one form of the command is right, on Dovecot 2.3 and 2.4 alike: in full (-f), since the quick and the stateful
comparison overlook changes; with a lock (-l), since both sides may start at once; and never as a backup, which deletes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import grp
import hashlib
import heapq
import hmac
import http.client
import inspect
import json
import math
import os
import pwd
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIGURATION, TOKEN = Path("/etc/posthorn-sync/sync.json"), Path("/etc/posthorn-sync/token")
STATE = Path("/var/lib/posthorn-sync")
DOVECOT_OPTIONS, FILLING = Path("/run/posthorn-sync/dovecot"), Path("/run/posthorn-sync/filling")
"""What Dovecot's unit adds to its command, written before each start. The second is there while it serves nobody."""

WORKERS = 3
"""Syncs that run at once: each also takes a process at the peer."""
DEBOUNCE_SECONDS = 0.03
"""A mail client sends several commands in a row: one sync is enough for them."""
BACK_OFF_SECONDS, LONGEST_BACK_OFF = 0.2, 60.0
"""Of one user whose sync fails, doubled each time."""
GATE_SECONDS, LONGEST_GATE = 0.25, 3.0
"""Between tries with those whose syncs failed, while the way itself is in doubt."""
PROBE_SECONDS, PROBE_AGAIN, PROBE_TIMEOUT = 1.0, 0.5, 2.0
ALONE_AFTER = 3.0
"""So long has the peer's daemon to be silent before this one works for its users too."""
PASS_SECONDS = 720.0
"""Between two passes over the own users, give or take a tenth."""
ALONE_PASS_SECONDS, ALONE_PASS_SHARE = 30.0, 10
"""Passes while alone, when nobody tells of changes at the peer: at most a tenth of the time is spent on them."""
AUDIT_SECONDS, FIRST_AUDIT, AUDIT_AGAIN, AUDIT_TRIES = 86400.0, 600.0, 3600.0, 3
STUCK_TRIES, STUCK_SECONDS = 5, 60.0
LONGEST_SYNC = 3600.0
"""A first copy of a large mailbox takes its time. A stalled one ends by itself (-T)."""
LOCK_SECONDS, SILENT_SECONDS = 10, 15
"""How long a sync waits for the lock of a mailbox (-l), and for a word of the other side (-T), which says nothing while
it waits for the lock: so the first has to be the shorter one."""
LONGEST_SILENCE = 30.0
"""A command that only asks something, or a mail that is read: Dovecot hangs after that."""
NO_SUCH_USER, AGAIN = 67, 2
"""Exit statuses of doveadm: EX_NOUSER of sysexits.h, here or at the peer, and "something changed meanwhile"."""
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
KNOWN_AT_ONE = -NO_SUCH_USER
"""Our own: one host knows the user, and the other one does not."""
LARGEST_REQUEST = 1 << 20
MASTER = Path("/run/dovecot/master.pid")
"""Dovecot writes it at each start."""
NAME = re.compile(r"[\w.+][\w.+-]{0,254}")
"""What can be an account: no option of a command, no mask, and no address."""


def say(line: str, level: int = 6) -> None:
    """A line for the journal, with its level (sd-daemon(3))."""
    print(f"<{level}>{line}", flush=True)


def write(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    os.replace(name, path)


def read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing when there is none."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        return value
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class Configuration:
    """What the stack says, as services/replication.py writes it."""

    host: str
    peer: str | None
    store: Path
    homes: Path
    owner: str
    listen: int
    to_peer: int
    to_doveadm: int

    @staticmethod
    def load(path: Path = CONFIGURATION) -> Configuration:
        values = json.loads(path.read_text())
        return Configuration(**values | {name: Path(values[name]) for name in ("store", "homes")})

    def initiates(self, user: str) -> bool:
        """Whether this host is the one that syncs a user: both know, and half of all users is each one's."""
        if self.peer is None:
            return False
        half = hashlib.sha256(user.encode()).digest()[0] & 1
        return sorted((self.host, self.peer))[half] == self.host


# ---------------------------------------------------------------------------------------------------------------------
# The store: which disk it is that mail is kept on


def mount_points() -> set[str]:
    """Where something is mounted, as this process sees it (proc(5), the fifth field of mountinfo)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line.split()[4].encode().decode("unicode_escape") for line in lines}


class Store:
    """The folder that holds all mail. An identity in it, known outside it too, tells it from an empty or foreign one.

    The homes of the users lie in a folder below it that nobody but this program makes, and that no program of
    Dovecot's can make: so nothing is ever delivered beside the disk.
    """

    def __init__(self, configuration: Configuration, state: Path = STATE) -> None:
        self.path, self.homes, self.owner = configuration.store, configuration.homes, configuration.owner
        self.marker = self.path / "store.json"
        self.known_file, self.seen_file = state / "store.json", state / "homes.json"

    @property
    def known(self) -> dict[str, Any]:
        """What this host remembers: ``id``, whether it was ``mounted``.

        ``new`` is an identity that the peer has to take up, ``filling`` a store that has yet to get what the peer has.
        """
        return read(self.known_file)

    @property
    def id(self) -> str:
        return str(self.known.get("id", ""))

    def problem(self) -> str | None:
        """Why this store must neither serve nor be compared, in a sentence; None when it is the right one."""
        try:
            return self._problem()
        except (OSError, ValueError) as error:
            return f"the store {self.path} cannot be read ({error})"

    def _problem(self) -> str | None:
        known, found = self.known, read(self.marker)
        if not known:
            return f"the store {self.path} was not made known to this host yet"
        if known["mounted"] and str(self.path) not in mount_points():
            return f"the disk of {self.path} is not mounted"
        if not found:
            return f"the store {self.path} is empty or lost: it has no {self.marker.name}, and had {known['id']}"
        if found["id"] != known["id"]:
            return f"the store {self.path} is a foreign one: it is {found['id']}, and has to be {known['id']}"
        if not self.homes.is_dir():
            return f"the store {self.path} has lost its folder {self.homes}"
        if read(self.seen_file).get("some") and not self.has_homes():
            return f"the store {self.path} has lost the mailboxes of all users"
        return None

    def remember_homes(self) -> None:
        """Notes that there are mailboxes: from now on, none at all means that they were lost."""
        if not read(self.seen_file).get("some") and self.has_homes():
            write(self.seen_file, {"some": True})

    def has_homes(self) -> bool:
        with os.scandir(self.homes) as homes:
            return next(homes, None) is not None

    def open(self, had_store: Callable[[], bool] = lambda: False) -> str | None:
        """As root, before Dovecot starts: takes up the store of a new host, and refuses a wrong one with a sentence.

        A host that knows no store takes the one that it finds (its system disk was made anew), or begins one: which is
        not shown to users before the operator's word has filled it, if it had one before.
        """
        if not self.known:
            found = read(self.marker)
            if found:
                self._know(found["id"])
            elif self.homes.is_dir():
                return f"the store {self.path} has mail, but no {self.marker.name}: posthorn-sync reseed takes it up"
            else:
                self.begin(filling=had_store())
        return self.problem()

    def begin(self, *, new: bool = False, filling: bool = False) -> str:
        """As root: gives the store an identity of its own, and makes the folder of the homes. Returns the identity."""
        user, group = pwd.getpwnam(self.owner), grp.getgrnam(self.owner)
        if not self.homes.is_dir():
            self.homes.mkdir(mode=0o700)
            os.chown(self.homes, user.pw_uid, group.gr_gid)
        identity = secrets.token_hex(8)
        self.seen_file.unlink(missing_ok=True)
        write(self.marker, {"id": identity})
        self._know(identity, new=new, filling=filling)
        return identity

    def _know(self, identity: str, **more: bool) -> None:
        mounted = str(self.path) in mount_points()
        write(self.known_file, {"id": identity, "mounted": mounted, "new": False, "filling": False, **more})

    def change(self, **more: bool) -> None:
        """Notes what became of a reseeding."""
        write(self.known_file, {**self.known, **more})


# ---------------------------------------------------------------------------------------------------------------------
# Who waits for a sync


@dataclass
class Waiting:
    """A user whose mailboxes may differ. ``since`` is wall-clock time, ``due`` monotonic time, both in seconds."""

    since: float
    due: float
    urgent: bool
    tries: int = 0
    said: str = ""


Kind = tuple[bool, int]
"""Whether users are urgent, and how often their syncs failed. Of one kind, whoever has waited longest goes first."""


@dataclass
class Row:
    """Users of one kind, in two heaps. Entries that are not true any more are passed over when they come up."""

    later: list[tuple[float, str]] = field(default_factory=list)
    """By when they are due."""
    ready: list[tuple[float, str, float]] = field(default_factory=list)
    """Those who are due, by since when they wait; and when they were due."""


@dataclass
class Queue:
    """Users to sync: those who changed something first, then those of a pass.

    A look at all of them for each who is taken would cost a host with ten thousand users minutes of each pass.
    """

    waiting: dict[str, Waiting] = field(default_factory=dict)
    running: dict[str, Waiting] = field(default_factory=dict)
    rows: dict[Kind, Row] = field(default_factory=dict)
    """Those of ``waiting`` who do not run."""
    failing: set[str] = field(default_factory=set)
    """Users whose syncs failed since the last one that went well: with two, the way itself is in doubt."""
    in_row: int = 0
    """How many syncs failed since then."""
    gate: float = 0.0
    """Until then (monotonic) nothing starts."""

    def mark(self, user: str, since: float, now: float, *, urgent: bool = True) -> None:
        """A user changed something, or is due in a pass. What is known of him already stays."""
        entry = self.waiting.get(user)
        if entry is None:
            entry = self.waiting[user] = Waiting(since, now + DEBOUNCE_SECONDS, urgent)
        elif urgent and not entry.urgent:
            entry.since, entry.urgent = since, True
        elif since < entry.since:
            entry.since = since
        else:
            return
        self._line_up(user)

    def _line_up(self, user: str) -> None:
        """Puts a user into his row. Who runs already is put there by the end of that sync: it may have read before."""
        entry = self.waiting.get(user)
        if entry and user not in self.running:
            row = self.rows.setdefault((entry.urgent, entry.tries), Row())
            heapq.heappush(row.later, (entry.due, user))

    @property
    def in_doubt(self) -> bool:
        """Whether the way to the peer seems closed, rather than one user's mailbox broken."""
        return len(self.failing) > 1

    def take(self, now: float) -> str | None:
        """The next user whose time has come."""
        for kind in sorted(self.rows, key=self._rank):
            opens = self._opens(kind)
            if opens is None or opens > now:
                continue
            self._come_up(kind, now)
            if ready := self.rows[kind].ready:
                user = heapq.heappop(ready)[1]
                self.running[user] = self.waiting.pop(user)
                return user
            if not self.rows[kind].later:
                del self.rows[kind]
        return None

    def next_due(self) -> float | None:
        """When `take` may find somebody again (monotonic), if nothing else happens."""
        times = []
        for kind, row in self.rows.items():
            if (opens := self._opens(kind)) is None:
                continue
            self._come_up(kind)
            if row.ready:
                times.append(max(row.ready[0][2], opens))
            if row.later:
                times.append(max(row.later[0][0], opens))
        return min(times, default=None)

    def _come_up(self, kind: Kind, now: float = -math.inf) -> None:
        """Moves those who are due to the ready ones of their row, and drops from both heads what is no longer true."""
        row = self.rows[kind]
        while row.later:
            due, user = row.later[0]
            entry = self._entry(kind, user)
            if entry and entry.due == due > now:
                break
            heapq.heappop(row.later)
            if entry and entry.due == due:
                heapq.heappush(row.ready, (entry.since, user, due))
        while row.ready:
            since, user, due = row.ready[0]
            entry = self._entry(kind, user)
            if entry and (entry.since, entry.due) == (since, due):
                break
            heapq.heappop(row.ready)

    def _entry(self, kind: Kind, user: str) -> Waiting | None:
        entry = self.waiting.get(user)
        return entry if entry and user not in self.running and (entry.urgent, entry.tries) == kind else None

    def _rank(self, kind: Kind) -> tuple[int, bool, int]:
        urgent, tries = kind
        return tries if self.in_doubt else 0, not urgent, tries

    def _opens(self, kind: Kind) -> float | None:
        """When users of a kind may start, if they are due; None if another has to end first.

        Whoever just changed something is tried whatever becomes of others: one worker is kept free of those whose syncs
        failed.
        """
        if len(self.running) >= WORKERS:
            return None
        urgent, tries = kind
        if not self._waits_for_others(urgent, tries):
            return 0.0
        busy = sum(self._waits_for_others(running.urgent, running.tries) for running in self.running.values())
        return self.gate if busy < (1 if self.in_doubt else WORKERS - 1) else None

    def _waits_for_others(self, urgent: bool, tries: int) -> bool:
        return tries > 0 or (self.in_doubt and not urgent)

    def done(self, user: str) -> Waiting:
        """A sync went well: the way is open."""
        self._open()
        entry = self.running.pop(user)
        self._line_up(user)
        return entry

    def _open(self) -> None:
        self.failing.clear()
        self.in_row, self.gate = 0, 0.0

    def again(self, user: str, now: float, said: str) -> None:
        """Something changed meanwhile: soon once more. That is no failure, and under load quite normal."""
        self._open()
        self._return(user, now, said, most=STUCK_TRIES - 1)

    def refused(self, user: str, now: float, said: str) -> None:
        """Only one host knows the user: the way is open, and he fails alone."""
        self._open()
        self._return(user, now, said)

    def failed(self, user: str, now: float, said: str) -> None:
        self.in_row += 1
        self.failing.add(user)
        if self.in_doubt:
            self.gate = now + min(GATE_SECONDS * 2 ** min(self.in_row - 2, 10), LONGEST_GATE)
        self._return(user, now, said)

    def _return(self, user: str, now: float, said: str, most: int = 1 << 30) -> None:
        entry = self.running.pop(user)
        newer = self.waiting.get(user)
        entry.tries, entry.said = min(entry.tries + 1, most), said
        entry.urgent = entry.urgent or bool(newer and newer.urgent)
        # When the way is closed it is the gate that spares it: all are to follow soon after it has opened.
        longest = LONGEST_GATE if self.in_doubt else LONGEST_BACK_OFF
        entry.due = now + min(BACK_OFF_SECONDS * 2 ** min(entry.tries - 1, 20), longest)
        self.waiting[user] = entry
        self._line_up(user)

    def forget(self, user: str) -> None:
        self.running.pop(user, None)
        self.waiting.pop(user, None)

    def hurry(self) -> None:
        """Whoever waits is due now: the way is open again."""
        self._open()
        for entry in self.waiting.values():
            entry.due, entry.tries = 0.0, 0
        self.rows.clear()
        for user in self.waiting:
            self._line_up(user)

    def pending(self) -> dict[str, Waiting]:
        """All who changed something that is not at the peer yet, and all whose sync failed."""
        both = {**self.waiting, **self.running}
        return {user: entry for user, entry in both.items() if entry.urgent or entry.tries}

    def stuck(self, now: float) -> dict[str, Waiting]:
        """Users who failed again and again: somebody should look. ``now`` is wall-clock time."""
        return {
            user: entry
            for user, entry in self.pending().items()
            if entry.tries >= STUCK_TRIES or (entry.tries and now - entry.since > STUCK_SECONDS)
        }


class Numbers:
    """What is counted, for people and for Prometheus."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("done", "again", "failed", "events", "handed_over", "taken_over"), 0)
        self.lags: deque[float] = deque(maxlen=1000)
        self.buckets = dict.fromkeys(BUCKETS, 0)
        self.lag_sum, self.lag_count = 0.0, 0

    def lag(self, seconds: float) -> None:
        """From a change to its being at the peer."""
        self.lags.append(seconds)
        self.lag_sum, self.lag_count = self.lag_sum + seconds, self.lag_count + 1
        for bound in BUCKETS:
            self.buckets[bound] += seconds <= bound

    def summary(self) -> dict[str, float | None]:
        ordered = sorted(self.lags)

        def at(share: float) -> float | None:
            return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 4) if ordered else None

        return {"p50": at(0.5), "p95": at(0.95), "max": at(1.0), "of": len(ordered)}


# ---------------------------------------------------------------------------------------------------------------------
# HTTP: a small part of it, on loopback


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        value = json.loads(self.body or b"{}")
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value


async def read_head(stream: asyncio.StreamReader) -> tuple[str, dict[str, str]] | None:
    """The first line and the headers of a message (RFC 9112); None at the end of the connection."""
    first = (await stream.readline()).decode("latin-1").strip()
    if not first:
        return None
    headers: dict[str, str] = {}
    while line := (await stream.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return first, headers


async def read_request(stream: asyncio.StreamReader) -> Request | None:
    head = await read_head(stream)
    if head is None:
        return None
    method, path, *_ = [*head[0].split(), "", ""]
    length = int(head[1].get("content-length", "0"))
    if not 0 <= length <= LARGEST_REQUEST:
        raise ValueError("too large")
    return Request(method, path, head[1], await stream.readexactly(length))


class Line:
    """A connection to the peer's daemon that is kept, so that not every word needs a TLS handshake."""

    def __init__(self, port: int, token: str) -> None:
        self.port, self.token = port, token
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.lock = asyncio.Lock()

    async def ask(self, path: str, value: Any, seconds: float = PROBE_TIMEOUT) -> dict[str, Any]:
        """Posts JSON and returns the JSON of the answer. Raises `OSError` where there is none."""
        async with self.lock:
            try:
                return await asyncio.wait_for(self._ask(path, value), seconds)
            except (EOFError, ValueError, OSError) as error:
                self.close()
                raise OSError(str(error) or type(error).__name__) from None

    async def _ask(self, path: str, value: Any) -> dict[str, Any]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        body = json.dumps(value).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: peer\r\nAuthorization: Bearer {self.token}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        answered = await read_head(reader)
        if answered is None:
            raise EOFError("the connection was closed")
        content = await reader.readexactly(int(answered[1].get("content-length", "0")))
        if answered[0].split()[1:2] != ["200"]:
            raise ValueError(f"{answered[0]}: {content.decode(errors='replace').strip()}")
        result: dict[str, Any] = json.loads(content)
        return result

    def close(self) -> None:
        if self.streams:
            self.streams[1].close()
        self.streams = None


# ---------------------------------------------------------------------------------------------------------------------
# The daemon


class Peer:
    """What is known of the other host."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file
        self.up = False
        self.changed = time.time()
        self.silent_since = time.monotonic()
        self.boot = ""
        kept = read(file)
        self.store = str(kept.get("store", ""))
        self.unlike: str | None = kept.get("unlike", None if self.store else f"{name} was not heard of yet")
        """Why the stores are not to be compared, as of its last word: that counts while it is silent, too."""
        self.disowns = False
        """Whether it knows this host with another store."""

    def met(self, word: dict[str, Any], here: dict[str, Any]) -> None:
        """Takes in what the peer says of itself. ``here`` is what this host remembers of its own store."""
        before = self.store, self.unlike
        identity = str(word.get("store", ""))
        if identity and identity != self.store and (not self.store or word.get("new")):
            self.store = identity
        self.disowns = not here.get("new") and word.get("knows") not in ("", None, here.get("id"))
        self.unlike = None
        if word.get("problem"):
            self.unlike = f"{self.name}: {word['problem']}"
        elif identity != self.store:
            self.unlike = (
                f"{self.name} has another store than before ({identity}, not {self.store}): "
                f"if that is meant, say posthorn-sync reseed at {self.name}"
            )
        elif here.get("new") and word.get("knows") != here.get("id"):
            self.unlike = f"{self.name} has yet to take up the new store of this host"
        elif self.disowns:
            self.unlike = (
                f"{self.name} knows this host with another store ({word['knows']}, not {here.get('id')}): "
                "if that is meant, say posthorn-sync reseed here"
            )
        if before != (self.store, self.unlike):
            write(self.file, {"store": self.store, "unlike": self.unlike})


class Daemon:
    """All parts together, in one thread."""

    def __init__(self, configuration: Configuration, token: str, state: Path = STATE) -> None:
        assert configuration.peer
        self.configuration, self.token, self.state = configuration, token, state
        self.store = Store(configuration, state)
        self.peer = Peer(configuration.peer, state / "peer.json")
        self.line = Line(configuration.to_peer, token)
        self.queue, self.numbers = Queue(), Numbers()
        self.outbox: dict[str, float] = {}
        """Users of the peer who changed something here, and since when: until it says that it knows."""
        self.boot = secrets.token_hex(8)
        self.started = time.time()
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.last: dict[str, dict[str, Any]] = {}
        """User to how his last sync went."""
        self.changed: dict[str, float] = {}
        """User to when he last changed something, as far as this host was told."""
        self.refused: str | None = "not looked at yet"
        self.alone = False
        self.filling = False
        """Whether this store is new, and is being filled: then this host syncs all users, to know when that is done."""
        self.everybody = True
        """Whether the next pass is over the peer's users too: as at the start, when changes of theirs may be missed."""
        self.dovecots: dict[str, str] = {}
        """When Dovecot was started, here and at the peer."""
        self.auditing = asyncio.Lock()
        self.stir = asyncio.Event()
        self.post = asyncio.Event()
        self.pass_due, self.pass_started, self.pass_seconds = 0.0, 0.0, 0.0
        self.pass_at, self.pass_users = 0.0, 0
        self.pass_left: set[str] = set()
        self.audit: dict[str, Any] = {"at": None, "users": 0, "differences": {}} | read(state / "audit.json")
        if self.audit["at"]:
            # A time that is yet to come is that of a clock that was wrong: the next audit would be as far away.
            self.audit["at"] = min(self.audit["at"], self.started)
        self.tasks: set[asyncio.Future[None]] = set()
        self.broken: asyncio.Future[None] | None = None

    # Marking

    def mark(self, user: str, since: float | None = None, *, urgent: bool = True) -> None:
        """Somebody's mailboxes may differ: he is synced here, or handed over."""
        now = time.time()
        when = min(since or now, now)
        if urgent:
            self.changed[user] = now
        if self.configuration.initiates(user) or self.alone or self.filling:
            self.queue.mark(user, when, time.monotonic(), urgent=urgent)
            self.stir.set()
        if not self.configuration.initiates(user):
            self.outbox[user] = min(self.outbox.get(user, when), when)
            self.post.set()

    async def users(self) -> list[str]:
        """All users that Dovecot knows here."""
        code, output, said = await self.command("doveadm", "user", "*")
        if code:
            raise OSError(f"doveadm user: {said}")
        return output.split()

    async def knows(self, user: str) -> bool:
        """Whether Dovecot knows a user here. Raises `OSError` when it cannot say."""
        code, _, said = await self.command("doveadm", "user", user)
        if code not in (0, NO_SUCH_USER):
            raise OSError(f"doveadm user: {said}")
        return code == 0

    async def known_at_one(self, user: str) -> str | None:
        """The host that does not know a user whom the other one knows. None when neither does: then he is gone."""
        if await self.knows(user):
            return self.peer.name
        answer = await self.ask_apart("/peer/knows", {"user": user}, LONGEST_SILENCE)
        return self.configuration.host if answer["known"] else None

    async def command(
        self, *words: str, seconds: float = LONGEST_SILENCE, syncs: str | None = None
    ) -> tuple[int, str, str]:
        """Runs a command to its end, or for some seconds. Returns its status, what it prints, and its last words.

        ``syncs`` is the user whose sync it is: those are ended when the peer is gone.
        """
        process = await asyncio.create_subprocess_exec(
            *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if syncs:
            self.processes[syncs] = process
        try:
            output, errors = await asyncio.wait_for(process.communicate(), seconds)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            return 75, "", f"{words[0]}: no answer in {seconds:.0f} s"
        finally:
            if syncs:
                del self.processes[syncs]
        return process.returncode or 0, output.decode(errors="replace"), last_words(errors)

    # Syncing

    async def work(self) -> None:
        """Starts syncs as users become due and as workers are free."""
        while True:
            self.stir.clear()
            if self.allowed() and (user := self.queue.take(time.monotonic())):
                self.spawn(self.sync(user))
                continue
            due = self.queue.next_due()
            wait = PROBE_SECONDS if due is None else min(max(due - time.monotonic(), 0.002), PROBE_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stir.wait(), wait)

    def spawn(self, work: Awaitable[None]) -> None:
        """Lets something run beside the rest. What it did not expect ends the daemon, to be started anew."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)

        def ended(task: asyncio.Future[None]) -> None:
            self.tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) and self.broken and not self.broken.done():
                self.broken.set_exception(error)

        task.add_done_callback(ended)

    def allowed(self) -> bool:
        """Whether both stores are the right ones, as far as is known. Says so when that changes."""
        mine = self.store.problem()
        reason = mine or self.peer.unlike
        if reason != self.refused:
            # A new pair has yet to meet: that is no trouble.
            wrong = mine or (reason and self.peer.store)
            say(f"nothing is synced: {reason}" if reason else "stores are the right ones: syncing", 3 if wrong else 5)
            if self.refused and not reason:
                self.everybody, self.pass_due = True, 0.0
            self.refused = reason
        filling = bool(self.store.known.get("filling"))
        if filling and not self.filling:
            # Only a pass that begins now says when it is full.
            self.everybody, self.pass_due, self.pass_at, self.pass_left = True, 0.0, 0.0, set()
        self.filling = filling
        return reason is None

    async def sync(self, user: str) -> None:
        """One run of doveadm, and what follows from its end."""
        started, entry = time.time(), self.queue.running[user]
        way = f"tcp:127.0.0.1:{self.configuration.to_doveadm}"
        patience = ("-l", str(LOCK_SECONDS), "-T", str(SILENT_SECONDS))
        words = ("doveadm", "sync", "-u", user, *patience, "-f", way)
        try:
            code, _, said = await self.command(*words, seconds=LONGEST_SYNC, syncs=user)
            said = said or f"exit status {code}"
            if code == NO_SUCH_USER and (where := await self.known_at_one(user)):
                code, said = KNOWN_AT_ONE, f"not known at {where}: run make up"
        except OSError as error:
            code, said = 75, str(error)
        now, took = time.time(), time.time() - started
        self.last[user] = {"at": now, "seconds": round(took, 3), "status": code, "said": said if code else ""}
        if code == 0:
            self.numbers.counts["done"] += 1
            self.queue.done(user)
            if entry.urgent:
                self.numbers.lag(now - entry.since)
            if self.outbox.get(user, now) <= started:
                del self.outbox[user]
        elif code == NO_SUCH_USER:
            self.queue.forget(user)
            self.outbox.pop(user, None)
            self.changed.pop(user, None)
            del self.last[user]
        elif code == AGAIN:
            self.numbers.counts["again"] += 1
            self.queue.again(user, time.monotonic(), said)
        else:
            self.numbers.counts["failed"] += 1
            failed = self.queue.refused if code == KNOWN_AT_ONE else self.queue.failed
            failed(user, time.monotonic(), said)
            if entry.tries == STUCK_TRIES and self.peer.up:
                say(f"{user} could not be synced {entry.tries} times: {said}", 4)
        if code in (0, NO_SUCH_USER) and user in self.pass_left:
            self.pass_left.discard(user)
            if not self.pass_left:
                self.pass_seconds = time.monotonic() - self.pass_started
        self.stir.set()

    # Passes

    async def passes(self) -> None:
        """Marks everybody, again and again: what no event told of is found by that."""
        complained = False
        while True:
            # A store is full when one pass over everybody has ended: no other begins meanwhile.
            if time.monotonic() >= self.pass_due and self.refused is None and not (self.filling and self.pass_left):
                wanted, self.everybody = self.everybody, False
                try:
                    await self.make_pass(everybody=wanted or self.alone or self.filling)
                    complained = False
                except OSError as error:
                    # Dovecot is down here: nothing can be synced either.
                    if not complained:
                        say(f"no pass over all users: {error}", 4)
                    complained, self.pass_due = True, time.monotonic() + 1.0
                    self.everybody = self.everybody or wanted
            await asyncio.sleep(0.2)

    async def make_pass(self, *, everybody: bool) -> None:
        self.pass_started = time.monotonic()
        every = max(ALONE_PASS_SECONDS, ALONE_PASS_SHARE * self.pass_seconds) if self.alone else PASS_SECONDS
        self.pass_due = self.pass_started + every * random.uniform(0.9, 1.1)
        users = await self.users()
        self.store.remember_homes()
        # Of those who are no users any more nothing is kept.
        known = set(users)
        self.changed = {user: at for user, at in self.changed.items() if user in known}
        mine = [user for user in users if everybody or self.configuration.initiates(user)]
        self.pass_left = {u for u in mine if self.configuration.initiates(u) or self.alone or self.filling}
        self.pass_at, self.pass_users = time.time(), len(users)
        for user in mine:
            self.mark(user, urgent=False)

    # The peer

    async def keep_in_touch(self) -> None:
        """Asks the peer's daemon whether it is there, and what store it has."""
        while True:
            self.dovecot_runs("here", dovecot_started())
            try:
                word = await self.line.ask("/peer/hello", self.introduction())
            except OSError as error:
                self.missed(str(error))
            else:
                self.met(word)
            await asyncio.sleep(PROBE_SECONDS if self.peer.up else PROBE_AGAIN)

    def introduction(self) -> dict[str, Any]:
        """What the peer has to know of this host."""
        known = self.store.known
        return {
            "host": self.configuration.host,
            "boot": self.boot,
            "dovecot": dovecot_started(),
            "store": known.get("id", ""),
            "new": bool(known.get("new")),
            "problem": self.store.problem(),
            "knows": self.peer.store,
        }

    def met(self, word: dict[str, Any]) -> None:
        """The peer spoke: it may have returned, or have been started anew."""
        known = self.store.known
        if known.get("new") and word.get("knows") == known["id"]:
            self.store.change(new=False)
            known["new"] = False
        self.peer.met(word, known)
        self.dovecot_runs("there", str(word.get("dovecot", "")))
        returned = not self.peer.up or self.peer.boot != word.get("boot")
        if not self.peer.up:
            say(f"{self.peer.name} is there", 5)
            self.peer.changed = time.time()
        self.peer.up, self.peer.boot, self.alone = True, str(word.get("boot")), False
        if returned:
            self.queue.hurry()
            self.pass_due = 0.0
            self.post.set()
            self.stir.set()

    def dovecot_runs(self, where: str, since: str) -> None:
        """Dovecot was started: whoever failed for want of it has not to wait until he is tried again."""
        if since and since != self.dovecots.get(where):
            self.queue.hurry()
            self.stir.set()
        self.dovecots[where] = since

    async def ask_apart(self, path: str, value: Any, seconds: float) -> dict[str, Any]:
        """Asks the peer what may take its time: over a connection of its own, so that nobody takes it for silent."""
        line = Line(self.configuration.to_peer, self.token)
        try:
            return await line.ask(path, value, seconds)
        finally:
            line.close()

    def missed(self, why: str) -> None:
        """The peer's daemon does not answer. After a while its users are this one's too."""
        now = time.monotonic()
        if self.peer.up:
            say(f"{self.peer.name} does not answer: {why}", 4)
            self.peer.up, self.peer.changed, self.peer.silent_since = False, time.time(), now
            for process in self.processes.values():
                # It waits for a peer that may be gone; whoever was synced by it stays dirty.
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        if not self.alone and now - self.peer.silent_since > ALONE_AFTER:
            say(f"taking over the users of {self.peer.name}", 4)
            self.alone, self.pass_due, self.pass_seconds = True, 0.0, 0.0
            self.numbers.counts["taken_over"] += 1
            for user, since in list(self.outbox.items()):
                self.mark(user, since)

    async def hand_over(self) -> None:
        """Tells the peer which of its users changed something here, until it says that it knows."""
        while True:
            await self.post.wait()
            self.post.clear()
            if not self.outbox or not self.peer.up:
                continue
            sent = dict(list(self.outbox.items())[:1000])
            ages = {user: round(time.time() - since, 3) for user, since in sent.items()}
            try:
                await self.line.ask("/peer/changed", {"users": ages})
            except OSError:
                await asyncio.sleep(BACK_OFF_SECONDS)
                self.post.set()
                continue
            self.numbers.counts["handed_over"] += len(sent)
            for user, since in sent.items():
                if self.outbox.get(user) == since:
                    del self.outbox[user]
            if self.outbox:
                self.post.set()

    # The audit: every mail read, at both hosts

    async def audits(self) -> None:
        """Once a day reads every mail of the own users at both hosts, and compares."""
        due = time.monotonic() + max(FIRST_AUDIT, AUDIT_SECONDS - (time.time() - (self.audit["at"] or 0)))
        while True:
            await asyncio.sleep(min(max(due - time.monotonic(), 0.0), 60.0))
            if time.monotonic() < due:
                continue
            if not self.peer.up or self.refused:
                due = time.monotonic() + 60.0
                continue
            async with self.auditing:
                unread = await self.audit_all()
            if unread:
                say(f"the audit has still to read {len(unread)} users: {next(iter(unread.values()))}", 4)
            else:
                self.audit["at"] = time.time()
            write(self.state / "audit.json", self.audit)
            due = time.monotonic() + (AUDIT_AGAIN if unread or self.audit["differences"] else AUDIT_SECONDS)

    async def audit_all(self) -> dict[str, str]:
        """Reads the mail of all own users. Returns those who could not be read now, and why: that is no verdict."""
        try:
            users = await self.users()
        except OSError as error:
            return {"*": str(error)}
        self.audit["differences"] = {u: said for u, said in self.audit["differences"].items() if u in users}
        unread: dict[str, str] = {}
        for user in filter(self.configuration.initiates, users):
            started = time.monotonic()
            try:
                await self.audit_user(user)
            except OSError as error:
                unread[user] = str(error)
            # Readers of mail come first: at most a third of the time is spent on this.
            await asyncio.sleep(2 * (time.monotonic() - started))
        return unread

    async def audit_user(self, user: str) -> str | None:
        """Reads all mail of a user at both hosts; where they differ, syncs and looks again. Returns what is wrong.

        Raises `OSError` when no verdict can be had: what changes while it is read differs, and is well.
        """
        wrong: str | None = None
        for attempt in range(AUDIT_TRIES):
            before = self.changed.get(user)
            if attempt:
                await self.synced(user)
            mine, theirs = await asyncio.gather(self.contents(user), self.contents_at_peer(user))
            differ = sorted(guid for guid in {*mine, *theirs} if mine.get(guid) != theirs.get(guid))
            unreadable = sorted({guid for side in (mine, theirs) for guid in side if side[guid].startswith("unread")})
            busy = not unreadable and self.changed.get(user) != before
            wrong = None
            if unreadable:
                wrong = f"{len(unreadable)} folders cannot be read in full: {', '.join(unreadable[:3])}"
            elif differ:
                wrong = f"{len(differ)} of {len({*mine, *theirs})} folders differ: {', '.join(differ[:3])}"
            if wrong is None:
                break
            if not busy:
                say(f"audit: {user}: {wrong}", 4)
        if wrong and busy:
            raise OSError(f"{user} changed mails each time while they were read")
        self.audit["users"] += 1
        if wrong is None:
            self.audit["differences"].pop(user, None)
        else:
            self.audit["differences"][user] = wrong
        write(self.state / "audit.json", self.audit)
        return wrong

    async def synced(self, user: str) -> None:
        """Waits until a sync of a user that starts now has gone well, or for a minute."""
        started = time.time()
        self.queue.mark(user, started, time.monotonic())
        self.stir.set()
        for _ in range(600):
            last = self.last.get(user)
            if last and last["status"] == 0 and last["at"] - last["seconds"] >= started:
                return
            await asyncio.sleep(0.1)

    async def contents_at_peer(self, user: str) -> dict[str, str]:
        answer = await self.ask_apart("/peer/contents", {"user": user}, LONGEST_SYNC)
        return {str(guid): str(digest) for guid, digest in answer["folders"].items()}

    async def contents(self, user: str) -> dict[str, str]:
        """Folder (by its GUID) to a digest of UID, GUID and text of every mail in it, as they are on this disk.

        What cannot be read twice is put in order by Dovecot itself (doveadm-force-resync(1)), so that a sync can bring
        back from the peer what this disk has lost; then it is read once more. Not at the first word: a mail that is
        delivered while the indexes are made anew is there twice afterwards, and Dovecot mends much when it is read.
        """
        code, output, said = await self.command("doveadm", "-f", "tab", "mailbox", "status", "-u", user, "guid", "*")
        if code:
            raise OSError(f"doveadm mailbox status -u {user}: {said}")
        guids = [line.rpartition("\t")[2] for line in output.splitlines()[1:]]
        found = {guid: await self.digest(user, guid) for guid in guids}
        for mend in (False, True):
            if not (bad := [guid for guid, digest in found.items() if digest.startswith("unread")]):
                break
            if mend:
                say(f"audit: {user}: {len(bad)} folders cannot be read in full here: {found[bad[0]]}", 4)
                await self.command("doveadm", "force-resync", "-u", user, "*")
            found |= {guid: await self.digest(user, guid) for guid in bad}
        return found

    async def digest(self, user: str, guid: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *("nice", "doveadm", "fetch", "-u", user, "uid guid text", "mailbox-guid", guid, "all"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout and process.stderr
        errors = asyncio.ensure_future(process.stderr.read())
        summed = hashlib.sha256()
        try:
            while piece := await asyncio.wait_for(process.stdout.read(1 << 16), LONGEST_SILENCE):
                summed.update(piece)
        except TimeoutError:
            process.kill()
        said = last_words(await errors)
        code = await process.wait()
        return f"unreadable ({said or code})" if code or said else summed.hexdigest()[:32]

    # What is asked of it

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: from Dovecot, from the peer, from the operator."""
        try:
            while (request := await read_request(reader)) is not None:
                status, content, kind = await self.answer(request)
                head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
                writer.write(head.encode() + content)
                await writer.drain()
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def answer(self, request: Request) -> tuple[str, bytes, str]:
        """An HTTP status, a body, and its type."""
        path = request.path
        if path.startswith("/peer/"):
            given = request.headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                return "403 Forbidden", b"another token is wanted\n", "text/plain"
        actions: dict[tuple[str, str], Callable[[dict[str, Any]], Any]] = {
            ("POST", "/event"): self.on_event,
            ("POST", "/now"): self.on_now,
            ("POST", "/audit"): self.on_audit,
            ("GET", "/status"): lambda _: self.status(),
            ("POST", "/peer/hello"): self.on_hello,
            ("GET", "/peer/expects"): lambda _: self.expects(),
            ("POST", "/peer/changed"): self.on_changed,
            ("POST", "/peer/contents"): self.on_contents,
            ("POST", "/peer/knows"): self.on_knows,
        }
        key = request.method, path
        try:
            if key == ("GET", "/metrics"):
                return "200 OK", self.metrics().encode(), "text/plain; version=0.0.4"
            if key not in actions:
                return "404 Not Found", b"there is no such page\n", "text/plain"
            value = actions[key](request.json())
            if inspect.isawaitable(value):
                value = await value
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return "400 Bad Request", f"{error!r}\n".encode(), "text/plain"
        except OSError as error:
            return "503 Service Unavailable", f"{error}\n".encode(), "text/plain"
        return "200 OK", json.dumps(value).encode(), "application/json"

    def on_event(self, event: dict[str, Any]) -> dict[str, Any]:
        """Dovecot says that somebody changed something."""
        self.numbers.counts["events"] += 1
        if user := event["fields"].get("user"):
            self.mark(named(user))
        return {}

    def on_hello(self, word: dict[str, Any]) -> dict[str, Any]:
        """The peer asks who is here. That it asks says that it is there, but its own answers count."""
        if self.peer.up:
            self.met(word)
        return self.introduction()

    def expects(self) -> dict[str, Any]:
        """A peer that knows no store of its own asks whether it had one."""
        return {"store": self.peer.store}

    def on_changed(self, word: dict[str, Any]) -> dict[str, Any]:
        """The peer hands over users whose initiator this host is."""
        now = time.time()
        for user, age in word["users"].items():
            self.queue.mark(named(user), now - float(age), time.monotonic())
        self.stir.set()
        return {}

    def on_now(self, word: dict[str, Any]) -> dict[str, Any]:
        """The operator wants a user, or everybody, synced at once."""
        if user := word.get("user"):
            self.mark(named(user))
        else:
            self.everybody, self.pass_due = True, 0.0
        self.queue.hurry()
        self.stir.set()
        return {}

    async def on_audit(self, word: dict[str, Any]) -> dict[str, Any]:
        if not self.peer.up:
            raise OSError(f"{self.peer.name} does not answer")
        user = word.get("user")
        users = [named(user)] if user else await self.users()
        wrong: dict[str, str | None] = {}
        async with self.auditing:
            for user in users:
                try:
                    wrong[user] = await self.audit_user(user)
                except OSError as error:
                    wrong[user] = f"no verdict: {error}"
        return {"users": len(users), "differences": {user: said for user, said in wrong.items() if said}}

    async def on_contents(self, word: dict[str, Any]) -> dict[str, Any]:
        return {"folders": await self.contents(named(word["user"]))}

    async def on_knows(self, word: dict[str, Any]) -> dict[str, Any]:
        return {"known": await self.knows(named(word["user"]))}

    # State

    def oldest(self) -> float:
        """Seconds for which the oldest change has not been at the peer; 0 when none waits."""
        now = time.time()
        times = [entry.since for entry in self.queue.pending().values()]
        return max(0.0, now - min([*times, *self.outbox.values(), now]))

    def status(self) -> dict[str, Any]:
        """All that there is to know, as docs/replication.md describes it."""
        self.allowed()
        now = time.time()
        # While the peer is away everybody waits for it, and nobody is to blame.
        pending, stuck = self.queue.pending(), self.queue.stuck(now) if self.peer.up else {}
        ok = (
            not (self.refused or self.filling or stuck or self.audit["differences"])
            and self.peer.up
            and self.oldest() < STUCK_SECONDS
        )
        return {
            "format": 1,
            "host": self.configuration.host,
            "time": now,
            "started": self.started,
            "ok": ok,
            "refused": self.refused,
            "store": self.store.id,
            "filling": self.filling,
            "disowned": self.peer.disowns,
            "peer": {
                "name": self.peer.name,
                "up": self.peer.up,
                "since": self.peer.changed,
                "store": self.peer.store,
                "taken_over": self.alone,
            },
            "pending": {
                "users": len({*pending, *self.outbox}),
                "to_hand_over": len(self.outbox),
                "oldest_seconds": round(self.oldest(), 3),
            },
            "waiting": {
                user: {"seconds": round(now - entry.since, 3), "tries": entry.tries, "said": entry.said}
                for user, entry in sorted(pending.items())
            },
            "stuck": sorted(stuck),
            "running": len(self.queue.running),
            "syncs": dict(self.numbers.counts),
            "lag_seconds": self.numbers.summary(),
            "pass": {
                "at": self.pass_at or None,
                "users": self.pass_users,
                "left": len(self.pass_left),
                "seconds": round(self.pass_seconds, 3),
                "next_in": round(max(self.pass_due - time.monotonic(), 0.0), 1),
            },
            "audit": self.audit,
            "last": self.last,
        }

    def metrics(self) -> str:
        """The same for Prometheus (text format 0.0.4)."""
        state, lag = self.status(), self.numbers
        lines: list[str] = []

        def metric(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
            lines.extend((f"# HELP posthorn_sync_{name} {text}", f"# TYPE posthorn_sync_{name} {kind}"))
            lines.extend(f"posthorn_sync_{name}{labels} {value:g}" for labels, value in samples)

        def gauge(name: str, text: str, value: float) -> None:
            metric(name, "gauge", text, [("", value)])

        gauge("ok", "Whether all is as it should be.", state["ok"])
        gauge("peer_up", "Whether the peer's daemon answers.", state["peer"]["up"])
        gauge("refused", "Whether a store is not the right one, so that nothing is synced.", bool(state["refused"]))
        gauge("taken_over", "Whether this host works for the peer's users too.", state["peer"]["taken_over"])
        gauge("pending_users", "Users with changes that are not at the peer yet.", state["pending"]["users"])
        gauge("oldest_pending_seconds", "Age of the oldest such change.", state["pending"]["oldest_seconds"])
        gauge("stuck_users", "Users whose syncs failed again and again.", len(state["stuck"]))
        gauge("pass_seconds", "What the last full pass took.", state["pass"]["seconds"])
        gauge("audit_differences", "Users whose mails differ or cannot be read.", len(self.audit["differences"]))
        if self.audit["at"]:
            gauge("audit_time_seconds", "When the last audit ended.", self.audit["at"])
        counts = [(f'{{result="{result}"}}', float(lag.counts[result])) for result in ("done", "again", "failed")]
        metric("runs_total", "counter", "Runs of doveadm sync, by their result.", counts)
        for name, text in (("events", "Changes told by Dovecot."), ("handed_over", "Users handed over to the peer.")):
            metric(f"{name}_total", "counter", text, [("", lag.counts[name])])
        bounds = [(f'_bucket{{le="{bound:g}"}}', float(count)) for bound, count in lag.buckets.items()]
        ends = [('_bucket{le="+Inf"}', float(lag.lag_count)), ("_sum", lag.lag_sum), ("_count", float(lag.lag_count))]
        metric("lag_seconds", "histogram", "From a change to its being at the peer.", [*bounds, *ends])
        return "\n".join(lines) + "\n"

    async def run(self) -> None:
        """Until SIGTERM."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", self.configuration.listen)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        loops: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(part())
            for part in (self.keep_in_touch, self.work, self.passes, self.hand_over, self.audits)
        ]
        self.broken = asyncio.get_running_loop().create_future()
        loops += [asyncio.ensure_future(stop.wait()), self.broken]
        ended, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        server.close()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for part in ended:
            part.result()


def named(user: Any) -> str:
    """The one name of a user, from somebody else's words: an event may have an address, or another case.

    Raises `ValueError` for what cannot be one.
    """
    name = str(user).partition("@")[0].lower()
    if not NAME.fullmatch(name):
        raise ValueError(f"{user!r} is not the name of a user")
    return name


def dovecot_started() -> str:
    """Tells one start of Dovecot on this host from another; empty while it does not run."""
    try:
        return str(MASTER.stat().st_mtime_ns)
    except OSError:
        return ""


def last_words(errors: bytes) -> str:
    """What a command said last on standard error, shortened to a line."""
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-2:])[:400]


# ---------------------------------------------------------------------------------------------------------------------
# The operator's commands


def ask(port: int, method: str, path: str, value: Any = None, *, seconds: float | None = 10.0, token: str = "") -> Any:
    """Asks a daemon, at its port on loopback. Raises `OSError` where it does not run or does not like the question."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request(method, path, json.dumps(value) if value is not None else None, headers)
        answer = connection.getresponse()
        content = answer.read()
    except http.client.HTTPException as error:
        raise OSError(f"no answer ({type(error).__name__})") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(content.decode(errors="replace").strip())
    return json.loads(content)


def ago(seconds: float) -> str:
    """A duration as people say it."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def describe(state: dict[str, Any]) -> str:
    """The state of the service for a person."""
    peer, pending, lag, now = state["peer"], state["pending"], state["lag_seconds"], state["time"]
    if state["refused"]:
        head = f"NOTHING IS SYNCED: {state['refused']}"
    elif state["filling"]:
        head = f"being filled, {state['pass']['left']} users left; users are not served here until then"
    elif not peer["up"]:
        head = f"{peer['name']} does not answer"
    elif state["ok"] and not pending["users"]:
        head = "both hosts are alike"
    else:
        head = f"{pending['users']} users behind" if pending["users"] else "something is wrong"
    took_over = ", its users are taken over" if peer["taken_over"] else ""
    lines = [
        f"{state['host']}: {head}",
        f"  peer     {peer['name']}, {'up' if peer['up'] else 'DOWN'} for {ago(now - peer['since'])}{took_over}",
        f"  pending  {pending['users']} users, {pending['to_hand_over']} of them to hand over; "
        f"the oldest for {ago(pending['oldest_seconds'])}",
    ]
    if lag["of"]:
        lines.append(f"  lag      {ago(lag['p50'])}, 95 % {ago(lag['p95'])}, longest {ago(lag['max'])} of {lag['of']}")
    syncs = state["syncs"]
    lines.append(f"  syncs    {syncs['done']} done, {syncs['again']} run again, {syncs['failed']} failed")
    if state["pass"]["at"]:
        lines.append(
            f"  pass     {ago(now - state['pass']['at'])} ago, {state['pass']['users']} users, "
            f"{state['pass']['left']} left; next in {ago(state['pass']['next_in'])}"
        )
    audit = state["audit"]
    lines.append(f"  audit    {ago(now - audit['at']) + ' ago' if audit['at'] else 'none yet'}")
    lines += [f"  DIFFERS  {user}: {said}" for user, said in sorted(audit["differences"].items())]
    lines += [
        f"  {'STUCK  ' if user in state['stuck'] else 'waiting'}  {user}: for {ago(entry['seconds'])}, "
        f"{entry['tries']} tries {entry['said']}".rstrip()
        for user, entry in state["waiting"].items()
        if entry["tries"]
    ]
    return "\n".join(lines)


def status(configuration: Configuration, user: str | None, *, as_json: bool) -> int:
    """Prints the state. Returns 0 when all is well, 1 when it is not; 2 is said where there is no daemon."""
    if configuration.peer is None:
        print(f"{configuration.host}: the only mailbox host, {Store(configuration).problem() or 'its store is well'}")
        return 0 if Store(configuration).problem() is None else 1
    state = ask(configuration.listen, "GET", "/status")
    last = state.pop("last")
    if user:
        try:
            user = named(user)
        except ValueError as error:
            raise OSError(str(error)) from None
        one = {
            "user": user,
            "initiator": configuration.host if configuration.initiates(user) else configuration.peer,
            "pending": state["waiting"].get(user),
            "last": last.get(user),
        }
        print(json.dumps(one, indent=1))
        return 0 if user not in state["stuck"] else 1
    print(json.dumps(state, indent=1) if as_json else describe(state))
    return 0 if state["ok"] else 1


def open_store(configuration: Configuration) -> int:
    """Before Dovecot starts, as root. A wrong store is refused, so that Dovecot does not start.

    A store that is being filled serves nobody but the peer: a user would find his mailbox empty, and a folder that he
    opened would come into being a second time.
    """
    STATE.mkdir(mode=0o755, exist_ok=True)
    store = Store(configuration)
    problem = store.open(lambda: had_store(configuration))
    if problem:
        say(f"{problem}. Mount the right disk; or, if it is lost for good, say posthorn-sync reseed.", 3)
        return 1
    filling = store.known.get("filling")
    DOVECOT_OPTIONS.parent.mkdir(exist_ok=True)
    DOVECOT_OPTIONS.write_text(f"DOVECOT_OPTIONS={'-o protocols=' if filling else ''}\n")
    FILLING.unlink(missing_ok=True)
    if filling:
        # A push prints it, as `make up` shows it.
        FILLING.write_text("it serves no user yet: say posthorn-sync reseed on it (docs/replication.md)\n")
        say("this store has yet to be filled: users are not served before posthorn-sync reseed has ended", 4)
    return 0


def had_store(configuration: Configuration, patience: float = 5.0) -> bool:
    """Whether the peer remembers a store of this host. Not so when it is not there: so begins a pair.

    For ``patience`` seconds the near end of the tunnel may still be on its way up.
    """
    if configuration.peer is None:
        return False
    deadline, token = time.monotonic() + patience, TOKEN.read_text().strip()
    while True:
        try:
            return bool(ask(configuration.to_peer, "GET", "/peer/expects", token=token)["store"])
        except OSError as error:
            if not isinstance(error, ConnectionRefusedError) or time.monotonic() > deadline:
                say(
                    f"an empty store begins: {configuration.peer} is not there to ask ({error})",
                    5,
                )
                return False
            time.sleep(0.1)


def reseed(configuration: Configuration, *, at_once: bool, anyway: bool) -> int:
    """The operator's word that this store is to be taken as it is, and filled from the peer. Waits for that.

    Can be ended and said again: it goes on where it was. A store that is well is left alone, unless ``anyway``.
    """
    store = Store(configuration)
    STATE.mkdir(mode=0o755, exist_ok=True)
    if not (anyway or store.problem() or store.known.get("filling") or disowned(configuration)):
        print(f"{store.path} is well, and users are served from it: was the other host meant? (--anyway: this one is)")
        return 1
    if store.problem() or not store.known.get("filling"):
        filling = configuration.peer is not None and not at_once
        identity = store.begin(new=configuration.peer is not None, filling=filling)
        print(f"{store.path} is now the store {identity}, with the mailboxes of {len(os.listdir(store.homes))} users.")
        systemctl("restart", "dovecot.service")
    else:
        store.change(new=configuration.peer is not None, filling=not at_once)
        if at_once:
            systemctl("restart", "dovecot.service")
    if not store.known.get("filling"):
        return 0
    print(f"What {configuration.peer} has is brought here, and nothing is deleted there.", flush=True)
    told = ""
    while True:
        try:
            state = ask(configuration.listen, "GET", "/status")
        except OSError as error:
            state, words = None, f"the service does not answer: {error}"
        else:
            left = state["pass"]["left"]
            words = state["refused"] or f"{left} of {state['pass']['users']} users left"
            if state["stuck"] and not state["refused"]:
                words += f"; {state['stuck'][0]}: {state['waiting'][state['stuck'][0]]['said']}"
            if not state["peer"]["up"]:
                words = f"waiting for {configuration.peer}"
            elif not state["refused"] and state["filling"] and state["pass"]["at"] and not left:
                break
        if words != told:
            print(words, flush=True)
        told = words
        time.sleep(0.2)
    store.change(filling=False)
    systemctl("restart", "dovecot.service")
    print("All users are here; Dovecot serves them again.")
    return 0


def disowned(configuration: Configuration) -> bool:
    """Whether the peer knows this host with another store, as far as the service here can say."""
    try:
        return configuration.peer is not None and bool(ask(configuration.listen, "GET", "/status")["disowned"])
    except OSError:
        return False


def systemctl(verb: str, unit: str) -> None:
    """Raises `OSError` with its words when it fails."""
    done = subprocess.run(["systemctl", verb, unit], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"systemctl {verb} {unit}: {done.stderr.strip()}")


def main(arguments: list[str]) -> int:
    """One command. Returns its exit status; what is wrong is said in a sentence."""
    parser = argparse.ArgumentParser(prog="posthorn-sync", description="Keeps the mailboxes of two hosts alike.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("status", help="how it stands; exit status 0 when all is well")
    show.add_argument("user", nargs="?")
    show.add_argument("--json", action="store_true", dest="as_json")
    for name, words in (("now", "sync a user, or everybody, at once"), ("audit", "read and compare every mail now")):
        commands.add_parser(name, help=words).add_argument("user", nargs="?")
    fill = commands.add_parser("reseed", help="take the store as it is, and have it filled from the peer (as root)")
    fill.add_argument("--at-once", action="store_true", help="serve users before it is filled, or without a peer")
    fill.add_argument("--anyway", action="store_true", help="although it is well, and users are served from it")
    commands.add_parser("open-store", help="before Dovecot starts: refuses an unmounted, lost or foreign store")
    commands.add_parser("run", help="the daemon")
    options = parser.parse_args(arguments)
    configuration = Configuration.load()
    try:
        match options.command:
            case "status":
                return status(configuration, options.user, as_json=options.as_json)
            case "now":
                ask(configuration.listen, "POST", "/now", {"user": options.user})
            case "audit":
                found = ask(configuration.listen, "POST", "/audit", {"user": options.user}, seconds=None)
                for user, said in found["differences"].items():
                    print(f"{user}: {said}")
                print(f"{found['users']} users read, {len(found['differences'])} of them differ")
                return 1 if found["differences"] else 0
            case "open-store":
                return open_store(configuration)
            case "reseed":
                return reseed(configuration, at_once=options.at_once, anyway=options.anyway)
            case "run":
                token = (Path(os.environ["CREDENTIALS_DIRECTORY"]) / "token").read_text().strip()
                asyncio.run(Daemon(configuration, token).run())
    except OSError as error:
        print(f"posthorn-sync {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
