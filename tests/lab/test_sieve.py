"""What filters do with a user's mail, what they send, and what a full mailbox means."""

from __future__ import annotations

import json
import quopri
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import foreign
from tests.lab.conftest import Lab
from tests.lab.steps import INSIDE, abroad, eventually, id_of, in_mailbox, mail, on, submission, tried_again

MAILDROPS = ("maildrop-oak", "maildrop-elm")


@contextmanager
def filtered(lab: Lab, user: str, script: str) -> Iterator[None]:
    """A filter that a user puts over ManageSieve, at work at both hosts; afterwards the user has none."""
    said = lab.client("sieve", server="imap.hill.example", user=user, name="trial", script=script)["said"]
    assert not [line for line in said if line.startswith("NO")], said
    for host in MAILDROPS:
        eventually(lambda host=host: "trial ACTIVE" in lab.run(host, "doveadm", "sieve", "list", "-u", user).stdout)  # type: ignore[misc]
    try:
        yield
    finally:
        lab.run(MAILDROPS[0], "doveadm", "sieve", "deactivate", "-u", user)
        lab.run(MAILDROPS[0], "doveadm", "sieve", "delete", "-u", user, "trial")
        for host in MAILDROPS:
            lab.run(host, "posthorn-sync", "now", user)


def test_mail_that_a_filter_sends_on_passes_spf_and_keeps_its_signature_and_seal(lab: Lab) -> None:
    token = secrets.token_hex(8)
    # As many as a filter may have (docs/accounts.md).
    others = "".join(f'redirect "bob+{number}@far.example";' for number in range(1, 8))
    with filtered(lab, "ben", f'redirect "bob@far.example"; {others}'):
        message_id = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject=token)
        mail = abroad(lab, token, "Delivered-To: bob@far.example")
        eventually(lambda: sum(token in mail for mail in foreign.mails(lab.state)) == 8)
    header = mail.partition("\n\n")[0]
    assert message_id in header
    assert "Return-Path: <ben@hill.example>" in header
    assert "spf=pass" in header and re.search(r"dkim=pass .*header.d=far.example", header)
    assert "ARC-Seal:" in header
    # The mail of others is not signed as ours.
    assert not re.search(r"^DKIM-Signature:[^:]*d=hill.example", header, re.MULTILINE | re.DOTALL)
    for name in INSIDE:
        assert name not in header, header


HAND_IN = """
import json, smtplib, ssl, sys
smtp = smtplib.SMTP("198.18.1.13", local_hostname="smtp-in.hill.example")
smtp.starttls(context=ssl._create_unverified_context())
smtp.sendmail("x@far.example", ["ben@maildrop.net.hill.example"], json.load(sys.stdin))
"""


def came_back(lab: Lab, token: str) -> None:
    """Waits until a bounce that tells of a mail is in ben's INBOX on both hosts; it is there once."""
    look = ("doveadm", "fetch", "-u", "ben", "text", "mailbox", "INBOX", "header", "From", "MAILER-DAEMON")
    for host in MAILDROPS:
        eventually(lambda host=host: f"Subject: {token}" in lab.run(host, *look).stdout)  # type: ignore[misc]
    assert lab.run(host, *look).stdout.count(f"Subject: {token}") == 1


def test_a_mail_that_comes_back_from_where_a_filter_has_sent_it_is_in_inbox(lab: Lab) -> None:
    token = secrets.token_hex(8)
    with filtered(lab, "ben", 'redirect "nobody-here@far.example";'):
        foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject=token)
        came_back(lab, token)


def test_a_false_author_of_ours_is_not_sent_on_and_the_user_hears_of_it(lab: Lab) -> None:
    token = secrets.token_hex(8)
    text = f"From: ann@hill.example\nTo: ben@hill.example\nSubject: {token}\nMessage-ID: <{token}@far.example>\n\nx\n"
    # As if the MX had let it in.
    with filtered(lab, "ben", 'if header :contains "message-id" "@far.example" { redirect "bob@far.example"; }'):
        done = lab.run("smtp-in-oak", "python3", "-c", HAND_IN, text=json.dumps(text))
        assert done.returncode == 0, done.stderr
        came_back(lab, token)
    assert not [mail for mail in foreign.mails(lab.state) if token in mail]


