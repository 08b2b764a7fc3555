"""Wrong passwords: how they are counted on a host, and what is concluded over all hosts."""

from __future__ import annotations

from typing import Any

import pytest

from check import hosts, look
from check.finding import Severity
from model.stack import Stack

LINES = {
    12: [
        "auth: lua(ann,203.0.113.9): Password mismatch",
        "auth-worker(77): conn unix:auth-worker (pid=9,uid=101): auth-worker<4>: "
        "lua(Info@hill.example,2001:db8:f::9,<4Pc2kq0LrNPLAHEJ>): Password mismatch",
        "auth-worker(77): conn unix:auth-worker (pid=9,uid=101): auth-worker<5>: "
        "lua(o,dd)name,203.0.113.9): db-lua: unknown user",
        "imap-login: Disconnected (auth failed, 1 attempts in 2 secs): user=<ann>, rip=203.0.113.9, mismatch",
    ],
    13: [
        "auth(ann,203.0.113.9,sasl:plain): lua: Password mismatch",
        "auth-worker(Info@hill.example,2001:db8:f::9)<77><4Pc2kq0LrNPLAHEJ>: request [4]: lua: Password mismatch",
        "auth-worker(o,dd)name,203.0.113.9)<77>: request [5]: lua: db-lua: unknown user",
        "imap-login: Login aborted: Connection closed (auth failed) user=<ann>, rip=203.0.113.9, mismatch",
    ],
}


@pytest.mark.parametrize("release", LINES)
def test_wrong_passwords_are_counted_by_name_and_by_client(monkeypatch: pytest.MonkeyPatch, release: int) -> None:
    monkeypatch.setattr(look, "found", lambda *command: "\n".join(LINES[release]) + "\n")
    seen = look.guesses({})
    assert dict(seen["names"]) == {"ann": 1, "info@hill.example": 1, "o,dd)name": 1}
    assert dict(seen["clients"]) == {"203.0.113.9": 2, "2001:db8:f::9": 1}


def report(names: dict[str, int], clients: dict[str, int]) -> dict[str, Any]:
    return {"guesses": {"names": list(names.items()), "clients": list(clients.items())}}


def test_an_account_that_is_guessed_at_is_told_by_whatever_names_and_at_whichever_hosts(stack: Stack) -> None:
    reports = {
        "maildrop-oak": report({"ann": 40, "xerxes": 500}, {"203.0.113.9": 90}),
        "smtp-out-elm": report({"ann@hill.example": 70, "ben": 3}, {"203.0.113.9": 30, "203.0.113.10": 2}),
    }
    (finding,) = hosts.judge_guesses(stack, reports)
    assert finding.severity is Severity.ADVICE
    assert finding.what == ("110 wrong passwords for ann, 120 wrong passwords from 203.0.113.9 in 24 hours")


def test_a_few_wrong_passwords_are_nothing(stack: Stack) -> None:
    (finding,) = hosts.judge_guesses(stack, {"maildrop-oak": report({"ann": 4, "xerxes": 2}, {"203.0.113.9": 6})})
    assert finding.severity is Severity.GOOD
    assert finding.what == "4 wrong passwords for accounts and 2 for unknown names in 24 hours"
