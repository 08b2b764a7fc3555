"""The sync service without Dovecot: who is next, which store is right, what the peer says, what is told to others."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from model.stack import Stack
from services import replication
from services.bundle import bundle
from sync import sync
from sync.sync import Configuration, Daemon, Line, Peer, Queue, Store, describe


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
    for _ in range(3):
        queue.mark("ann", since=0, now=0)
        queue.waiting["ann"].due = 0
        assert queue.take(1) == "ann"
        queue.failed("ann", 1, "no")
    queue.mark("ben", since=0, now=1)
    queue.mark("cid", since=0, now=1)
    assert queue.take(1.1) and queue.take(1.1)


def test_while_nothing_succeeds_one_user_tries_for_all_and_all_follow_when_he_does() -> None:
    queue = Queue()
    users = ("ann", "ben", "cid", "dan")
    for user in users:
        queue.mark(user, since=0, now=0)
    for _ in range(2):
        first = queue.take(1)
        assert first
        queue.failed(first, 1, "no way")
    assert queue.take(1) is None
    tried = queue.take(2)
    assert tried and queue.take(2) is None
    queue.done(tried)
    assert {queue.take(2), queue.take(2), queue.take(2)} == set(users) - {tried}


def test_changes_during_a_sync_are_no_failure() -> None:
    queue = Queue()
    for user in ("ann", "ben"):
        queue.mark(user, since=0, now=0)
        assert queue.take(1) == user
        queue.again(user, 1, "changed")
    assert queue.gate == 0 and queue.take(1.3) == "ann"


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
    assert peer.met({"store": "one"}) is None
    assert "posthorn-sync reseed" in (peer.met({"store": "two"}) or "")
    assert peer.met({"store": "two", "new": True}) is None
    assert Peer("b.example", state / "peer.json").store == "two"


def test_a_peer_with_a_wrong_store_is_refused(state: Path) -> None:
    peer = Peer("b.example", state / "peer.json")
    assert "not mounted" in (peer.met({"store": "one", "problem": "the disk is not mounted"}) or "")


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
