"""An account comes, is used by its name and by its address, and goes."""

from __future__ import annotations

import shlex
from functools import partial

import bcrypt
import pytest

from lab import foreign
from tests.lab.conftest import Lab
from tests.lab.steps import eventually, in_mailbox, on, submission
from tests.lab.test_check import found

NAME, ADDRESS, PASSWORD = "john.d_oe-2", "doe@dale.example", "a lab's secret"
MAILDROPS = ("maildrop-oak", "maildrop-elm")


def told(lab: Lab) -> list[dict[str, str]]:
    """What the check says of the mailbox."""
    return [finding for finding in found(lab)["findings"] if finding["where"] == NAME]


@pytest.mark.on_release(13)
def test_an_account_comes_and_goes_and_its_mailbox_stays_until_it_is_removed_by_word(unchanged: Lab) -> None:
    lab, before = unchanged, unchanged.stack_file.read_text()
    hashed = "{BLF-CRYPT}" + bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()
    lab.change(lambda config: config["accounts"].update({NAME: {"password": hashed, "quota": "100M"}}))
    assert f"accounts.{NAME}: gets no mail, as no alias of any domain leads to it" in lab.up()
    lab.change(lambda config: config["domains"]["dale.example"]["aliases"].update({"doe": f"{NAME}+shop"}))
    assert "gets no mail" not in lab.up()

    message_id = foreign.send(lab.state, sender="bob@far.example", to=ADDRESS, subject="To doe")
    for login in (NAME, ADDRESS.upper()):
        assert in_mailbox(lab, login, message_id, password=PASSWORD)
    for host in MAILDROPS:
        eventually(partial(on, lab, host, NAME, message_id))
    sent = {"from": ADDRESS, "recipients": ["bob@far.example"]}
    said = submission(lab, user=ADDRESS, password=PASSWORD, **sent)
    assert said["auth"][0] == 235 and said["rcpt"][0] == 250, said
    assert told(lab) == []

    lab.stack_file.write_text(before)
    lab.up()
    assert "error" in lab.client("look", server="imap.hill.example", user=NAME, password=PASSWORD)
    (finding,) = told(lab)
    assert finding["severity"] == "note" and "a mailbox without an account is kept" in finding["what"], finding
    words = finding["advice"].rpartition(": ")[2]
    assert words == f"rm -r /var/vmail/users/{NAME}"
    for host in MAILDROPS:
        assert host in finding["advice"] and lab.run(host, *shlex.split(words)).returncode == 0
    assert told(lab) == []
