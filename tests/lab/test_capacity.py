"""Many clients at once: sessions and password checks at the size that users have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from services import dovecot
from tests.lab.conftest import Lab

SESSIONS, MORE = 300, 10


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
    # Whoever is one too many is told, and does not wait.
    assert full["in"] >= 2 * MORE and full["refused"] and there == {"there": SESSIONS + full["in"]}, (full, there)
    assert all("UNAVAILABLE" in words for words in full["refused"]), full
    assert full["slowest"] < 30, full