def test_mail_of_another_user_is_sent_on_as_that_user_wrote_it(lab: Lab) -> None:
    text = mail(sender="ann@hill.example", to="ben@hill.example")
    sent = {"from": "ann@hill.example", "recipients": ["ben@hill.example"], "data": text}
    with filtered(lab, "ben", 'redirect "bob@far.example";'):
        assert submission(lab, user="ann", **sent)["end"][0] == 250
        header = abroad(lab, id_of(text)).partition("\n\n")[0]
    assert "Return-Path: <ben@hill.example>" in header
    assert re.search(r"dkim=pass .*header.d=hill.example", header) and "dmarc=pass" in header


AS_ANN = """
require ["enotify", "vacation", "editheader", "variables"];
notify :from "ann@hill.example" :message "told {token}" "mailto:bob@far.example?from=ann@hill.example";
vacation :days 1 :handle "{token}" :from "Ann <ann@hill.example>" :subject "away {token}" :mime text:
From: ann@hill.example
X-Sieve-Redirected-From: ann@hill.example
Content-Type: text/plain

I am ann, pay at once.
.
;
"""


def test_a_filter_writes_as_its_user_and_as_nobody_else(lab: Lab) -> None:
    token = secrets.token_hex(8)
    with filtered(lab, "ben", AS_ANN.format(token=token)):
        foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Hello")
        mails = [abroad(lab, f"{word} {token}") for word in ("told", "away")]
    for text in mails:
        header = text.partition("\n\n")[0]
        assert re.findall(r"^From: (.*)$", header, re.MULTILINE) == ["<ben@hill.example>"], header
        assert re.search(r"^Return-Path: <(ben@hill.example)?>", header, re.MULTILINE), header
        assert "dkim=pass" in header and "X-Posthorn-Filter" not in header, header
        assert "Message-ID: <dovecot-sieve-" in header and "@imap.hill.example>" in header, header
        for name in INSIDE:
            assert name not in header, header


def test_a_refusal_of_a_filter_tells_the_address_and_no_host_inside(lab: Lab) -> None:
    token = secrets.token_hex(8)
    with filtered(lab, "ben", f'require "reject"; reject "no {token}";'):
        foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Please")
        text = abroad(lab, f"no {token}", "multipart/report")
    assert (
        "<ben@hill.example> was automatically rejected" in text and "Final-Recipient: rfc822; ben@hill.example" in text
    )
    for name in INSIDE:
        assert name not in text, text


def test_an_answer_of_a_filter_is_signed_and_answers_no_answer(lab: Lab) -> None:
    words = f"away {secrets.token_hex(8)}"
    with filtered(lab, "ben", f'require "vacation"; vacation :days 1 "{words}\n{"and far " * 150}";'):
        message_id = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="There?")
        answer = abroad(lab, words)
        header = answer.partition("\n\n")[0]
        assert f"In-Reply-To: {message_id}" in header
        assert re.search(r"^From: .*ben@hill.example", header, re.MULTILINE)
        assert "Return-Path: <>" in header and "Auto-Submitted: auto-replied" in header
        # Whole, though a paragraph is longer than a line may be.
        assert re.search(r"dkim=pass .*header.d=hill.example", header) and "dmarc=pass" in header
        assert b"and far " * 150 in quopri.decodestring(answer), answer
        for name in INSIDE:
            assert name not in header, header
        # Another robot, and the same person again, get none.
        robot = f"<{secrets.token_hex(8)}@far.example>"
        text = (
            f"From: carl@far.example\nTo: ben@hill.example\nSubject: Also away\nMessage-ID: {robot}\n"
            "Auto-Submitted: auto-replied\n\nI am away too.\n"
        )
        lab.run("foreign", "sendmail", "-f", "bob@far.example", "ben@hill.example", text=text)
        assert in_mailbox(lab, "ben", robot)
        again = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Still there?")
        assert in_mailbox(lab, "ben", again)
        # Nor does a list. But whoever writes to another address that leads to him gets one.
        post = f"<{secrets.token_hex(8)}@far.example>"
        text = text.replace("Auto-Submitted: auto-replied", "List-Id: <list.far.example>").replace(robot, post)
        lab.run("foreign", "sendmail", "-f", "bob+list@far.example", "ben@hill.example", text=text)
        assert in_mailbox(lab, "ben", post)
        for number, to in enumerate(("sales@hill.example", "ben+shop@moor.example", "whoever@dale.example")):
            foreign.send(lab.state, sender=f"bob+{number}@far.example", to=to, subject="There?")
            assert "From: <ben@hill.example>" in abroad(lab, words, f"Delivered-To: bob+{number}@")
    answers = [mail for mail in foreign.mails(lab.state) if words in mail]
    assert len(answers) == 4, answers


