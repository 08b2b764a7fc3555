"""Whether the two mailbox hosts have the same mail, by the word of the sync service (docs/replication.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from check.finding import Findings, Place
from check.hosts import DAY, age
from model.stack import Stack

AREA = "mailboxes"
LATE, OLD = 60.0, 600.0
"""A change that is not at the other host after a minute is late; after ten there is trouble that stays."""
FORMAT = 1
AUDIT_DAYS = 3
"""Every mail is compared once a day."""
PASS_SECONDS = 3600.0
"""All users are looked at every ten to fifteen minutes, whatever was noticed in between."""


def judge(stack: Stack, host: str, state: Mapping[str, Any] | None) -> Findings:
    """The state of one of the two, with every user that is not as the other host has him."""
    if state is None:
        return
    place = Place(AREA, host)
    if state["format"] != FORMAT:
        yield place.unknown(f"its state is of a form {state['format']} that is not known here", "use the same version")
        return
    peer, pending = state["peer"], state["pending"]
    status = f"posthorn-sync status on {host}"
    if state["refused"]:
        yield place.wrong(f"nothing is synced: {state['refused']}", f"{status}; docs/replication.md says the way out")
    if not peer["up"]:
        since = f" for {age(state['time'] - peer['since'])}" if peer.get("since") else ""
        yield place.wrong(f"{peer['name']} does not answer it{since}: changes wait for it", f"see {peer['name']}")
    for user in state["stuck"]:
        why = state["waiting"].get(user, {})
        said = f": {why['said']}" if why.get("said") else ""
        yield place.wrong(f"the mailbox of {user} does not sync{said}", f"posthorn-sync status {user} on {host}")
    for user, differs in state["audit"]["differences"].items():
        yield place.wrong(f"the mailbox of {user} differs at the two hosts: {differs}", f"posthorn-sync now {user}")
    oldest = pending["oldest_seconds"] or 0
    if pending["users"] and oldest > LATE:
        said = f"{pending['users']} users have changes that are not at the other host, for {age(oldest)}"
        yield place.wrong(said, status) if oldest > OLD else place.better(said, status)
    yield from _passes(stack, place, state)


def _passes(stack: Stack, place: Place, state: Mapping[str, Any]) -> Findings:
    """The regular looks at everybody: a pass over all users, and the audit of all mails."""
    last, audit, now = state["pass"], state["audit"], state["time"]
    if last.get("at") is None:
        yield place.note("the first look at all users is still to come")
    elif now - last["at"] > PASS_SECONDS:
        yield place.better(f"the last look at all users was {age(now - last['at'])} ago", "see its journal")
    elif last["users"] < len(stack.accounts):
        missing = f"{last['users']} of {len(stack.accounts)} accounts are synced"
        yield place.wrong(missing, f"see which Dovecot does not know: doveadm user '*' on {place.where}")
    elif state["ok"]:
        lag = state["lag_seconds"].get("p95")
        told = f", 95 % of changes within {lag:.2f} s" if lag is not None else ""
        yield place.good(f"all {last['users']} users are alike at both hosts{told}")
    if audit["at"] is not None and now - audit["at"] > AUDIT_DAYS * DAY:
        yield place.better(f"the last audit of all mails was {age(now - audit['at'])} ago", "posthorn-sync audit")
