"""Mails that were sent on and came back: how they are found in a journal, and what is told of them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from check import hosts, look
from check.finding import Finding, Place, Severity
from model.stack import Stack

FAR = "mx.far.example[203.0.113.25]"
GONE = f"host {FAR} said: 550 5.1.1 <x@far.example>: User unknown (in reply to RCPT TO command)"


def sent_on(
    mail: str, to: str, status: str, said: str, *, way: str = "forward", sender: str = "b@far.example"
) -> list[Any]:
    """What Postfix logs of a mail that it sends on, from its beginning to its bounce."""
    smtp = "postfix/out/smtp" if way == "forward" else "postfix/smtp"
    return [
        (f"postfix/{way}/smtpd", f"{mail}: client=localhost[127.0.0.1]"),
        ("postfix/qmgr", f"{mail}: from=<{sender}>, size=1033, nrcpt=1 (queue active)"),
        (smtp, f"{mail}: to=<{to}>, relay={FAR}:25, delay=0.3, dsn=5.1.1, status={status} ({said})"),
        ("postfix/bounce", f"{mail}: sender non-delivery notification: 4BA46B6A29F"),
        ("postfix/qmgr", f"{mail}: removed"),
    ]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a look finds in a journal of some lines; each search is noted under ``searches``."""

    def looked(lines: list[tuple[str, Any]]) -> Any:
        clock = itertools.count(1)
        entries = [
            {"__REALTIME_TIMESTAMP": str(next(clock)), "SYSLOG_IDENTIFIER": who, "MESSAGE": text} for who, text in lines
        ]

        def found(*command: str) -> str:
            searches.append(command)
            wanted = {command[n + 1] for n, word in enumerate(command) if word == "-t"}
            chosen = [entry for entry in entries if entry["SYSLOG_IDENTIFIER"] in wanted]
            # As journalctl does where -g and -n stand together: the last one first.
            return "".join(json.dumps(entry) + "\n" for entry in reversed(chosen))

        monkeypatch.setattr(look, "found", found)
        return look.returned({})

    searches: list[tuple[str, ...]] = []
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    looked.searches = searches  # type: ignore[attr-defined]
    return looked


def test_a_refusal_of_what_was_sent_on_is_seen_with_its_way_and_the_other_side_s_words(
    seen: Callable[..., Any],
) -> None:
    lines = sent_on("A1B2C3D4", "partner@far.example", "bounced", GONE) * 2
    lines += sent_on("B1B2C3D4", "x@far.example", "bounced", GONE, way="redirected", sender="ann@hill.example")
    words = "550 5.1.1 <x@far.example>: User unknown"
    assert seen(lines) == [
        ["alias", "", "partner@far.example", 2, words],
        ["filter", "ann@hill.example", "x@far.example", 1, words],
    ]


def test_what_nobody_sent_on_and_what_arrived_is_not_counted(seen: Callable[..., Any]) -> None:
    own = [
        ("postfix/smtps/smtpd", text) if "client=" in text else (who, text)
        for who, text in sent_on("C1B2C3D4", "x@far.example", "bounced", GONE)
    ]
    arrived = sent_on("D1B2C3D4", "x@far.example", "sent", "250 2.0.0 Ok")
    # The same queue ID again, for a mail of a user's own.
    again = sent_on("E1B2C3D4", "x@far.example", "sent", "250 2.0.0 Ok") + [
        (who, text.replace("C1B", "E1B")) for who, text in own
    ]
    assert seen([*own, *arrived, *again]) == []


def test_a_mail_that_waited_to_the_end_is_told_with_its_last_reason(seen: Callable[..., Any]) -> None:
    lines = sent_on("F1B2C3D4", "x@far.example", "deferred", f"connect to {FAR}:25: Connection refused")
    lines.insert(3, ("postfix/qmgr", "F1B2C3D4: from=<b@far.example>, status=expired, returned to sender"))
    assert seen(lines) == [["alias", "", "x@far.example", 1, f"connect to {FAR}:25: Connection refused"]]


def test_of_a_mail_to_two_the_one_that_still_waits_is_not_told(seen: Callable[..., Any]) -> None:
    lines = sent_on("F1B2C3D4", "x@far.example", "bounced", GONE)
    lines.insert(3, ("postfix/out/smtp", f"F1B2C3D4: to=<y@far.example>, relay={FAR}:25, status=deferred (later)"))
    assert [to for _, _, to, _, _ in seen(lines)] == ["x@far.example"]


def test_a_stranger_s_words_do_nothing_to_a_terminal(seen: Callable[..., Any]) -> None:
    lines = sent_on("A1B2C3D4", "x@far.example", "bounced", f"host {FAR} said: 550 \x1b[2J\u202ered\x07 {'x' * 500}")
    lines[2] = (lines[2][0], list(lines[2][1].encode()))
    ((*_, words),) = seen(lines)
    assert words.startswith("550 ?[2J?red? x") and len(words) == 160


def test_a_host_that_sent_no_bounce_is_searched_once(seen: Callable[..., Any]) -> None:
    assert seen([]) == [] and len(seen.searches) == 1  # type: ignore[attr-defined]
    assert "--since=-24h" in seen.searches[0] and "-n" in seen.searches[0]  # type: ignore[attr-defined]


def told(stack: Stack, *returned: list[Any]) -> list[Finding]:
    host = stack.all_hosts["smtp-in-oak"]
    return list(hosts.JUDGES["returned"](stack, host, Place("hosts", host.name), {"returned": list(returned)}))


def test_what_came_back_is_told_with_the_address_that_leads_there(stack: Stack) -> None:
    (target,) = stack.resolved_aliases("hill.example")["partner"]
    words = "550 5.7.1 no mail of yours"
    (finding,) = told(
        stack,
        ["alias", "", str(target).title(), 3, words],
        ["filter", "ann@hill.example", "x@far.example", 1, words],
        ["alias", "", "y@far.example", 1, words],
    )
    assert finding.severity is Severity.ADVICE
    assert finding.what.startswith("of what was sent on, 5 came back in 24 hours: from partner@hill.example")
    assert f'(3: "{words}")' in finding.what
    assert f'; a filter of ann@hill.example to x@far.example (1: "{words}"); a former alias to y@far' in finding.what
    assert "make trace STACK=lab WHAT=ADDRESS" in finding.advice


def test_where_nothing_came_back_nothing_is_told(stack: Stack) -> None:
    assert told(stack) == []
