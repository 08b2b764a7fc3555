"""What stands between users' filters and Postfix: whoever they write as, the user's name goes with it."""

from __future__ import annotations

import io
import smtplib
import sys
import types
from email import message_from_string
from typing import Any

import pytest

from model.load import parse
from model.stack import Stack
from services.bundle import bundle

DORA = "dora dora@hill.example,info@hill.example"


@pytest.fixture
def program(stack: Stack, tmp_path: Any) -> Any:
    """The program of a mailbox host, with dora's addresses, and Postfix that only notes what it gets."""
    files = bundle(stack, stack.all_hosts["maildrop-oak"])["files"]
    text = files["/usr/local/lib/posthorn/filter-mail"]["content"]
    (tmp_path / "authors").write_text(DORA + "\n")
    module = types.ModuleType("filter_mail")
    exec(text.replace("/etc/dovecot/authors", str(tmp_path / "authors")), module.__dict__)
    return module


@pytest.fixture
def sent(program: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sends a mail as dora's filter; returns what Postfix gets: sender, recipients, text."""
    got: list[Any] = []
    away = program.away = []

    class Postfix:
        def __init__(self, *place: Any, **options: Any) -> None:
            if away:
                raise away.pop()

        def __enter__(self) -> Postfix:
            return self

        def __exit__(self, *why: object) -> None: ...

        def sendmail(self, sender: str, recipients: list[str], text: bytes, **options: Any) -> None:
            if recipients[0].startswith("-"):
                raise smtplib.SMTPRecipientsRefused({recipients[0]: (501, b"5.1.3 Bad recipient address syntax")})
            if recipients[0].startswith("full@"):
                raise smtplib.SMTPRecipientsRefused({recipients[0]: (452, b"4.3.1 Insufficient system storage")})
            if b"\n\r\nlarge" in text:
                raise smtplib.SMTPDataError(552, b"5.3.4 Error: message file too big")
            got.append((sender, recipients, text.decode().replace("\r\n", "\n")))

    program.lda = 0

    def deliver(command: tuple[str, ...], **options: Any) -> Any:
        program.inbox.append((command, options["input"].decode().replace("\r\n", "\n")))
        return types.SimpleNamespace(returncode=program.lda)

    def send(text: str, sender: str = "<>", user: str = "dora", to: str = "bob@far.example") -> Any:
        monkeypatch.setattr(program.smtplib, "SMTP", Postfix)
        monkeypatch.setattr(sys, "argv", ["filter-mail", user, "-i", "-f", sender, "--", to])
        monkeypatch.setattr(program.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(program.syslog, "syslog", lambda level, text: program.journal.append(text))
        monkeypatch.setattr(program.subprocess, "run", deliver)
        program.journal, program.inbox = [], []
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        program.main()
        return got[-1] if got else None

    return send


@pytest.mark.parametrize(
    ("authors", "author"),
    [
        ("From: <dora@hill.example>\n", "<dora@hill.example>"),
        ("From: Information <info+x@hill.example>\n", "Information <info+x@hill.example>"),
        ("From: <ben@hill.example>\n", "<dora@hill.example>"),
        ("From: dora@hill.example, ben@hill.example\n", "<dora@hill.example>"),
        ('From: "dora@hill.example" <ben@hill.example>\n', "<dora@hill.example>"),
        ("From: <info@hill.example>\nFrom: <ben@hill.example>\n", "<dora@hill.example>"),
        ("from :\n ben@hill.example\n", "<dora@hill.example>"),
        ("Sender: ben@hill.example\nResent-From: ben@hill.example\n", "<dora@hill.example>"),
    ],
)
def test_what_a_filter_says_is_from_its_user(sent: Any, authors: str, author: str) -> None:
    sender, recipients, text = sent(f"X-Sieve: P\n{authors}To: bob@far.example\n\nFrom: ben@hill.example\n")
    assert (sender, recipients) == ("", ["bob@far.example"])
    head, _, body = text.partition("\n\n")
    lines = head.split("\n")
    assert lines[0] == "X-Posthorn-Filter: dora says"
    assert [line for line in lines if line.lower().startswith(("from", "sender", "resent"))] == [f"From: {author}"]
    assert body == "From: ben@hill.example\n"


@pytest.mark.parametrize(
    ("sender", "leaves"),
    [("ben@hill.example", "dora@hill.example"), ("info@hill.example", "info@hill.example"), ("<>", "")],
)
def test_the_envelope_s_sender_is_the_user_s_own(sent: Any, sender: str, leaves: str) -> None:
    assert sent("From: <dora@hill.example>\n\nx\n", sender)[0] == leaves


def test_what_a_filter_sends_on_keeps_its_author_and_loses_a_false_mark(sent: Any) -> None:
    came = "X-Sieve: P\nX-Sieve-Redirected-From: dora\nX-Posthorn-Filter: ben\n says\nFrom: ben@hill.example\n\n.dot\n"
    _, _, text = sent(came, "dora@hill.example")
    assert text.startswith("X-Posthorn-Filter: dora redirects\nX-Sieve: P\n")
    assert text.count("X-Posthorn-Filter") == 1 and "\nFrom: ben@hill.example\n\n.dot\n" in text


def test_a_mark_of_dovecot_that_a_user_writes_sends_nothing_on(sent: Any) -> None:
    text = sent("X-Sieve: P\nMessage-ID: <1@x>\nX-Sieve-Redirected-From: dora\nFrom: ben@hill.example\n\nx\n")[2]
    assert text.startswith("X-Posthorn-Filter: dora says\nFrom: <dora@hill.example>\n")


def test_a_refusal_of_a_filter_tells_no_name_inside(sent: Any) -> None:
    report = (
        "X-Sieve: P\nFrom: Mail Delivery Subsystem <postmaster@hill.example>\nSubject: refused\n"
        'Content-Type: multipart/report; report-type=disposition-notification;\n boundary="b"\n\n'
        "Your message to <dora@maildrop.net.hill.example> was refused\n"
        "Reporting-UA: maildrop-oak; Dovecot\nFinal-Recipient: rfc822; dora@maildrop.net.hill.example\n"
        "\nReceived: from smtp-in.hill.example (smtp-in.oak.net.hill.example\n\t[198.18.1.11])\n"
        "Received: from mx.far.example\n\tby smtp-in.hill.example\n"
    )
    text = sent(report)[2]
    assert "198.18." not in text and "\nReceived: from mx.far.example\n\tby smtp-in.hill.example\n" in text
    assert "net.hill.example" not in text and "maildrop-oak" not in text and "rfc822; dora@hill.example" in text
    # The notification is from whom it is about (RFC 8098 section 3).
    assert "\nFrom: <dora@hill.example>\n" in text


SENT_ON = "X-Sieve: P\nX-Sieve-Redirected-From: carl\nFrom: eve@far.example\n\nx\n"


PARAGRAPH = "Gr\u00fc\u00dfe von Dora = " * 100


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (
            "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n",
            f"\n{PARAGRAPH}\n.dot \nFrom me\n",
        ),
        ("", f"\n{PARAGRAPH}"),
        ("Content-Type: multipart/alternative; boundary=b\n", f"\n--b\n\n{PARAGRAPH}\n--b\n\nx\n--b--\n"),
    ],
)
def test_an_answer_with_long_lines_leaves_in_short_ones_that_read_the_same(sent: Any, head: str, body: str) -> None:
    header = f"X-Sieve: P\nFrom: <dora@hill.example>\nSubject: {'w ' * 60}\nMIME-Version: 1.0\n"
    text = sent(f"{header}{head}{body}")[2]
    assert max(map(len, text.split("\n"))) < 140 and f"\nSubject: {'w ' * 60}\n" in text
    texts = [part for part in message_from_string(text).walk() if not part.is_multipart()]
    read = [part.get_payload(decode=True).decode() for part in texts]  # type: ignore[union-attr]
    assert read[0].rstrip("\n") == (PARAGRAPH if "--b" in body else body[1:].rstrip("\n"))
    assert text.startswith("X-Posthorn-Filter: dora says\nFrom: <dora@hill.example>\n")