def test_root_s_mail_and_bounces_of_a_mailbox_host_leave_signed(lab: Lab) -> None:
    token = secrets.token_hex(8)
    for host in MAILDROPS:
        lab.run(host, "sendmail", "bob@far.example", text=f"Subject: {token} {host}\n\nx\n")
        header = abroad(lab, f"{token} {host}").partition("\n\n")[0]
        assert re.search(r"dkim=pass .*header.d=hill.example", header), header
        assert "Return-Path: <postmaster@hill.example>" in header and "spf=pass" in header, header
        assert "net.hill.example" not in header, header


def test_mail_to_a_subaddress_goes_to_its_folder_where_the_user_has_one_and_it_is_not_the_system_s(lab: Lab) -> None:
    own, system = ("dale", "info", "lists/old"), ("Webmail", "Archive/2026", "Sent/2026", "Trash/old")
    for folder in (*own, *system):
        lab.run(MAILDROPS[0], "doveadm", "mailbox", "create", "-u", "ann", folder)
    addresses = {
        # ann@dale.example is ann+dale, and info@hill.example is ann+info.
        "ann@dale.example": "dale",
        "info@hill.example": "info",
        "info+x@hill.example": "info",
        "ann+info+Sent@hill.example": "info",
        "ann+lists/old@hill.example": "lists/old",
        **{f"ann+{detail}@hill.example": "INBOX" for detail in ("nowhere", "sent", "a+b", *system)},
    }
    try:
        sent = {to: foreign.send(lab.state, sender="bob@far.example", to=to, subject=to) for to in addresses}
        for to, folder in addresses.items():
            search = ("mailbox", folder, "header", "Message-ID", sent[to])
            eventually(lambda search=search: lab.run(MAILDROPS[0], "doveadm", "search", "-u", "ann", *search).stdout)  # type: ignore[misc]
    finally:
        for folder in (*own, *system[1:]):
            lab.run(MAILDROPS[0], "doveadm", "mailbox", "delete", "-u", "ann", folder)


def test_a_filter_may_edit_headers_and_run_nothing(lab: Lab) -> None:
    author = 'deleteheader "From"; addheader "From" "ann@hill.example"; addheader "Sender" "ann@hill.example";'
    with filtered(lab, "ben", f'require "editheader"; addheader "X-Trial" "yes"; {author}'):
        message_id = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Edited")
        arrived = in_mailbox(lab, "ben", message_id)
    # But for who wrote it.
    assert "X-Trial: yes" in arrived and "ann@hill.example" not in arrived and "\nFrom: Bob <bob@far" in arrived, (
        arrived
    )
    script = 'require "vnd.dovecot.pipe"; pipe "learn";'
    said = lab.client("sieve", server="imap.hill.example", user="ben", name="bad", script=script)["said"]
    assert said[-1].startswith("NO"), said


def test_a_mail_program_finds_folders_by_their_use_and_the_quota(lab: Lab) -> None:
    seen = lab.client("look", server="imap.hill.example", user="ann")
    for use in ("Drafts", "Junk", "Sent", "Trash"):
        assert any(f"\\{use}" in folder for folder in seen["folders"]), seen
    assert any(re.search(r"STORAGE \d+ 102400", line) for line in seen["quota"]), seen


USERS = "/etc/dovecot/users"


def storage(lab: Lab, host: str, user: str) -> tuple[int, int]:
    """What a mailbox holds and may hold at a host, in kilobytes."""
    lines = lab.run(host, "doveadm", "-f", "tab", "quota", "get", "-u", user).stdout.splitlines()
    value, limit = next(line.split("\t")[2:4] for line in lines if "\tSTORAGE\t" in line)
    return int(value), int(limit)


