"""Many clients at once: sessions and password checks at the size that users have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from lab import foreign
from lab.load import Day, live
from lab.people import FULL
from services import dovecot
from tests.lab.conftest import Lab
from tests.lab.steps import MX, eventually, forget, waiting

SESSIONS, MORE = 300, 10
HOSTS = ("maildrop-oak", "smtp-out-oak")


def crowd(lab: Lab, *steps: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of each step of many clients at one front end (lab/crowd.py)."""
    door = str(lab.stack().all_hosts["frontend-oak"].addresses.public[0])
    request = {"server": door, "name": "imap.hill.example", "authority": str(lab.state.authority_file), "steps": steps}
    done = lab.run("client", lab.state.python, "-m", "lab.crowd", text=json.dumps(request) + "\n")
    assert done.returncode == 0, done.stderr
    answer: list[dict[str, Any]] = json.loads(done.stdout)
    return answer


def with_limits(**limits: int) -> Callable[[dict[str, Any]], None]:
    """An edit of a mailbox host's bundle: other limits in Dovecot's configuration."""

    def edit(wanted: dict[str, Any]) -> None:
        configuration = wanted["files"][dovecot.CONFIGURATION]
        for name, value in limits.items():
            inside = r"service imap {\n  " if name == "process_limit" else ""
            configuration["content"], changed = re.subn(
                rf"({inside}{name} = )\d+$", rf"\g<1>{value}", configuration["content"], flags=re.MULTILINE
            )
            assert changed == 1

    return edit


def test_hundreds_of_sessions_stay_and_neither_a_full_host_nor_a_silent_stranger_ends_one(lab: Lab) -> None:
    users = [[name, lab.state.passwords[name]] for name in ("ann", "ben")]
    own = lab.stack().limits.address_connections
    edit = with_limits(process_limit=SESSIONS + 2 * MORE, mail_max_userip_connections=SESSIONS)
    pushed = lab.push("maildrop-oak", edit)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    try:
        came, away, visits, full, there = crowd(
            lab,
            {"do": "stay", "count": SESSIONS, "users": users, "source": "203.0.113.81"},
            # All that one address may have, and then some.
            {"do": "say_nothing", "count": own + MORE, "source": "203.0.113.82", "closed": MORE},
            {"do": "visit", "count": MORE, "users": users, "source": "203.0.113.83"},
            {"do": "stay", "count": 3 * MORE, "users": users, "source": "203.0.113.84"},
            {"do": "look_around"},
        )
    finally:
        assert lab.push("maildrop-oak").returncode == 0
    assert (came["in"], came["refused"]) == (SESSIONS, []), came
    assert away == {"closed": MORE}
    assert (visits["in"], visits["refused"]) == (MORE, []), visits
    # Whoever is one too many is closed, and does not wait for long.
    assert full["in"] >= 2 * MORE and full["refused"] and there == {"there": SESSIONS + full["in"]}, (full, there)
    assert full["slowest"] < 30, full


def test_people_have_a_busy_day_and_no_mail_is_lost(lab: Lab) -> None:
    told = live(lab.state, Day(users=30, seconds=8, inbound=4, submissions=3, clicks=2))
    assert told.wrong == []
    assert len(told.said["logins"]["times"]) > 2 * 30 and len(told.inbound) == 32


@pytest.mark.on_release(13)
def test_a_mail_to_everybody_comes_to_all_at_both_hosts_and_waits_for_those_who_are_full(lab: Lab) -> None:
    message_id = foreign.send(lab.state, sender="bob@far.example", to="everybody@hill.example", subject="To all")

    def have_it(host: str) -> set[str]:
        find = f"grep -lF '{message_id}' /var/vmail/users/*/mdbox/storage/m.*"
        return {path.split("/")[4] for path in lab.run(host, "sh", "-c", find).stdout.split()}

    for host in ("maildrop-oak", "maildrop-elm"):
        eventually(lambda host=host: have_it(host) == set(lab.state.people) - set(FULL))  # type: ignore[misc]
    full = [f"{name}@maildrop.net.hill.example" for name in FULL]
    assert all(any(waiting(lab, f"smtp-in-{site}", address) for site in MX) for address in full)
    for address in full:
        for site in MX:
            forget(lab, f"smtp-in-{site}", address)


@pytest.mark.parametrize("host", HOSTS)
def test_a_password_is_remembered_until_the_logins_change(lab: Lab, host: str) -> None:
    before = lab.run(host, "cat", dovecot.LOGINS).stdout
    new, old = "a password of the lab", lab.state.passwords["ann"]

    def right(password: str) -> bool:
        return lab.run(host, "doveadm", "auth", "test", "ann", password).returncode == 0

    assert right(old)
    after = re.sub(r"^ann:[^:\n]*", lambda _: f"ann:{dovecot.hashed(new)}", before, flags=re.MULTILINE)
    lab.run(host, "sh", "-c", f"cat >{dovecot.LOGINS}", text=after)
    try:
        # No hash is made for it, and the file is not looked into.
        assert right(old)
        assert right(new)
        lab.run(host, "systemctl", "restart", dovecot.FORGET)
        assert right(new) and not right(old)
    finally:
        lab.run(host, "sh", "-c", f"cat >{dovecot.LOGINS}", text=before)
        lab.run(host, "systemctl", "restart", dovecot.FORGET)
    assert right(old)


@pytest.mark.parametrize("host", HOSTS)
def test_passwords_are_checked_side_by_side_and_not_by_root(lab: Lab, host: str) -> None:
    lab.run(host, "systemctl", "restart", dovecot.FORGET)
    guess = "for n in 1 2 3 4 5 6; do doveadm auth test ann wrong-$n & done; wait"
    assert "auth failed" in lab.run(host, "sh", "-c", guess).stdout
    # They wait for more for a minute.
    listed = lab.run(host, "ps", "-eo", "user=,args=").stdout
    owners = re.findall(r"^(\S+) +dovecot/auth -w", listed, re.MULTILINE)
    assert len(owners) > 1 and set(owners) == {"dovecot"}, listed
