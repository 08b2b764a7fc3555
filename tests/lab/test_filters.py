"""What the scanners do with a mail, and what becomes of mail when one of them is lost."""

from __future__ import annotations

import json
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


# Who writes as whom, and what the domains of authors ask (RFC 9989)


@pytest.mark.parametrize("site", MX)
@pytest.mark.parametrize("recipient", ["ann@hill.example", "partner@hill.example"])
def test_a_stranger_does_not_write_as_one_of_us(all_well: Lab, site: str, recipient: str) -> None:
    text = mail(sender="ben@hill.example", to=recipient)
    sent = {"source": "203.0.113.68", "from": "x@far.example", "recipients": [recipient], "data": text}
    code, words = talk(all_well, server=MX[site], **sent)["end"]
    assert (code, words) == (554, "5.7.1 this mail is not from ben@hill.example (RFC 9989)")


HAND_OVER = """
import json, smtplib, sys
said = []
for sender, to, text in json.load(sys.stdin):
    with smtplib.SMTP("198.51.100.2", 25, "mx.far.example", timeout=30) as smtp:
        smtp.starttls()
        smtp.ehlo(), smtp.mail(sender), smtp.rcpt(to)
        code, words = smtp.data(text.encode())
        said.append((code, words.decode()))
print(json.dumps(said))
"""


def handed_over(lab: Lab, *mails: tuple[str, str, str]) -> list[tuple[int, str]]:
    """What the MX says to mails of the foreign host, each with its sender, recipient and text."""
    done = lab.run("foreign", "python3", "-c", HAND_OVER, text=json.dumps(mails))
    assert done.returncode == 0, done.stderr
    return [(code, words) for code, words in json.loads(done.stdout)]


def written_as(author: str, to: str = "ann@hill.example") -> str:
    return mail(to=to).removesuffix(".\r\n").replace("From: <bob@far.example>", f"From: {author}")


ONE = "one From header"
OURS = "not from ben@hill.example"
ASKED = "has mail refused that is not proved"
REFUSED = {
    "<bob@far.example>\r\nFrom: <ben@hill.example>": ONE,
    "<ben@hill.example>\r\nFrom: <bob@far.example>": ONE,
    "<bob@far.example>\r\nFrom : <ben@hill.example>": ONE,
    "Friends: bob@far.example, ben@hill.example;": ONE,
    "undisclosed-authors:;": ONE,
    "ben": ONE,
    "bob@far.example ben@hill.example": ONE,
    "bob@far.example (Bob)\r\n ben@hill.example": ONE,
    "<bob@far.example@hill.example>": ONE,
    "<bob@far.example, ben@hill.example>": ONE,
    "<bob@far.example> <ben@hill.example>": ONE,
    "<ben@hill.example..>": ONE,
    "bob@far.example, ben@hill.example": OURS,
    '"bob@far.example" <ben@hill.example>': OURS,
    "<ben@sub.hill.example>": "not from ben@sub.hill.example",
    "<BEN@Hill.Example>": "not from BEN@Hill.Example",
    "<ben@hill.example.>": OURS,
    "<x@reject.far.example>": ASKED,
    "bob@far.example, x@reject.far.example": ASKED,
    "<x@sub.reject.far.example>": ASKED,
    "<x@nowhere.mixed.far.example>": ASKED,
    "<x@one.suffix.far.example>": ASKED,
    "<x@loop.far.example>": "the DNS does not say now who may write as loop.far.example",
}
PROVED = {
    "<x@strict.far.example>": "y@sub.strict.far.example",
    "<x@other.suffix.far.example>": "y@one.suffix.far.example",
}
"""Authors of whom SPF proves another domain, which is not enough."""
TAKEN = [
    ("x@quarantine.far.example", "y@one.suffix.far.example", "Junk"),
    ("x@there.mixed.far.example", "y@one.suffix.far.example", "Junk"),
    ("x@mixed.far.example", "y@one.suffix.far.example", "INBOX"),
    ("x@trial.far.example", "y@one.suffix.far.example", "INBOX"),
    ("x@doubled.far.example", "y@one.suffix.far.example", "INBOX"),
    # Proved by SPF, of the domain itself and of its organization.
    ("x@reject.far.example", "y@reject.far.example", "INBOX"),
    ("x@sub.reject.far.example", "y@reject.far.example", "INBOX"),
    ("x@mail.one.suffix.far.example", "y@one.suffix.far.example", "INBOX"),
    ("x@sub.strict.far.example", "y@sub.strict.far.example", "INBOX"),
    # A mailing list that the stack lets through.
    ("x@reject.far.example", "y@lists.far.example", "INBOX"),
]