@contextmanager
def room(lab: Lab, user: str, kilobytes: int) -> Iterator[None]:
    """A user's mailbox may hold so much for a while."""
    for host in MAILDROPS:
        lab.run(host, "cp", "-a", USERS, f"{USERS}.kept")
        lab.run(host, "sed", "-i", "-E", rf"/^{user}:/s/(storage(_size)?=)100M/\1{kilobytes}k/", USERS)
        lab.run(host, "chown", f"--reference={USERS}.kept", USERS)
    try:
        for host in MAILDROPS:
            # Dovecot looks at the file again when a second has passed.
            eventually(lambda host=host: storage(lab, host, user)[1] == kilobytes)  # type: ignore[misc]
        yield
    finally:
        for host in MAILDROPS:
            lab.run(host, "mv", f"{USERS}.kept", USERS)


@pytest.fixture
def full(lab: Lab) -> Iterator[None]:
    """Ben's mailbox, in which there is a mail, and no room for another for a while."""
    first = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="The first")
    assert in_mailbox(lab, "ben", first)
    with room(lab, "ben", 1):
        yield


def test_mail_for_a_full_mailbox_waits_at_smtp_in_and_comes_when_there_is_room(lab: Lab, full: None) -> None:
    inbound = ("smtp-in-oak", "smtp-in-elm", "smtp-in-ash")

    def told() -> bool:
        quota = lab.client("look", server="imap.hill.example", user="ben")["quota"]
        return any(re.search(r"STORAGE \d+ 1\b", line) for line in quota)

    eventually(told)

    def waits() -> list[str]:
        return [host for host in inbound if "The mailbox is full" in lab.run(host, "postqueue", "-p").stdout]

    message_id = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="No room")
    for host in eventually(waits):
        # When it has waited for too long, its sender hears of it, and nothing of the hosts inside.
        lab.run(host, "postsuper", "-e", "ALL", "deferred")
        lab.run(host, "postqueue", "-f")
    report = abroad(lab, message_id, "multipart/report")
    assert "<ben@hill.example>: host" in report and "Final-Recipient: rfc822;ben@hill.example" in report, report
    for name in INSIDE:
        assert name not in report, report
    message_id = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Still no room")
    eventually(waits)
    for host in MAILDROPS:
        lab.run(host, "sh", "-c", "test -e /etc/dovecot/users.kept && cp -a /etc/dovecot/users.kept /etc/dovecot/users")

    def comes() -> bool:
        found = lab.client("fetch", server="imap.hill.example", user="ben", message_id=message_id, seconds=2)
        return "mail" in found

    tried_again(lab, inbound, comes)


def warnings(lab: Lab, host: str) -> list[str]:
    """What ben was told at a host of how full his mailbox is."""
    told = lab.run(
        host, "doveadm", "fetch", "-u", "ben", "hdr.subject", "mailbox", "INBOX", "subject", "Your mailbox is"
    )
    return re.findall(r"Your mailbox is (\d+) % full", told.stdout)


def test_a_user_is_told_once_that_the_mailbox_is_nearly_full(lab: Lab) -> None:
    def comes(kilobytes: int) -> str:
        text = ("z" * 70 + "\n") * (kilobytes * 14)
        sent = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Growth", text=text)
        assert in_mailbox(lab, "ben", sent)
        for host in MAILDROPS:
            eventually(lambda host=host: on(lab, host, "ben", sent))  # type: ignore[misc]
        return sent

    comes(500)
    whole, before = storage(lab, MAILDROPS[0], "ben")[0] * 10 // 7, warnings(lab, MAILDROPS[0])
    with room(lab, "ben", whole):
        for kilobytes, told in ((whole // 7, ["80"]), (1, ["80"]), (whole // 8, ["80", "95"]), (1, ["80", "95"])):
            comes(kilobytes)
            for host in MAILDROPS:
                eventually(lambda host=host, told=told: warnings(lab, host) == before + told)  # type: ignore[misc]
    full = storage(lab, MAILDROPS[0], "ben")[0]
    with room(lab, "ben", full * 10 // 7):
        # The one that fills it altogether is told of too …
        last = comes(full * 4 // 7)
        for host in MAILDROPS:
            eventually(lambda host=host: warnings(lab, host) == [*before, "80", "95", "95"])  # type: ignore[misc]
        # … and can be deleted by a program that copies what it deletes.
        client = {"server": "imap.hill.example", "user": "ben", "message_id": last, "command": "COPY"}
        assert not lab.client("move", **client, to="Sent")["moved"]
        assert lab.client("move", **client, to="Trash")["moved"]
