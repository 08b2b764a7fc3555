"""How ports are talked to when there are many of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent import agent
from check import wire

TARGETS = [
    {"address": "198.51.100.2", "port": 25},
    {"address": "198.51.100.2", "port": 465},
    {"address": "203.0.113.9", "port": 25},
    {"address": "203.0.113.9", "port": 465},
    {"address": "203.0.113.9", "port": 587},
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Ports that were asked, in order. Of two hosts one is overrun at first, and the other one dead."""
    asked: list[tuple[str, int]] = []

    async def talk_to(target: dict[str, Any], authorities: object) -> dict[str, Any]:
        asked.append((target["address"], target["port"]))
        silent = target["address"] == "203.0.113.9" or "patience" not in target
        return {"connected": not silent, "silent": silent}

    monkeypatch.setattr(wire, "talk_to", talk_to)
    return asked


def test_a_host_that_was_overrun_is_asked_again_and_answers(asked: list[tuple[str, int]]) -> None:
    talks = asyncio.run(wire.talk_to_all(TARGETS, {}))
    assert [talk["connected"] for talk in talks] == [True, True, False, False, False]


def test_a_host_that_is_gone_is_asked_again_at_one_port_only(asked: list[tuple[str, int]]) -> None:
    asyncio.run(wire.talk_to_all(TARGETS, {}))
    assert [port for address, port in asked if address == "203.0.113.9"] == [25, 465, 587, 25]


def test_a_port_that_answered_is_not_asked_again(asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk_to(target: dict[str, Any], authorities: object) -> dict[str, Any]:
        asked.append((target["address"], target["port"]))
        return {"connected": True}

    monkeypatch.setattr(wire, "talk_to", talk_to)
    asyncio.run(wire.talk_to_all(TARGETS, {}))
    assert len(asked) == len(TARGETS)


class UnderStress:
    """An SMTP server that ends a session at its first refusal, as Postfix does when it has no room for more."""

    def __init__(self, *, says_why: bool) -> None:
        self.says_why, self.sessions = says_why, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sessions += 1
        writer.write(b"220 mx.example ESMTP\r\n")
        while line := await reader.readline():
            refuses = line.startswith(b"RCPT") and b"nobody" in line
            if b"full" in line:
                writer.write(b"452 4.2.2 The mailbox is full\r\n")
            elif b"late" in line:
                writer.write(b"452 4.3.1 Insufficient system storage\r\n")
            else:
                writer.write(b"550 5.1.1 Unknown\r\n" if refuses else b"250 Ok\r\n")
            if refuses:
                writer.write(b"421 4.7.0 mx.example Error: too many errors\r\n" if self.says_why else b"")
                break
            if line.startswith(b"QUIT"):
                break
        writer.close()

    async def __aenter__(self) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self.server.close()


@pytest.mark.parametrize("says_why", [True, False], ids=["with 421", "without a word"])
def test_a_server_that_ends_a_session_at_its_first_refusal_is_asked_all_in_several(*, says_why: bool) -> None:
    recipients = [("", "nobody-1@a.example"), ("", "ann@a.example"), ("", "nobody-2@a.example"), ("", "bob@a.example")]
    server = UnderStress(says_why=says_why)

    async def ask() -> dict[str, Any]:
        async with server as port:
            target = {"address": "127.0.0.1", "port": port, "protocol": "smtp", "tls": "none", "name": "mx.example"}
            return await wire.talk_to({**target, "recipients": recipients}, {})

    talk = asyncio.run(ask())
    assert talk["error"] == ""
    assert [code for _, _, code, _ in talk["replies"]] == [550, 250, 550, 250]
    assert server.sessions == 3


def test_the_agent_takes_a_session_that_ends_with_the_refusal_that_it_wanted_for_a_good_one() -> None:
    async def ask() -> str | None:
        async with UnderStress(says_why=True) as port:
            probe = {"address": "127.0.0.1", "port": port, "tls": "none", "server_name": "mx.example"}
            return await asyncio.to_thread(
                agent.probe_smtp, {**probe, "accepts": "ann@a.example", "refuses": "nobody@a.example"}
            )

    assert asyncio.run(ask()) is None


@pytest.mark.parametrize(
    ("recipient", "says"),
    [
        ("full@a.example", None),
        ("late@a.example", "does not accept late@a.example: 452 4.3.1 Insufficient system storage"),
    ],
)
def test_the_agent_takes_a_mailbox_that_is_full_for_one_that_is_there(recipient: str, says: str | None) -> None:
    async def ask() -> str | None:
        async with UnderStress(says_why=True) as port:
            probe = {"address": "127.0.0.1", "port": port, "tls": "none", "server_name": "mx.example"}
            return await asyncio.to_thread(
                agent.probe_smtp, {**probe, "accepts": recipient, "refuses": "nobody@a.example"}
            )

    assert asyncio.run(ask()) == says