def test_an_author_who_is_not_proved_is_refused_as_the_domain_asks(all_well: Lab) -> None:
    wanted = {**REFUSED, **dict.fromkeys(PROVED, ASKED)}
    sent = [(PROVED.get(author, "bob@far.example"), "ann@hill.example", written_as(author)) for author in wanted]
    for author, (code, words) in zip(wanted, handed_over(all_well, *sent), strict=True):
        assert code == (451 if "loop" in author else 554) and wanted[author] in words, (author, code, words)


HONEST = [
    '"Bob, T." (at far@home) <@hop.example,@far.example:bob@far.example>',
    "(once ben@hill.example) bob@far.example (Bob)",
]
"""One author, whatever else stands there."""


def test_an_honest_author_is_taken_however_it_is_written(all_well: Lab) -> None:
    sent = [("bob@far.example", "ann@hill.example", written_as(author)) for author in HONEST]
    for author, (code, words) in zip(HONEST, handed_over(all_well, *sent), strict=True):
        assert code == 250, (author, words)


def test_an_author_is_taken_as_the_domain_asks(all_well: Lab) -> None:
    sent = [(envelope, "ann@hill.example", written_as(f"<{author}>")) for author, envelope, _ in TAKEN]
    for case, (code, words) in zip(TAKEN, handed_over(all_well, *sent), strict=True):
        assert code == 250, (case, words)
    for (author, _, folder), (_, _, text) in zip(TAKEN, sent, strict=True):
        assert in_mailbox(all_well, "ann", id_of(text), folder=folder), author


CROWD = """
import http.client, json, sys
from concurrent.futures import ThreadPoolExecutor

def asked(mail):
    client, sender, recipient, text = mail
    scanner = http.client.HTTPConnection("127.0.0.1", 11330, timeout=60)
    told = {"IP": client, "From": sender, "Rcpt": recipient, "Helo": "mx.far.example"}
    scanner.request("POST", "/checkv2", text.encode(), told)
    found = json.loads(scanner.getresponse().read())
    return [name for name in found["symbols"] if name.startswith("DMARC_") and name != "DMARC_CHECK"]

with ThreadPoolExecutor(60) as several:
    print(json.dumps(list(several.map(asked, json.load(sys.stdin)))))
"""
VERDICTS = {
    "reject.far.example": "DMARC_POLICY_REJECT",
    "quarantine.far.example": "DMARC_POLICY_QUARANTINE",
    "mail.trial.far.example": "DMARC_POLICY_SOFTFAIL",
    "far.example": "DMARC_POLICY_SOFTFAIL",
    "one.suffix.far.example": "DMARC_POLICY_REJECT",
}


def test_mails_that_come_side_by_side_are_each_judged_by_their_own_author(all_well: Lab) -> None:
    # As its milter asks the scanner: no client has as many sessions at an MX.
    mails, wanted = [], []
    for number in range(400):
        domain, verdict = list(VERDICTS.items())[number % len(VERDICTS)]
        # Greylisting, which comes first, has met none of them.
        sender = f"{secrets.token_hex(6)}@{domain}"
        mails.append((f"203.0.113.{130 + number % 100}", sender, "ann@hill.example", written_as(f"<{sender}>")))
        wanted.append([verdict])
    before = all_well.run("frontend-oak", "pgrep", "-u", "_rspamd", "rspamd").stdout
    done = all_well.run("smtp-in-oak", "python3", "-c", CROWD, text=json.dumps(mails))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted
    # None of its processes has died of it.
    assert all_well.run("frontend-oak", "pgrep", "-u", "_rspamd", "rspamd").stdout == before


# What an alias sends on


def test_neither_spam_nor_a_mail_of_a_forged_sender_is_sent_on(all_well: Lab) -> None:
    sent = [
        ("x@reject.far.example", to, written_as("<x@quarantine.far.example>", to))
        for to in ("partner@hill.example", "partner+x@moor.example", "team@hill.example")
    ]
    for code, words in handed_over(all_well, *sent):
        assert code == 554 and "looks like spam, and" in words and "leads elsewhere" in words, words
    forged = ("bob@soft.far.example", "partner@hill.example", written_as("<bob@soft.far.example>"))
    ((code, words),) = handed_over(all_well, forged)
    assert code == 554 and "bob@soft.far.example is not proved to have sent this mail" in words, words
