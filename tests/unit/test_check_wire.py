"""How ports are talked to when there are many of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

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
