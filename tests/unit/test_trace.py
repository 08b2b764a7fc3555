"""What `make trace` makes of the journals of several hosts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from check import lines, trace
from check.trace import Story
from model.stack import Stack

ROOT = Path(__file__).parents[2]
NOON = 1_800_000_000.0

Journal = list[tuple[str, float, str, str]]
"""Host, seconds after noon, who logged it, and the text."""

DELIVERED: Journal = [
    ("smtp-in-oak", 1.0, "postfix/smtpd", "connect from mx.far.example[203.0.113.25]"),
    ("smtp-in-oak", 1.1, "postfix/smtpd", "69B9EB460B2: client=mx.far.example[203.0.113.25]"),
    ("smtp-in-oak", 1.2, "postfix/cleanup", "69B9EB460B2: message-id=<893c@far.example>"),
    (
        "frontend-oak",
        1.5,
        "rspamd",
        "<c4c92b>; task; rspamd_task_write_log: id: <893c@far.example>, qid: <69B9EB460B2>, ip: 203.0.113.25,"
        " from: <bob@far.example>, (default: F (no action): [-0.90/15.00] [DMARC_POLICY_ALLOW(-0.50){far.example;},"
        "ARC_NA(0.00){},R_SPF_ALLOW(-0.20){+ip4:203.0.113.25;}]), len: 3454, time: 226.1ms, dns req: 12,"
        " rcpts: <ann@hill.example>, mime_rcpts: <ann@hill.example>",
    ),
    ("smtp-in-oak", 1.8, "postfix/qmgr", "69B9EB460B2: from=<bob@far.example>, size=3202, nrcpt=1 (queue active)"),
    (
        "smtp-in-oak",
        2.1,
        "postfix/maildrop/smtp",
        "69B9EB460B2: to=<ann@maildrop.net.hill.example>, orig_to=<Ann@hill.example>,"
        " relay=maildrop.oak.net.hill.example[198.18.1.13]:25, delay=1, delays=0.7/0/0.1/0.2, dsn=2.0.0, status=sent"
        " (250 2.0.0 Ok: queued as 8EB75B48034)",
    ),
    ("smtp-in-oak", 2.2, "postfix/qmgr", "69B9EB460B2: removed"),
    ("maildrop-oak", 2.0, "postfix/smtpd", "8EB75B48034: client=smtp-in.oak.net.hill.example[198.18.1.11]"),
    ("maildrop-oak", 2.0, "postfix/cleanup", "8EB75B48034: message-id=<893c@far.example>"),
    ("maildrop-oak", 2.1, "postfix/qmgr", "8EB75B48034: from=<bob@far.example>, size=3454, nrcpt=1 (queue active)"),
    (
        "maildrop-oak",
        2.3,
        "dovecot",
        "lmtp(ann)<398><aqg6JPKBBWuOAQAAoWpWoA>: sieve: msgid=<893c@far.example>: stored mail into mailbox 'INBOX'",
    ),
    (
        "maildrop-oak",
        2.4,
        "postfix/lmtp",
        "8EB75B48034: to=<ann@maildrop.net.hill.example>, relay=imap.hill.example[private/dovecot-lmtp], delay=0.03,"
        " delays=0/0.01/0.01/0, dsn=2.0.0, status=sent (250 2.0.0 <ann@maildrop.net.hill.example>"
        " aqg6JPKBBWuOAQAAoWpWoA Saved)",
    ),
    ("maildrop-oak", 2.5, "postfix/qmgr", "8EB75B48034: removed"),
]


def refused(after: float, port: str = "smtpd") -> Journal:
    said = (
        "NOQUEUE: reject: RCPT from mx.far.example[203.0.113.25]: 550 5.1.1 <nobody@hill.example>: Recipient address"
        " rejected: User unknown in virtual alias table; from=<bob@far.example> to=<nobody@hill.example> proto=ESMTP"
        " helo=<mx.far.example>"
    )
    return [("smtp-in-elm", after, f"postfix/{port}", said)]


def queued(host: str, name: str, after: float, *tries: str, sender: str = "ann@hill.example", gone: bool) -> Journal:
    """A mail in one queue."""
    message_id = f"<{name.lower()}@hill.example>"
    last: Journal = [(host, after + 500, "postfix/qmgr", f"{name}: removed")]
    return [
        (host, after, "postfix/submission/smtpd", f"{name}: client=unknown[203.0.113.80], sasl_username=ann"),
        (host, after, "postfix/submission/cleanup", f"{name}: message-id={message_id}"),
        (host, after, "postfix/qmgr", f"{name}: from=<{sender}>, size=561, nrcpt=1 (queue active)"),
        *((host, after + n, "postfix/smtp", f"{name}: {text}") for n, text in enumerate(tries, 1)),
        *(last if gone else ()),
    ]


REFUSES = (
    "to=<bob@far.example>, relay=none, delay=30, delays=0.1/0/30/0, dsn=4.4.1, status=deferred"
    " (connect to mx.far.example[203.0.113.25]:25: Connection timed out)"
)
TAKES = (
    "to=<bob@far.example>, relay=mx.far.example[203.0.113.25]:25, delay=0.46, delays=0.1/0/0/0.3, dsn=2.0.0,"
    " status=sent (250 2.0.0 Ok: queued as 2457BB461B2)"
)


def told(stack: Stack, journal: Journal, what: str) -> list[Story]:
    """The stories, as they come about when each host looks into its own journal."""
    wanted = trace.wanted(what)
    entries: dict[str, list[lines.Entry]] = {}
    for host, after, who, text in sorted(journal, key=lambda line: line[1]):
        entries.setdefault(host, []).append((NOON + after, who, text))
    names, asked = wanted, set[str]()
    while names != asked:
        found = {host: lines.chosen(lines.pieces(one), names) for host, one in entries.items()}
        asked, names = names, names.union(*(lines.links(piece) for one in found.values() for piece in one))
    return trace.stories(found, wanted)


def end(stack: Stack, journal: Journal, what: str) -> list[str]:
    (story,) = told(stack, journal, what)
    return trace.ends(story, trace.inside(stack))


@pytest.mark.parametrize("what", ["ann@hill.example", "<893c@far.example>", "893C@far.example", "8EB75B48034"])
def test_a_mail_is_followed_over_hosts_by_any_of_its_names(stack: Stack, what: str) -> None:
    other = queued("smtp-out-elm", "AAAAAA48222", 50, TAKES, sender="carl@dale.example", gone=True)
    (story,) = told(stack, [*DELIVERED, *refused(9), *other], what)
    assert trace.ends(story, trace.inside(stack)) == ["delivered to mailbox INBOX of ann at maildrop-oak"]
    shown = list(trace.told(story, trace.inside(stack)))
    assert shown[0] == "<893c@far.example>, from bob@far.example"
    hosts = [line.split()[2] for line in shown[1:-1]]
    assert hosts == ["smtp-in-oak"] * 2 + ["frontend-oak", "smtp-in-oak"] + ["maildrop-oak"] * 3 + [
        "smtp-in-oak",
        "maildrop-oak",
        "maildrop-oak",
    ]
    assert "rspamd: no action, -0.90/15.00: DMARC_POLICY_ALLOW -0.5, R_SPF_ALLOW -0.2" in shown[3]


def test_a_refusal_is_told_in_its_words_and_once_for_all_tries(stack: Stack) -> None:
    (story,) = told(stack, [*DELIVERED, *refused(9), *refused(30)], "nobody@hill.example")
    assert len(story.steps) == 2
    (said,) = trace.ends(story, trace.inside(stack))
    assert said.startswith("refused by smtp-in-elm for nobody@hill.example: 550 5.1.1 <nobody@hill.example>: Recipient")


def test_the_words_of_a_mail_with_long_lines_are_not_told(stack: Stack) -> None:
    words = "CD0E1B48222: filter: body {} from unknown[203.0.113.80]; from=<ann@hill.example> to=<bob@far.example>"
    said: Journal = [
        ("smtp-out-oak", 1.5, "postfix/submission/cleanup", f"{words.format('secret' * 33)}: fold:[127.0.0.1]:10590")
    ]
    (story,) = told(stack, [*queued("smtp-out-oak", "CD0E1B48222", 1, TAKES, gone=True), *said], "CD0E1B48222")
    assert len(story.steps) == 4 and "secret" not in "".join(trace.told(story, trace.inside(stack)))


def test_all_mails_of_an_address_are_told_in_their_order(stack: Stack) -> None:
    found = told(stack, [*refused(9), *DELIVERED], "bob@far.example")
    assert [len(story.pieces) for story in found] == [4, 1]


def test_a_mail_that_a_scanner_refuses_is_told_with_the_scanner_s_reasons(stack: Stack) -> None:
    text = (
        "7AAAEB460B2: milter-reject: END-OF-MESSAGE from mx.far.example[203.0.113.25]: 5.7.1 Spam message rejected;"
        " from=<bob@far.example> to=<ann@hill.example> proto=ESMTP helo=<mx.far.example>"
    )
    verdict = (
        "<1>; task; rspamd_task_write_log: id: <spam@far.example>, qid: <7AAAEB460B2>, ip: 203.0.113.25, from:"
        " <bob@far.example>, (default: T (reject): [18.00/15.00] [GTUBE(18.00){}]), len: 9, rcpts: <ann@hill.example>"
    )
    journal: Journal = [
        ("smtp-in-oak", 1, "postfix/smtpd", "7AAAEB460B2: client=mx.far.example[203.0.113.25]"),
        ("smtp-in-oak", 1, "postfix/cleanup", "7AAAEB460B2: message-id=<spam@far.example>"),
        ("frontend-ash", 2, "rspamd", verdict),
        ("smtp-in-oak", 3, "postfix/cleanup", text),
    ]
    (story,) = told(stack, journal, "ann@hill.example")
    within = trace.inside(stack)
    assert trace.ends(story, within) == ["refused by smtp-in-oak for ann@hill.example: 5.7.1 Spam message rejected"]
    assert any("rspamd: reject, 18.00/15.00: GTUBE +18" in line for line in trace.told(story, within))


def test_a_mail_that_was_put_off_and_came_again_is_one_that_was_delivered(stack: Stack) -> None:
    text = (
        "milter-reject: END-OF-MESSAGE from mx.far.example[203.0.113.25]: 4.7.1 Try again later; from=<bob@far.example>"
    )
    before: Journal = [
        ("smtp-in-elm", 0.1, "postfix/smtpd", "5AAAEB460B2: client=mx.far.example[203.0.113.25]"),
        ("smtp-in-elm", 0.2, "postfix/cleanup", "5AAAEB460B2: message-id=<893c@far.example>"),
        ("smtp-in-elm", 0.3, "postfix/cleanup", f"5AAAEB460B2: {text} to=<ann@hill.example> proto=ESMTP helo=<x>"),
    ]
    (said,) = end(stack, before, "ann@hill.example")
    assert said.startswith("put off by smtp-in-elm for ann@hill.example, the sender is to come again: 4.7.1")
    assert end(stack, before + DELIVERED, "ann@hill.example") == ["delivered to mailbox INBOX of ann at maildrop-oak"]


def test_a_mail_that_waits_is_told_with_its_queue_and_the_last_reason(stack: Stack) -> None:
    waits = queued("smtp-out-oak", "CD0E1B48222", 1, REFUSES, gone=False)
    said = "waits in the queue of smtp-out-oak for bob@far.example: connect to mx.far.example[203.0.113.25]:25:"
    assert end(stack, waits, "CD0E1B48222") == [f"{said} Connection timed out"]
    sent = queued("smtp-out-oak", "CD0E1B48222", 1, REFUSES, TAKES, gone=True)
    said = "handed over for bob@far.example to mx.far.example[203.0.113.25]:25: 250 2.0.0 Ok: queued as 2457BB461B2"
    assert end(stack, sent, "ann@hill.example") == [said]
    deleted = queued("smtp-out-oak", "CD0E1B48222", 1, REFUSES, gone=True)
    assert end(stack, deleted, "ann@hill.example") == [
        "not in the queue of smtp-out-oak any more: given up, or deleted there"
    ]


def test_a_bounce_is_told_with_the_mail_that_it_is_about(stack: Stack) -> None:
    no = (
        "to=<bob@far.example>, relay=mx.far.example[203.0.113.25]:25, delay=1, delays=0/0/1/0, dsn=5.1.1,"
        " status=bounced (host mx.far.example[203.0.113.25] said: 550 5.1.1 no such user (in reply to RCPT TO command))"
    )
    journal = [
        *queued("smtp-out-oak", "CD0E1B48222", 1, no, gone=True),
        ("smtp-out-oak", 3, "postfix/bounce", "CD0E1B48222: sender non-delivery notification: DD0E1B48223"),
        ("smtp-out-oak", 3, "postfix/cleanup", "DD0E1B48223: message-id=<b1@smtp-out.hill.example>"),
        ("smtp-out-oak", 3, "postfix/qmgr", "DD0E1B48223: from=<>, size=2561, nrcpt=1 (queue active)"),
    ]
    (story,) = told(stack, journal, "bob@far.example")
    assert len(story.pieces) == 2
    said = trace.ends(story, trace.inside(stack))
    assert said[0].startswith(
        "not delivered to bob@far.example, by smtp-out-oak: host mx.far.example[203.0.113.25] said"
    )


def test_a_queue_id_that_comes_again_is_another_mail(stack: Stack) -> None:
    journal = [
        *queued("smtp-out-oak", "CD0E1B48222", 1, TAKES, gone=True),
        ("smtp-out-oak", 90000, "postfix/smtpd", "CD0E1B48222: client=unknown[203.0.113.80]"),
        ("smtp-out-oak", 90000, "postfix/cleanup", "CD0E1B48222: message-id=<other@dale.example>"),
    ]
    (story,) = told(stack, journal, "ann@hill.example")
    assert "other@dale" not in story.title()
    assert len(told(stack, journal, "CD0E1B48222")) == 2


def test_what_a_filter_did_is_told(stack: Stack) -> None:
    def said(words: str) -> Journal:
        return [("maildrop-elm", 2, "dovecot", f"lmtp(ann)<3><abc>: sieve: msgid=<x@far.example>: {words}")]

    assert end(stack, said("forwarded to <ann@far.example>"), "x@far.example") == [
        "the filter of ann at maildrop-elm: forwarded to <ann@far.example>"
    ]
    assert end(stack, said("fileinto action: stored mail into mailbox 'Lists/a'"), "<x@far.example>") == [
        "delivered to mailbox Lists/a of ann at maildrop-elm"
    ]


def test_the_mail_of_a_host_without_postfix_is_followed_to_smtp_out(stack: Stack) -> None:
    journal: Journal = [
        ("frontend-oak", 1, "smtpd", "aee044ce79bb2225 smtp message msgid=a1b2c3d4 size=404 nrcpt=1 proto=ESMTP"),
        (
            "frontend-oak",
            1,
            "smtpd",
            "aee044ce79bb2225 smtp envelope evpid=a1b2c3d4e5f60718 from=<root@frontend.oak.net.hill.example>"
            " to=<bob@far.example>",
        ),
        (
            "frontend-oak",
            2,
            "smtpd",
            "aee044cff8a0b2f9 mta delivery evpid=a1b2c3d4e5f60718 from=<postmaster@hill.example> to=<bob@far.example>"
            ' rcpt=<-> source="198.18.1.14" relay="198.18.1.12 (smtp-out.oak.net.hill.example)" delay=1s result="Ok"'
            ' stat="250 2.0.0 Ok: queued as CD0E1B48222"',
        ),
        *queued("smtp-out-oak", "CD0E1B48222", 1.9, TAKES, sender="postmaster@hill.example", gone=True),
    ]
    (story,) = told(stack, journal, "root@frontend.oak.net.hill.example")
    assert {host for host, _ in story.pieces} == {"frontend-oak", "smtp-out-oak"}
    assert "handed over for bob@far.example to mx.far.example" in trace.ends(story, trace.inside(stack))[0]


def test_a_mail_that_a_host_of_the_stack_refuses_waits(stack: Stack) -> None:
    refuses = TAKES.replace("sent (250 2.0.0 Ok: queued as 2457BB461B2)", "SOFTBOUNCE (550 5.1.1 User unknown)")
    journal = queued("smtp-in-oak", "CD0E1B48222", 1, refuses, gone=False)
    assert end(stack, journal, "bob@far.example") == [
        "waits in the queue of smtp-in-oak for bob@far.example: 550 5.1.1 User unknown"
    ]


def test_what_strangers_write_into_a_journal_does_not_speak_to_the_terminal(stack: Stack) -> None:
    journal = [(host, at, who, text.replace("helo=<", "helo=<\x1b[2J")) for host, at, who, text in refused(1)]
    (story,) = told(stack, journal, "nobody@hill.example")
    assert all(line.isprintable() for line in trace.told(story, trace.inside(stack)))


@pytest.mark.parametrize("what", ["", "a b@far.example", "abc", "69B9EB460B2; reboot", "x@y\n", "ümlaut@x.example"])
def test_only_addresses_message_ids_and_queue_ids_are_looked_for(what: str) -> None:
    if what.strip() != what:
        assert trace.wanted(what) == trace.wanted(what.strip())
        return
    with pytest.raises(trace.TraceError, match="WHAT"):
        trace.wanted(what)


def test_how_long_ago_is_said_in_one_way() -> None:
    assert (trace.seconds("90m"), trace.seconds("2d")) == (5400, 172800)
    for since in ("", "yesterday", "2 d", "-1d", "2d; reboot"):
        with pytest.raises(trace.TraceError, match="SINCE"):
            trace.seconds(since)


def test_a_message_id_of_a_stranger_is_one_word_of_the_shell(tmp_path: Path) -> None:
    made = tmp_path / "made"
    what = f"<$(shell touch {made})';touch {made};'`touch {made}`@far.example>"
    done = subprocess.run(["make", "-n", "trace", "STACK=x", f"WHAT={what}"], cwd=ROOT, capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if "--what" in line]
    command = f"printf '%s\\n' {line.partition('ops trace x')[2]}"
    said = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert f"--what={what}" in said.splitlines() and not made.exists()
