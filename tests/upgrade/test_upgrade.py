"""From Debian 12 to 13, host by host, with mail flowing: docs/upgrade-12-to-13.md, done.

It starts on 12.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lab import foreign, up
from tests.lab.conftest import Lab
from tests.lab.steps import eventually, id_of, mail, stopped, submission, tried_again

MAILBOXES = ("maildrop-oak", "maildrop-elm")


def install(lab: Lab, host: str, release: int, *, blank: bool = False) -> None:
    """A host is made anew with another Debian, and filled by ``make up``."""
    up.reinstall(lab.state, host, release, blank=blank)
    lab.up()
    version = lab.run(host, "sh", "-c", ". /etc/os-release; echo $VERSION_ID").stdout.strip()
    assert version == str(release)


def ids(lab: Lab, host: str, user: str) -> Counter[str]:
    """Message-ID to how often a mailbox has it."""
    found = lab.run(host, "doveadm", "fetch", "-u", user, "hdr.message-id", "mailbox", "*", "all").stdout
    return Counter(word for line in found.splitlines() for word in line.split() if word.startswith("<"))


def alike(lab: Lab) -> bool:
    """Whether both hosts say that nothing waits."""
    for host in MAILBOXES:
        try:
            status = json.loads(lab.run(host, "posthorn-sync", "status", "--json").stdout)
        except ValueError:
            return False
        if not status["ok"] or status["pending"]["users"] or not status["pass"]["at"]:
            return False
    return True


@contextmanager
def mail_flowing(lab: Lab, sent: list[str]) -> Iterator[None]:
    """Somebody abroad writes to a user again and again meanwhile; the Message-IDs are in ``sent``."""
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            there = {"sender": "bob@far.example", "to": "ann@hill.example", "subject": "Still there?"}
            sent.append(foreign.send(lab.state, **there))
            done.wait(1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


def delivered(lab: Lab, host: str) -> str:
    """Delivers a mail right at a mailbox host, and returns its Message-ID."""
    text = mail(to="ann@maildrop.net.hill.example").removesuffix(".\r\n")
    done = lab.run(host, "sendmail", "-f", "bob@far.example", "ann@maildrop.net.hill.example", text=text)
    assert done.returncode == 0, done.stderr
    return id_of(text)


def all_there_once(lab: Lab, sent: list[str]) -> bool:
    """Whether every mail that was sent is at both hosts, and none twice."""
    found = [ids(lab, host, "ann") for host in MAILBOXES]
    if all(message_id in counted for message_id in sent for counted in found):
        assert {counted[message_id] for message_id in sent for counted in found} == {1}
        return True
    return False


def test_mailbox_hosts_are_upgraded_one_by_one_and_no_mail_is_lost_or_doubled(lab: Lab) -> None:
    sent: list[str] = []
    script = 'require "fileinto";\nif header :is "Subject" "Old" { fileinto "Archive"; }\n'
    put = lab.client("sieve", server="imap.hill.example", user="ann", name="old", script=script)["said"]
    assert put[-1].startswith("OK"), put
    try:
        for host in reversed(MAILBOXES):
            with mail_flowing(lab, sent):
                install(lab, host, 13)
                # In the first round this is 2.3 with 2.4.
                eventually(lambda: alike(lab), 180)
            # Each of them takes mail, and the other has it.
            sent.extend(delivered(lab, at) for at in MAILBOXES)
            eventually(lambda: all_there_once(lab, sent), 120)
        for host in MAILBOXES:
            assert "old ACTIVE" in lab.run(host, "doveadm", "sieve", "list", "-u", "ann").stdout
    finally:
        # Back, each from the other, which is the way after the loss of a disk too.
        for host in MAILBOXES:
            if lab.state.release_of(host) == 13:
                install(lab, host, lab.state.release, blank=True)
                lab.run(host, "posthorn-sync", "reseed")
                eventually(lambda: alike(lab), 180)
    assert all_there_once(lab, sent)
    for user in ("ann", "ben"):
        assert ids(lab, MAILBOXES[0], user) == ids(lab, MAILBOXES[1], user)
    lab.run(MAILBOXES[0], "doveadm", "sieve", "deactivate", "-u", "ann")


def test_a_mail_that_waits_in_a_queue_outlives_the_upgrade_of_its_host(lab: Lab) -> None:
    host, text = "smtp-out-oak", mail(sender="ann@hill.example", to="bob@far.example")
    try:
        with stopped(lab, "postfix@-", foreign.NAME):
            sent = {"from": "ann@hill.example", "recipients": ["bob@far.example"], "data": text}
            said = submission(lab, user="ann", **sent)
            assert said["end"][0] == 250, said
            eventually(lambda: "bob@far.example" in lab.run(host, "postqueue", "-p").stdout)
            install(lab, host, 13)
            assert "bob@far.example" in lab.run(host, "postqueue", "-p").stdout
        arrived = tried_again(lab, [host], lambda: foreign.wait_for(lab.state, id_of(text), 1))
        assert "dkim=pass" in arrived
    finally:
        install(lab, host, lab.state.release)