def test_short_lines_and_the_mails_of_others_leave_as_they_are(sent: Any) -> None:
    short = (
        "X-Sieve: P\nFrom: <dora@hill.example>\nContent-Transfer-Encoding: 8bit\n\nGr\u00fc\u00dfe = \n"
        + "x" * 998
        + "\n"
    )
    assert sent(short)[2].endswith("\n\nGr\u00fc\u00dfe = \n" + "x" * 998 + "\n")
    assert sent(f"{SENT_ON}{PARAGRAPH}\n")[2].endswith(f"\n\nx\n{PARAGRAPH}\n")


def test_a_user_without_an_address_sends_on_and_says_nothing(program: Any, sent: Any) -> None:
    sender, _, text = sent(SENT_ON, "carl@hill.example", user="carl")
    assert sender == "postmaster@hill.example" and "From: eve@far.example\n" in text
    for sender in ("<>", "postmaster@hill.example"):
        with pytest.raises(SystemExit) as end:
            sent("X-Sieve: P\nFrom: <postmaster@hill.example>\n\npay\n", sender, user="carl")
        # Dovecot keeps the mail that it is about; what was to be said is nobody's.
        assert end.value.code == 75 and "carl sends does not leave: the user has no address" in program.journal[0]
        assert not program.inbox


