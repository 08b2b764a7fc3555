"""What the scanners do with a mail, and what becomes of mail when one of them is lost."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import faults, foreign
from tests.lab.conftest import Lab
from tests.lab.steps import (
    FIRST,
    MX,
    eventually,
    first_scanner_is_asked,
    id_of,
    in_mailbox,
    mail,
    stopped,
    talk,
)


@pytest.fixture
def all_well(lab: Lab) -> Lab:
    """The lab, when all MX ask the first scanner."""
    first_scanner_is_asked(lab, "smtp-in")
    return lab


def suspicious(**more: object) -> dict[str, object]:
    """A mail that looks half like spam, from a sender that nobody has met."""
    sender = f"{secrets.token_hex(6)}@far.example"
    request = {"source": "203.0.113.68", "from": sender, "recipients": ["ann@hill.example"]}
    return {**request, "data": mail(sender=sender), **more}


@pytest.mark.parametrize(("one", "other"), [("elm", "ash"), ("ash", "oak")])
def test_who_was_asked_to_wait_may_come_again_at_another_site(all_well: Lab, one: str, other: str) -> None:
    sent, asked = suspicious(), time.monotonic()
    assert talk(all_well, server=MX[one], **sent)["end"] == (451, "4.7.1 Try again later")
    assert talk(all_well, server=MX[other], **sent)["end"][0] == 451
    eventually(lambda: time.monotonic() > asked + all_well.stack().filter.greylist_delay + 1)
    # The first try there after the delay: had that site not known of the first one, it would ask to wait.
    assert talk(all_well, server=MX[other], **sent)["end"][0] == 250
    # It is still half like spam: tagged, its subject as it was, and filed to Junk.
    arrived = in_mailbox(all_well, "ann", id_of(str(sent["data"])), folder="Junk")
    assert "\nX-Spam: Yes" in arrived.replace("\r", "") and "\nSubject: A word" in arrived


@contextmanager
def frozen(lab: Lab) -> Iterator[None]:
    """The first scanner's processes stand still: its port is open, and nobody answers."""
    lab.run(FIRST, "systemctl", "kill", "--signal=STOP", "rspamd")
    try:
        yield
    finally:
        lab.run(FIRST, "systemctl", "kill", "--signal=CONT", "rspamd")


@contextmanager
def swallowed(lab: Lab) -> Iterator[None]:
    """The first scanner's site swallows packets."""
    faults.fail(lab.state, "site", "oak", black_hole=True)
    try:
        yield
    finally:
        faults.heal(lab.state, "site", "oak")


@pytest.mark.parametrize("how", ["stopped", "frozen", "swallowed"])
def test_mail_flows_on_when_the_first_scanner_is_lost(all_well: Lab, how: str) -> None:
    lab = all_well
    with {"stopped": stopped(lab, "rspamd", FIRST), "frozen": frozen(lab), "swallowed": swallowed(lab)}[how]:
        for limit in (20, 4):
            # At once it may cost seconds; what was lost is remembered then.
            started = time.monotonic()
            assert talk(lab, server=MX["elm"], **suspicious())["end"][0] in (250, 451)
            assert time.monotonic() - started < limit
        message_id = foreign.send(lab.state, sender="bob@far.example", to="ann@hill.example", subject="Still here")
        assert in_mailbox(lab, "ann", message_id)


def test_a_mail_that_a_lost_scanner_held_is_scanned_by_another(all_well: Lab) -> None:
    lab = all_well
    with frozen(lab):
        # Handed to the frozen one before anybody has noticed.
        assert talk(lab, server=MX["ash"], **suspicious())["end"] == (451, "4.7.1 Try again later")
    log = lab.run("frontend-elm", "journalctl", "-u", "rspamd", "-o", "cat", "-n", "20", "-g", "soft reject").stdout
    assert "203.0.113.68" in log


@pytest.mark.parametrize("site", MX)
@pytest.mark.parametrize("recipient", ["ann@hill.example", "partner@hill.example"])
def test_a_stranger_does_not_write_as_one_of_us(all_well: Lab, site: str, recipient: str) -> None:
    text = mail(sender="ben@hill.example", to=recipient)
    sent = {"source": "203.0.113.68", "from": "x@far.example", "recipients": [recipient], "data": text}
    code, words = talk(all_well, server=MX[site], **sent)["end"]
    assert (code, words) == (554, "5.7.1 this mail is not from ben@hill.example (RFC 7489)")
