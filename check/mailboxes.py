"""Whether the two mailbox hosts have the same mail, by the word of the sync service (docs/replication.md)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from check.finding import DAY, Findings, Place, age, size
from model.stack import Stack
from services.replication import HOMES

AREA = "mailboxes"
LATE, OLD = 60.0, 600.0
"""A change that is not at the other host after a minute is late; after ten there is trouble that stays."""
FORMAT = 1
AUDIT_DAYS = 3
"""Every mail is compared once a day."""
PASS_SECONDS = 3600.0
"""All users are looked at every ten to fifteen minutes, whatever was noticed in between."""


def judge(stack: Stack, states: Mapping[str, Mapping[str, Any]], *, alone: bool = False) -> Findings:
    """The state of the mailbox hosts, by the word of each, with every user that is not alike at both.

    ``alone`` when one of them was left out with its site: then changes have to wait.
    """
    for host, state in states.items():
        place = Place(AREA, host)
        if state["format"] == FORMAT:
            yield from _one(place, state, alone=alone)
        else:
            yield place.unknown(f"its state is of form {state['format']}, not {FORMAT}", "push it: make up")
    known = [state for state in states.values() if state["format"] == FORMAT]
    # Whoever syncs a user, each host's pass counts all whom its Dovecot knows.
    users = max((state["pass"]["users"] for state in known), default=0)
    place = Place(AREA, "users")
    if known and users < len(stack.accounts):
        said = f"the last pass saw {users} users, and the stack has {len(stack.accounts)} accounts"
        yield place.better(said, "a new account is seen within a quarter of an hour; else see doveadm user '*'")
    elif known and all(state["ok"] for state in known):
        yield place.good(f"all {users} are alike at both hosts")


def judge_former(reports: Mapping[str, Mapping[str, Any]]) -> Findings:
    """Mailboxes whose account is gone. They are never removed by themselves, and whoever gets the name has them."""
    kept: dict[str, dict[str, str]] = {}
    for host, report in reports.items():
        for name, home in (report.get("former") or {}).items():
            said = f"{size(home['size'])}, unchanged for {age(report['time'] - home['changed'])}"
            kept.setdefault(name, {})[host] = said
    for name, hosts in sorted(kept.items()):
        amounts = "; ".join(f"{said} at {host}" for host, said in sorted(hosts.items()))
        words = f"rm -r {shlex.quote(f'{HOMES}/{name}')}"
        advice = f"whoever gets the name has it; to remove it for good, at {' and at '.join(sorted(hosts))}: {words}"
        yield Place(AREA, name).note(f"a mailbox without an account is kept: {amounts}", advice)


def judge_addresses(stack: Stack) -> Findings:
    """Accounts that nobody can write to."""
    for account in stack.without_address:
        yield Place(AREA, account).note("an account that gets no mail: no alias of any domain leads to it")


def _one(place: Place, state: Mapping[str, Any], *, alone: bool) -> Findings:
    host, peer, pending = place.where, state["peer"], state["pending"]
    status = f"posthorn-sync status on {host}"
    if state["refused"]:
        yield place.wrong(f"nothing is synced: {state['refused']}", f"{status}; docs/replication.md says the way out")
    if not peer["up"] and alone:
        yield place.note(f"{peer['name']} is away with its site: changes wait for it")
    elif not peer["up"]:
        since = f" for {age(state['time'] - peer['since'])}" if peer.get("since") else ""
        yield place.wrong(f"{peer['name']} does not answer it{since}: changes wait for it", f"see {peer['name']}")
    if alone:
        return
    for user in state["stuck"]:
        why = state["waiting"].get(user, {})
        said = f": {why['said']}" if why.get("said") else ""
        advice = f"posthorn-sync status {user} on {host}; docs/replication.md says the way out"
        yield place.wrong(f"the mailbox of {user} does not sync{said}", advice)
    for user, differs in state["audit"]["differences"].items():
        yield place.wrong(f"the mailbox of {user} differs at the two hosts: {differs}", f"posthorn-sync now {user}")
    oldest = pending["oldest_seconds"] or 0
    if pending["users"] and oldest > LATE:
        said = f"{pending['users']} users have changes that are not at the other host, for {age(oldest)}"
        yield place.wrong(said, status) if oldest > OLD else place.better(said, status)
    if state["pass"]["at"] and state["time"] - state["pass"]["at"] > PASS_SECONDS:
        yield place.better(f"its last look at all users was {age(state['time'] - state['pass']['at'])} ago", status)
    if state["audit"]["at"] and state["time"] - state["audit"]["at"] > AUDIT_DAYS * DAY:
        audited = age(state["time"] - state["audit"]["at"])
        yield place.better(f"its last comparison of all mails was {audited} ago", f"posthorn-sync audit on {host}")
    if state["ok"]:
        lag = state["lag_seconds"]["p95"]
        told = "" if lag is None else f", 95 % within {lag:.2f} s"
        yield place.good(f"all changes are at the other host{told}")