@pytest.mark.parametrize(
    ("written", "leaves"),
    [
        ("bob@b\u00fccher.example", "bob@xn--bcher-kva.example"),
        ("bob@B\u00fccher.example", "bob@xn--bcher-kva.example"),
        ("bob@XN--bcher-kva.example", "bob@XN--bcher-kva.example"),
    ],
)
def test_a_recipient_in_an_international_domain_is_reached_by_its_ascii_form(
    sent: Any, written: str, leaves: str
) -> None:
    assert sent(SENT_ON, to=written)[1] == [leaves]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        # IDNA of 2003 would send it to strasse.example, which may be another's.
        ("bob@stra\u00dfe.example", r"write 'bob@stra\xdfe.example' in ASCII"),
        ("b\u00f6b@far.example", r"write 'b\xf6b@far.example' in ASCII"),
        ("bob@\u00fc..example", "in ASCII"),
        ("-x@far.example", "Postfix does not take it: {'-x@far.example': (501,"),
    ],
)
def test_a_recipient_whom_no_mail_reaches_is_told_in_the_journal_and_the_mail_is_in_the_inbox(
    program: Any, sent: Any, written: str, says: str
) -> None:
    # Whatever the status, Dovecot would have the mail wait for days: so it is no failure.
    assert sent(SENT_ON, to=written) is None
    assert says in program.journal[0]
    lda = ("/usr/lib/dovecot/dovecot-lda", "-d", "dora", "-f", "")
    assert program.inbox == [(lda, "From: eve@far.example\n\nx\n")]
    # What a filter says itself holds nothing up.
    with pytest.raises(SystemExit) as end:
        sent("X-Sieve: P\nFrom: dora@hill.example\n\nx\n", to=written)
    assert end.value.code == 75 and says in program.journal[0] and not program.inbox


def test_a_mail_that_postfix_will_never_take_is_in_the_inbox_as_it_came(program: Any, sent: Any) -> None:
    came = "X-Sieve: of a stranger\nDelivered-To: dora\nX-Posthorn-Filter: ben says\n\nlarge\n"
    assert sent(f"X-Sieve: P\nX-Sieve-Redirected-From: dora\n{came}") is None
    assert [text for _, text in program.inbox] == [came]


def test_a_mail_that_postfix_will_take_later_or_that_has_no_room_in_the_inbox_waits(program: Any, sent: Any) -> None:
    for to, status, tried in ("full@far.example", 0, 0), ("-x@far.example", 75, 1):
        program.lda = status
        with pytest.raises(SystemExit) as end:
            sent(SENT_ON, to=to)
        assert end.value.code == 75 and len(program.inbox) == tried and len(program.journal) == 1


def test_a_postfix_that_restarts_is_waited_for_and_not_for_ever(
    program: Any, sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.away += [ConnectionRefusedError(), smtplib.SMTPServerDisconnected()]
    assert sent(SENT_ON)[1] == ["bob@far.example"]
    clock = iter(range(100))
    monkeypatch.setattr(program.time, "monotonic", lambda: next(clock))
    program.away += [ConnectionRefusedError(111, "Connection refused")] * 50
    with pytest.raises(SystemExit) as end:
        sent(SENT_ON)
    assert end.value.code == 75 and "Connection refused" in program.journal[0] and not program.inbox
    assert 50 - len(program.away) == program.TRIES_FOR + 1
    # Dovecot gives up a program after thirty seconds (submission_timeout).
    assert program.TRIES_FOR + program.ANSWERS_IN < 30


def test_users_whom_only_a_catch_all_reaches_have_no_address(config: dict[str, Any]) -> None:
    config["accounts"]["carl"] = config["accounts"]["ann"]
    config["domains"]["dale.example"]["aliases"]["*"] = "carl"
    stack = parse("lab", "Pulumi.lab.yaml", config)
    authors = bundle(stack, stack.all_hosts["maildrop-oak"])["files"]["/etc/dovecot/authors"]["content"]
    senders = bundle(stack, stack.all_hosts["frontend-oak"])["files"]["/etc/rspamd/posthorn-senders"]["content"]
    assert "\nann " in f"\n{authors}" and "carl" not in authors and "carl" not in senders


def test_lines_end_as_smtp_wants_however_they_came(program: Any) -> None:
    assert program.in_crlf(b"a\nb\r\nc\rd") == b"a\r\nb\r\nc\r\nd\r\n"
    assert program.in_crlf(b"a\n\n") == b"a\r\n\r\n"
