"""The sync service without Dovecot: who is next, which store is right, what the peer says, what is told to others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import random
import time
from pathlib import Path
from typing import Any

import pytest

from model.stack import Stack
from services import replication
from services.bundle import bundle
from sync import sync
from sync.sync import Configuration, Daemon, Line, Peer, Queue, Store, Waiting, describe


@pytest.fixture
def configuration(tmp_path: Path) -> Configuration:
    owner = pwd.getpwuid(os.getuid()).pw_name
    store = tmp_path / "store"
    store.mkdir()
    return Configuration("a.example", "b.example", store, store / "users", owner, 1, 2, 3)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


@pytest.fixture
def store(configuration: Configuration, state: Path) -> Store:
    opened = Store(configuration, state)
    assert opened.open() is None
    return opened


# Who is next


def test_of_each_user_one_host_is_the_initiator(configuration: Configuration) -> None:
    here = configuration
    there = Configuration("b.example", "a.example", *list(vars(here).values())[2:])
    users = [f"user{number}" for number in range(200)]
    mine = {user for user in users if here.initiates(user)}
    assert mine == {user for user in users if not there.initiates(user)}
    assert 60 < len(mine) < 140


def test_a_change_during_a_sync_causes_another() -> None:
    queue = Queue()
    queue.mark("ann", since=1, now=10)
    assert queue.take(10) is None and queue.take(10.1) == "ann"
    queue.mark("ann", since=2, now=10.2)
    assert queue.take(10.5) is None
    queue.done("ann")
    assert queue.take(10.5) == "ann" and queue.running["ann"].since == 2


def test_whoever_changed_something_comes_before_a_pass() -> None:
    queue = Queue()
    for user in ("ann", "ben"):
        queue.mark(user, since=1, now=0, urgent=False)
    queue.mark("cid", since=9, now=0)
    queue.mark("ben", since=9, now=0)
    assert {queue.take(1), queue.take(1)} == {"cid", "ben"}
    assert queue.pending().keys() == {"cid", "ben"}


def test_a_user_who_fails_waits_ever_longer_and_is_stuck_in_the_end() -> None:
    queue, now = Queue(), 0.0
    queue.mark("ann", since=0, now=now)
    waits = []
    for _ in range(12):
        now = queue.waiting["ann"].due
        assert queue.take(now) == "ann"
        queue.failed("ann", now, "no")
        waits.append(round(queue.waiting["ann"].due - now, 3))
    assert waits[:3] == [0.2, 0.4, 0.8] and waits[-1] == 60
    assert queue.stuck(now=1).keys() == {"ann"}


def test_one_user_who_fails_does_not_hold_up_the_others() -> None:
    queue = Queue()
    queue.mark("ann", since=0, now=0)
    for now in (1, 2, 3):
        assert queue.take(now) == "ann"
        queue.failed("ann", now, "no")
    queue.mark("ben", since=0, now=3)
    queue.mark("cid", since=0, now=3)
    assert queue.take(3.1) and queue.take(3.1)


def test_while_nothing_succeeds_one_user_tries_for_all_and_all_follow_when_he_does() -> None:
    queue = Queue()
    users = {"ann", "ben", "cid", "dan"}
    for user in users:
        queue.mark(user, since=0, now=0, urgent=False)
    for _ in range(2):
        first = queue.take(1)
        assert first
        queue.failed(first, 1, "no way")
    assert queue.take(1) is None
    tried = queue.take(1.3)
    assert tried and queue.take(1.3) is None
    queue.done(tried)
    assert {queue.take(1.5), queue.take(1.5), queue.take(1.5)} == users - {tried}


def test_nobody_waits_long_once_the_way_is_open_again() -> None:
    queue, now = Queue(), 0.0
    for user in ("ann", "ben"):
        queue.mark(user, since=0, now=now)
    while now < 300:
        now += 0.1
        if tried := queue.take(now):
            queue.failed(tried, now, "no way")
    assert all(entry.due <= now + sync.LONGEST_GATE for entry in queue.waiting.values())


def simulated(broken: int, failing_takes: float, seconds: float = 300) -> tuple[float, int]:
    """Broken users beside ten who get a mail every two seconds in turn: the longest wait of those, and the failures."""
    queue, failures, waits = Queue(), 0, [0.0]
    ends: dict[str, float] = {}
    for number in range(broken):
        queue.mark(f"broken{number}", since=0, now=0)
    for step in range(int(seconds / 0.05)):
        now = step * 0.05
        if step % 40 == 0:
            queue.mark(f"user{step // 40 % 10}", since=now, now=now)
        for ended in [user for user, end in ends.items() if end <= now]:
            del ends[ended]
            if ended.startswith("broken"):
                queue.failed(ended, now, "no")
                failures += 1
            elif now > 60:
                waits.append(now - queue.done(ended).since)
            else:
                queue.done(ended)
        while (user := queue.take(now)) is not None:
            ends[user] = now + (failing_takes if user.startswith("broken") else 0.08)
    return max(waits), failures


@pytest.mark.parametrize("broken", [1, 2, 6])
@pytest.mark.parametrize("failing_takes", [0.1, float(sync.SILENT_SECONDS)])
def test_users_whose_syncs_fail_do_not_slow_the_others(broken: int, failing_takes: float) -> None:
    longest, failures = simulated(broken, failing_takes)
    assert longest < 0.3
    assert failures < 300


def test_a_pass_ends_beside_users_whose_syncs_fail() -> None:
    queue, now = Queue(), 0.0
    for user in ("broken0", "broken1"):
        queue.mark(user, since=0, now=now)
    for number in range(50):
        queue.mark(f"user{number}", since=0, now=now, urgent=False)
    while any(user.startswith("user") for user in queue.waiting):
        now += 1.0
        assert now < 300
        taken = queue.take(now)
        if taken and taken.startswith("broken"):
            queue.failed(taken, now, "no")
        elif taken:
            queue.done(taken)


def test_with_all_workers_busy_there_is_nothing_to_wait_for_but_their_ends() -> None:
    queue = Queue()
    for number in range(sync.WORKERS + 1):
        queue.mark(f"user{number}", since=0, now=0)
    while queue.take(1):
        pass
    assert queue.next_due() is None
    queue.done(next(iter(queue.running)))
    assert queue.next_due() == pytest.approx(sync.DEBOUNCE_SECONDS)


def test_changes_during_a_sync_are_no_failure() -> None:
    queue = Queue()
    for user in ("ann", "ben"):
        queue.mark(user, since=0, now=0)
        assert queue.take(1) == user
        queue.again(user, 1, "changed")
    assert queue.gate == 0 and queue.take(1.3) == "ann"


def test_a_user_whose_mailbox_changes_all_the_time_is_synced_all_the_time() -> None:
    queue, now = Queue(), 0.0
    queue.mark("ann", since=0, now=now)
    for _ in range(12):
        now = queue.waiting["ann"].due
        assert queue.take(now) == "ann"
        queue.again("ann", now, "changed")
    assert now < 20 and not queue.stuck(now)


def looked_at_all(queue: Queue, now: float) -> tuple[str | None, float | None]:
    """Who is to go now, and when somebody may go, by a look at everybody who waits."""

    def waits_for_others(entry: Waiting) -> bool:
        return entry.tries > 0 or (queue.in_doubt and not entry.urgent)

    busy, most = sum(map(waits_for_others, queue.running.values())), 1 if queue.in_doubt else sync.WORKERS - 1
    times = {
        user: max(entry.due, queue.gate) if waits_for_others(entry) else entry.due
        for user, entry in queue.waiting.items()
        if user not in queue.running and len(queue.running) < sync.WORKERS
        if not waits_for_others(entry) or busy < most
    }

    def rank(user: str) -> tuple[int, bool, int, float, str]:
        entry = queue.waiting[user]
        return entry.tries if queue.in_doubt else 0, not entry.urgent, entry.tries, entry.since, user

    return min((user for user, due in times.items() if due <= now), key=rank, default=None), min(
        times.values(), default=None
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_queue_takes_whom_a_look_at_everybody_would_take(seed: int) -> None:
    chance, queue, now = random.Random(seed), Queue(), 0.0
    users, taken = [f"user{number}" for number in range(12)], 0
    for _ in range(3000):
        now += chance.choice((0, 0, 0.01, 0.05, 0.3, 2 if seed % 2 else 20))
        user, since = chance.choice(users), round(now) - chance.randrange(3)
        runs = chance.choice(sorted(queue.running)) if queue.running else ""
        does = chance.choices(
            ("mark", "pass", "done", "again", "refused", "failed", "forget", "hurry"), (9, 6, 6, 3, 1, 5, 1, 0.1)
        )
        match does[0]:
            case "mark" | "pass" as how:
                queue.mark(user, since, now, urgent=how == "mark")
            case "done" if runs:
                queue.done(runs)
            case "again" | "refused" | "failed" as how if runs:
                getattr(queue, how)(runs, now, how)
            case "forget":
                queue.forget(user)
            case "hurry":
                queue.hurry()
        goes, due = looked_at_all(queue, now)
        said = queue.next_due()
        assert said == due or (said is not None and due is not None and max(said, due) <= now)
        if chance.random() < 0.6:
            assert queue.take(now) == goes
            taken += goes is not None
    assert taken > 300


def test_the_queue_takes_each_of_ten_thousand_users_as_fast_as_each_of_a_hundred() -> None:
    queue = Queue()
    for number in range(10_000):
        queue.mark(f"user{number}", since=0, now=0, urgent=False)
    began = time.process_time()
    for _ in range(10_000):
        user = queue.take(1)
        assert user and (queue.next_due() is not None or len(queue.waiting) == 0)
        queue.done(user)
    # A look at everybody for each of them takes a minute.
    assert not queue.waiting and time.process_time() - began < 3


# Which store is right


def test_a_new_host_begins_a_store_and_knows_it_again(store: Store, configuration: Configuration, state: Path) -> None:
    assert store.problem() is None and store.id
    assert Store(configuration, state).open() is None


def test_a_system_disk_made_anew_takes_the_store_that_is_there(
    store: Store, configuration: Configuration, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    again = Store(configuration, other)
    assert again.open() is None and again.id == store.id


def test_a_host_made_anew_whose_store_the_peer_remembers_is_not_shown_to_users(
    configuration: Configuration, state: Path
) -> None:
    store = Store(configuration, state)
    assert store.open(lambda: True) is None
    assert store.known["filling"] and not store.known["new"]


def test_an_empty_disk_is_refused(store: Store) -> None:
    store.marker.unlink()
    store.homes.rmdir()
    assert "empty or lost" in (store.open() or "")
    assert not store.homes.exists()


def test_a_foreign_disk_is_refused(store: Store) -> None:
    sync.write(store.marker, {"id": "another"})
    assert "foreign" in (store.open() or "")


def test_a_disk_that_is_not_mounted_is_refused(store: Store) -> None:
    store.change(mounted=True)
    assert "not mounted" in (store.open() or "")


def test_a_store_without_any_mailbox_is_refused_once_there_were_some(store: Store) -> None:
    assert store.problem() is None
    (store.homes / "ann").mkdir()
    store.remember_homes()
    (store.homes / "ann").rmdir()
    assert "mailboxes of all users" in (store.problem() or "")


def test_mail_without_an_identity_is_not_taken_for_an_empty_disk(configuration: Configuration, state: Path) -> None:
    configuration.homes.mkdir()
    assert "posthorn-sync reseed" in (Store(configuration, state).open() or "")


def test_the_operator_s_word_makes_a_store_of_what_is_there(store: Store) -> None:
    before = store.id
    store.marker.unlink()
    store.begin(new=True, filling=True)
    assert store.problem() is None and store.id != before
    assert store.known["new"] and store.known["filling"]


# What the peer says


def test_another_store_of_the_peer_is_refused_until_its_operator_means_it(state: Path) -> None:
    peer = Peer("b.example", state / "peer.json")
    assert "not heard of" in (peer.unlike or "")
    assert said(peer, store="one") == ""
    assert "posthorn-sync reseed at b.example" in said(peer, store="two")
    assert "posthorn-sync reseed" in (Peer("b.example", state / "peer.json").unlike or "")
    assert said(peer, store="two", new=True) == ""
    again = Peer("b.example", state / "peer.json")
    assert again.store == "two" and again.unlike is None


def test_a_peer_with_a_wrong_store_is_refused(state: Path) -> None:
    peer = Peer("b.example", state / "peer.json")
    assert "not mounted" in said(peer, store="one", problem="the disk is not mounted")


def said(peer: Peer, **word: Any) -> str:
    """Why the stores are not to be compared, after some words of the peer."""
    peer.met(word, {"id": "mine"})
    return peer.unlike or ""


# A daemon, spoken to as Dovecot, the peer and the operator do


@pytest.fixture
def daemon(configuration: Configuration, store: Store, state: Path) -> Daemon:
    return Daemon(configuration, "token", state)


def request(daemon: Daemon, method: str, path: str, value: Any = None, token: str = "token") -> tuple[str, Any]:
    """Asks a daemon, and gives status and body."""
    asked = sync.Request(method, path, {"authorization": f"Bearer {token}"}, json.dumps(value or {}).encode())
    status, body, kind = asyncio.run(daemon.answer(asked))
    return status, json.loads(body) if kind == "application/json" else body.decode()


def user_of(configuration: Configuration, *, mine: bool) -> str:
    return next(u for u in (f"user{n}" for n in range(99)) if configuration.initiates(u) == mine)


def test_an_event_of_dovecot_marks_the_own_user_and_hands_over_the_other(daemon: Daemon) -> None:
    mine, theirs = (user_of(daemon.configuration, mine=mine) for mine in (True, False))
    for user in (mine, theirs):
        event = {"event": "imap_command_finished", "fields": {"user": user}}
        assert request(daemon, "POST", "/event", event)[0] == "200 OK"
    assert daemon.queue.waiting.keys() == {mine} and daemon.outbox.keys() == {theirs}


@pytest.mark.parametrize("path", ["/event", "/peer/changed", "/now"])
def test_a_user_has_one_name_however_he_is_called(daemon: Daemon, path: str) -> None:
    mine = user_of(daemon.configuration, mine=True)
    for name in (mine, f"{mine}@maildrop.net.hill.example", f"{mine.title()}@hill.example"):
        value = {"/event": {"fields": {"user": name}}, "/peer/changed": {"users": {name: 1}}, "/now": {"user": name}}
        assert request(daemon, "POST", path, value[path])[0] == "200 OK"
    assert daemon.queue.waiting.keys() == {mine} and not daemon.outbox


def test_with_the_peer_s_service_dead_its_users_are_taken_over(daemon: Daemon) -> None:
    theirs = user_of(daemon.configuration, mine=False)
    daemon.mark(theirs)
    assert theirs not in daemon.queue.waiting
    daemon.peer.silent_since -= 10
    daemon.missed("no answer")
    assert theirs in daemon.queue.waiting and daemon.status()["peer"]["taken_over"]


def test_a_user_handed_over_is_synced_here_with_the_age_of_his_change(daemon: Daemon) -> None:
    assert request(daemon, "POST", "/peer/changed", {"users": {"ann": 5}})[0] == "200 OK"
    assert 4.9 < daemon.oldest() < 6


def test_the_peer_has_to_know_the_token(daemon: Daemon) -> None:
    assert request(daemon, "POST", "/peer/changed", {"users": {"ann": 5}}, token="guess")[0] == "403 Forbidden"
    assert not daemon.queue.waiting


def test_nonsense_is_refused_and_breaks_nothing(daemon: Daemon) -> None:
    assert request(daemon, "POST", "/event", {"nothing": 1})[0] == "400 Bad Request"
    assert request(daemon, "GET", "/nowhere")[0] == "404 Not Found"


def test_the_peer_that_returns_causes_a_pass(daemon: Daemon) -> None:
    daemon.pass_due = 1e12
    daemon.met({"boot": "1", "store": "s"})
    assert daemon.peer.up and daemon.pass_due == 0
    daemon.pass_due = 1e12
    daemon.met({"boot": "1", "store": "s"})
    assert daemon.pass_due == 1e12
    daemon.met({"boot": "2", "store": "s"})
    assert daemon.pass_due == 0


def test_a_peer_that_remembers_another_store_of_this_host_is_not_synced_with(daemon: Daemon) -> None:
    daemon.met({"boot": "1", "store": "s", "knows": "older"})
    assert not daemon.allowed() and "reseed here" in (daemon.refused or "")
    daemon.store.begin(new=True)
    daemon.met({"boot": "1", "store": "s", "knows": "older"})
    assert not daemon.allowed() and "yet to take up" in (daemon.refused or "")
    daemon.met({"boot": "1", "store": "s", "knows": daemon.store.id})
    assert daemon.allowed()


def test_a_store_is_full_only_after_a_pass_over_everybody(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [f"user{number}" for number in range(20)]

    async def known() -> list[str]:
        return users

    async def some_rounds() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(daemon.passes(), 0.3)

    monkeypatch.setattr(daemon, "users", known)
    daemon.met({"boot": "1", "store": "s"})
    daemon.store.change(filling=True)
    assert daemon.allowed()
    asyncio.run(some_rounds())
    assert daemon.pass_left == set(users)
    # The peer's service is started anew in the middle of it.
    daemon.pass_left.discard(users[0])
    daemon.met({"boot": "2", "store": "s"})
    asyncio.run(some_rounds())
    assert daemon.pass_left == set(users[1:])


def test_a_wish_for_everybody_in_the_middle_of_a_pass_is_kept(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    async def make_pass(*, everybody: bool) -> None:
        made.append(everybody)
        daemon.pass_due = 1e12
        if len(made) == 1:
            daemon.on_now({})

    async def some_rounds() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(daemon.passes(), 0.8)

    monkeypatch.setattr(daemon, "make_pass", make_pass)
    daemon.met({"boot": "1", "store": "s"})
    assert daemon.allowed()
    asyncio.run(some_rounds())
    assert made == [True, True]


def test_users_are_handed_over_until_the_peer_has_heard_it(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def ask(path: str, value: Any, seconds: float = 1) -> dict[str, Any]:
        asked.append(value)
        if len(asked) == 1:
            raise OSError("the connection was closed")
        return {}

    async def hand_over() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(daemon.hand_over(), 2 * sync.BACK_OFF_SECONDS)

    theirs = user_of(daemon.configuration, mine=False)
    monkeypatch.setattr(daemon.line, "ask", ask)
    daemon.peer.up = True
    daemon.mark(theirs)
    asyncio.run(hand_over())
    assert [[*value["users"]] for value in asked] == [[theirs], [theirs]] and not daemon.outbox


def test_what_waited_for_dovecot_is_due_when_it_is_back(daemon: Daemon) -> None:
    mine = user_of(daemon.configuration, mine=True)
    daemon.met({"boot": "1", "store": "s", "dovecot": "1"})
    daemon.mark(mine)
    daemon.queue.waiting[mine].due = 1e12
    daemon.met({"boot": "1", "store": "s", "dovecot": ""})
    assert daemon.queue.waiting[mine].due == 1e12
    daemon.met({"boot": "1", "store": "s", "dovecot": "2"})
    assert daemon.queue.waiting[mine].due == 0


def test_a_command_that_hangs_is_ended(daemon: Daemon) -> None:
    async def hang() -> tuple[int, str, str]:
        return await daemon.command("sleep", "60", seconds=0.05, syncs="ann")

    code, _, words = asyncio.run(hang())
    assert code == 75 and "no answer" in words and not daemon.processes


def synced(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, answers: dict[str, tuple[int, str, str]], there: int = 67
) -> list[str]:
    """One sync of ann in a pass over her alone, with what each command of doveadm answers. The words of the sync.

    ``there`` is the status of `doveadm user` at the peer, which is asked whether it knows her.
    """
    ran: list[str] = []

    async def command(*words: str, **_: Any) -> tuple[int, str, str]:
        ran[:] = words if words[1] == "sync" else ran
        return answers[words[1]]

    async def ask_apart(path: str, value: Any, seconds: float) -> dict[str, Any]:
        assert (path, value) == ("/peer/knows", {"user": "ann"})
        return {"known": there == 0}

    monkeypatch.setattr(daemon, "command", command)
    monkeypatch.setattr(daemon, "ask_apart", ask_apart)
    daemon.met({"boot": "1", "store": "s"})
    daemon.pass_left = {"ann"}
    daemon.queue.mark("ann", since=0, now=0, urgent=False)
    assert daemon.queue.take(1) == "ann"
    asyncio.run(daemon.sync("ann"))
    return ran


def test_a_user_whom_nobody_knows_any_more_is_forgotten(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.changed["ann"] = 1.0
    synced(daemon, monkeypatch, {"sync": (67, "", "unknown"), "user": (67, "", "")})
    assert not daemon.queue.pending() and not daemon.pass_left and not daemon.changed and not daemon.last


@pytest.mark.parametrize(("here", "there", "missing"), [(0, 67, "b.example"), (67, 0, "a.example")])
def test_a_user_whom_one_host_does_not_know_is_behind_and_holds_up_nobody(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, here: int, there: int, missing: str
) -> None:
    daemon.queue.failing.add("ben")
    synced(daemon, monkeypatch, {"sync": (67, "", "Unknown user in remote"), "user": (here, "", "")}, there)
    # A new store is not full without her; and that she is the one who fails says that the way is open.
    assert daemon.pass_left == {"ann"} and not daemon.queue.failing
    state = daemon.status()
    assert not state["ok"] and state["syncs"]["failed"] == 1
    assert "alike" not in describe(state) and f"not known at {missing}: run make up" in describe(state)


def test_where_dovecot_cannot_say_who_is_known_a_user_stays(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    synced(daemon, monkeypatch, {"sync": (67, "", "unknown"), "user": (75, "", "auth is down")})
    assert "auth is down" in daemon.queue.waiting["ann"].said


@pytest.mark.parametrize(("code", "known"), [(0, True), (67, False)])
def test_the_peer_is_told_whether_a_user_is_known_here(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, code: int, known: bool
) -> None:
    async def command(*words: str, **_: Any) -> tuple[int, str, str]:
        assert words == ("doveadm", "user", "ann")
        return code, "", ""

    monkeypatch.setattr(daemon, "command", command)
    assert request(daemon, "POST", "/peer/knows", {"user": "ann"})[1] == {"known": known}


def test_a_sync_gives_up_a_lock_before_the_other_side_gives_up_the_sync(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = synced(daemon, monkeypatch, {"sync": (0, "", "")})
    lock, silence = (int(words[words.index(option) + 1]) for option in ("-l", "-T"))
    assert 0 < lock < silence


def test_a_host_without_a_store_is_told_whether_it_had_one(daemon: Daemon) -> None:
    assert request(daemon, "GET", "/peer/expects")[1] == {"store": ""}
    daemon.met({"boot": "1", "store": "s"})
    assert request(daemon, "GET", "/peer/expects")[1] == {"store": "s"}
    assert request(daemon, "GET", "/peer/expects", token="guess")[0] == "403 Forbidden"


@pytest.mark.parametrize("name", ["a\0b", "*", "-A", " ", "ann ben"])
def test_what_is_no_user_is_not_given_to_a_command(daemon: Daemon, name: str) -> None:
    for path, value in (("/event", {"fields": {"user": name}}), ("/now", {"user": name})):
        assert request(daemon, "POST", path, value)[0] == "400 Bad Request"
    assert not daemon.queue.waiting and not daemon.outbox


def test_the_state_is_told_to_people_and_machines(daemon: Daemon) -> None:
    daemon.met({"boot": "1", "store": "s"})
    daemon.allowed()
    daemon.numbers.lag(0.07)
    status, state = request(daemon, "GET", "/status")
    assert status == "200 OK" and state["format"] == 1 and state["ok"], state
    assert "a.example: both hosts are alike" in describe(state)
    metrics = request(daemon, "GET", "/metrics")[1]
    assert "posthorn_sync_ok 1\n" in metrics and 'posthorn_sync_lag_seconds_bucket{le="0.1"} 1\n' in metrics
    daemon.queue.mark("ann", since=0, now=0)
    daemon.queue.take(1)
    daemon.queue.failed("ann", 1, "no such luck")
    state = request(daemon, "GET", "/status")[1]
    assert not state["ok"] and state["stuck"] == ["ann"]
    assert "STUCK    ann" in describe(state) and "no such luck" in describe(state)


def test_an_audit_that_could_not_be_made_is_no_difference(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = user_of(daemon.configuration, mine=True)

    async def users() -> list[str]:
        return [mine]

    async def away(user: str) -> dict[str, str]:
        raise OSError("Dovecot is down")

    monkeypatch.setattr(daemon, "users", users)
    monkeypatch.setattr(daemon, "contents", away)
    assert asyncio.run(daemon.audit_all()) == {mine: "Dovecot is down"}
    assert not daemon.audit["differences"]


@pytest.mark.parametrize("damaged", [False, True])
def test_mails_that_change_while_they_are_read_are_no_difference_but_those_that_cannot_be_read_are(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    mine = user_of(daemon.configuration, mine=True)
    times = iter(range(100))

    async def users() -> list[str]:
        return [mine]

    async def contents(user: str) -> dict[str, str]:
        daemon.mark(user)
        return {"INBOX": "unreadable" if damaged else str(next(times))}

    async def synced(user: str) -> None:
        pass

    monkeypatch.setattr(daemon, "users", users)
    for side in ("contents", "contents_at_peer"):
        monkeypatch.setattr(daemon, side, contents)
    monkeypatch.setattr(daemon, "synced", synced)
    unread = asyncio.run(daemon.audit_all())
    assert (mine in daemon.audit["differences"], mine in unread) == (damaged, not damaged)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_mailbox_is_put_in_order_only_where_it_cannot_be_read_twice(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    commands: list[str] = []
    reads: list[str] = []

    async def command(*words: str, **_: Any) -> tuple[int, str, str]:
        commands.append(" ".join(words))
        return 0, "mailbox\tguid\nINBOX\t1\n", ""

    async def digest(user: str, guid: str) -> str:
        reads.append(guid)
        mended = any("force-resync" in words for words in commands) or (not damaged and len(reads) > 1)
        return "well" if mended else "unreadable (rebuilding indexes)"

    monkeypatch.setattr(daemon, "command", command)
    monkeypatch.setattr(daemon, "digest", digest)
    assert asyncio.run(daemon.contents("ann")) == {"1": "well"}
    assert any("force-resync" in words for words in commands) == damaged


def test_everybody_is_read_once_a_day_and_again_soon_where_something_differs(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []

    async def audit_all() -> dict[str, str]:
        read.append(asyncio.get_running_loop().time())
        return {"ann": "Dovecot is down"} if len(read) == 1 else {}

    async def a_while() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(daemon.audits(), 0.5)

    monkeypatch.setattr(sync, "FIRST_AUDIT", 0.0)
    monkeypatch.setattr(sync, "AUDIT_SECONDS", 0.0)
    monkeypatch.setattr(sync, "AUDIT_AGAIN", 0.1)
    monkeypatch.setattr(daemon, "audit_all", audit_all)
    daemon.met({"boot": "1", "store": "s"})
    assert daemon.allowed()
    monkeypatch.setattr(sync, "AUDIT_SECONDS", 86400.0)
    asyncio.run(a_while())
    assert len(read) == 2 and daemon.audit["at"]


def test_an_audit_in_a_time_to_come_does_not_put_off_the_next(configuration: Configuration, state: Path) -> None:
    in_five_years = time.time() + 5 * 365 * 86400
    sync.write(state / "audit.json", {"at": in_five_years, "users": 1, "differences": {}})
    daemon = Daemon(configuration, "token", state)
    assert daemon.audit["at"] <= time.time() and daemon.audit["users"] == 1


def test_all_own_users_are_compared_every_ten_to_fifteen_minutes(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = (user_of(daemon.configuration, mine=mine) for mine in (True, False))

    async def users() -> list[str]:
        return [mine, theirs]

    monkeypatch.setattr(daemon, "users", users)
    asyncio.run(daemon.make_pass(everybody=False))
    assert daemon.queue.waiting.keys() == {mine} and not daemon.outbox
    assert 600 < daemon.pass_due - daemon.pass_started < 900
    # Whoever syncs them: `make check` compares it with the accounts of the stack.
    assert daemon.status()["pass"]["users"] == 2


def test_two_daemons_meet_over_one_connection(daemon: Daemon) -> None:
    async def meet() -> dict[str, Any]:
        server = await asyncio.start_server(daemon.serve, "127.0.0.1", 0)
        line = Line(server.sockets[0].getsockname()[1], "token")
        first = await line.ask("/peer/hello", {"boot": "1", "store": "s"})
        streams = line.streams
        second = await line.ask("/peer/changed", {"users": {"ann": 1}})
        assert second == {} and line.streams is streams
        line.token = "guess"
        with pytest.raises(OSError, match="403"):
            await line.ask("/peer/hello", {})
        server.close()
        return first

    word = asyncio.run(meet())
    assert word["store"] == daemon.store.id and word["problem"] is None
    assert "ann" in daemon.queue.waiting


# What the stack says of it


def test_both_hosts_are_told_of_one_another(keyed_stack: Stack) -> None:
    said = {}
    for host in keyed_stack.hosts_with("maildrop"):
        file = bundle(keyed_stack, host)["files"][replication.CONFIGURATION]
        said[host.fqdn] = json.loads(file["content"])
    one, other = said.values()
    assert one["host"] == other["peer"] and one["peer"] == other["host"]
    assert {*one} == {*Configuration.__dataclass_fields__}


def test_dovecot_tells_of_changes_and_not_of_looks(keyed_stack: Stack) -> None:
    for host in keyed_stack.hosts_with("maildrop"):
        text = bundle(keyed_stack, host)["files"]["/etc/dovecot/dovecot.conf"]["content"]
        assert 'cmd_name="UID MOVE"' in text and 'cmd_name="NOOP"' not in text and 'cmd_args="*BODY[*"' in text
