"""A copy of the mailboxes, and mails that come back from it: what docs/operating.md says, as it says it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import foreign
from lab.pair import HOSTS
from tests.lab.conftest import Lab
from tests.lab.steps import eventually, on

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
USER, FOLDER = "ben", "Restored-2026-11-27"


def recipe(begins: str) -> str:
    """The commands of the page that begin with some words."""
    blocks = OPERATING.read_text().split("```\n")[1::2]
    return next(block for block in blocks if block.startswith(begins)).replace("USER", USER)


def shell(lab: Lab, host: str, commands: str) -> str:
    done = lab.run(host, "sh", "-ec", commands)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def copies(lab: Lab, host: str, message_id: str) -> int:
    """How often a mail is in the user's mailbox at a host."""
    search = ("doveadm", "search", "-u", USER, "mailbox", "*", "header", "Message-ID", message_id)
    return len(lab.run(host, *search).stdout.splitlines())


@pytest.fixture
def delivered(lab: Lab) -> Iterator[list[str]]:
    """Three mails of a user, at both hosts, and in the copy of the first."""
    sent = {"sender": "bob@far.example", "to": f"{USER}@hill.example", "subject": "Keep this"}
    found = [foreign.send(lab.state, **sent) for _ in range(3)]
    eventually(lambda: all(on(lab, host, USER, message_id) for host in HOSTS for message_id in found))
    shell(lab, HOSTS[0], recipe("install -d"))
    yield found
    listed = f"doveadm mailbox list -u {USER} 'Restored*/*'"
    shell(lab, HOSTS[0], f"rm -rf /srv/mailboxes; {listed} | xargs -r -n 1 doveadm mailbox delete -r -u {USER} || true")


def test_deleted_mails_come_back_from_the_copy_at_both_hosts_once_each(lab: Lab, delivered: list[str]) -> None:
    gone, left = delivered[:2], delivered[2]
    for message_id in gone:
        shell(lab, HOSTS[1], f"doveadm expunge -u {USER} mailbox '*' header Message-ID '{message_id}'")
    shell(lab, HOSTS[1], f"posthorn-sync now {USER}")
    eventually(lambda: not any(copies(lab, host, message_id) for host in HOSTS for message_id in gone))
    # The room is given back each night: from then on they are in no file of the store.
    for host in HOSTS:
        shell(lab, host, f"doveadm purge -u {USER}")

    shell(lab, HOSTS[0], recipe("folder="))
    for message_id in gone:
        eventually(lambda m=message_id: [copies(lab, host, m) for host in HOSTS] == [1, 1])  # type: ignore[misc]
    # Whoever runs it twice doubles nothing.
    shell(lab, HOSTS[0], recipe("folder="))
    # What was not gone is in the folder too, beside the one that stayed: the user takes what he wants.
    assert [copies(lab, host, left) for host in HOSTS] == [2, 2]
    folders = shell(lab, HOSTS[1], f"doveadm mailbox list -u {USER}").split()
    assert f"{FOLDER}/INBOX" in folders
    found = shell(lab, HOSTS[1], f"doveadm fetch -u {USER} hdr.message-id mailbox {FOLDER}/INBOX all")
    assert all(message_id in found for message_id in delivered)


def test_the_copy_follows_what_changed_and_only_looks(lab: Lab, delivered: list[str]) -> None:
    shell(lab, HOSTS[0], f"doveadm expunge -u {USER} mailbox '*' header Message-ID '{delivered[0]}'")
    shell(lab, HOSTS[0], recipe("install -d"))
    assert [copies(lab, HOSTS[0], message_id) for message_id in delivered] == [0, 1, 1]
    # Into another folder: into the former one it does nothing.
    shell(lab, HOSTS[0], recipe("folder=").replace(FOLDER, f"{FOLDER}-again"))
    # It was taken out of the copy by the second run: a copy is of one day, and an older one has to be kept beside it.
    assert [copies(lab, HOSTS[0], message_id) for message_id in delivered] == [0, 2, 2]
