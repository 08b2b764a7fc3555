"""What users and hosts send: by which TLS it leaves, what it tells, how often they may, and what comes back."""

from __future__ import annotations

import base64
import email
import re
import secrets
from typing import Any

import pytest

from lab import foreign
from tests.lab.conftest import Lab
from tests.lab.steps import (
    INSIDE,
    PLACES,
    abroad,
    eventually,
    first_scanner_is_asked,
    forget,
    greeting,
    id_of,
    in_mailbox,
    log,
    mail,
    session,
    submission,
    tried_again,
)
from tests.lab.test_sieve import filtered

SENDS_FIRST = "smtp-out-oak"
"""The submission host that the front ends prefer."""


def send(lab: Lab, *recipients: str, text: str = "", **more: Any) -> str:
    """Ann submits a mail. Returns its Message-ID."""
    text = text or mail(sender="ann@hill.example", to=recipients[0])
    request = {"from": "ann@hill.example", "recipients": list(recipients), "data": text, **more}
    said = submission(lab, user="ann", **request)
    assert said["end"][0] == 250, said
    return id_of(text)


# By which TLS it leaves


def test_what_a_domain_has_published_about_its_tls_is_demanded(lab: Lab) -> None:
    send(lab, *(f"bob@{name}.far.example" for name in foreign.DEMANDS))
    for name, demand in foreign.DEMANDS.items():
        # A DANE that fails is not mended by a policy, and a policy that fails is not asked where there is DANE.
        good = demand.dane if demand.dane is not None else demand.sts
        line = eventually(lambda name=name: log(lab, SENDS_FIRST, rf"to=<bob@{name}\.far\.example>.*status="))  # type: ignore[misc]
        assert ("status=sent" if good else "status=deferred") in line, line
        if good:
            assert log(lab, SENDS_FIRST, f"Verified TLS connection established to mx.{name}.far.example"), name
        else:
            assert re.search("certificate not (verified|trusted)|no matching", line, re.IGNORECASE), line
            forget(lab, SENDS_FIRST, f"bob@{name}.far.example")


def test_without_anybody_who_knows_the_policies_mail_waits(lab: Lab) -> None:
    unit, to = "postfix-mta-sts-resolver", f"bob+{secrets.token_hex(4)}@far.example"
    lab.run(SENDS_FIRST, "systemctl", "stop", unit)
    try:
        message_id = send(lab, to)
        assert "status=deferred" in eventually(lambda: log(lab, SENDS_FIRST, rf"to=<{re.escape(to)}>.*status="))
    finally:
        lab.run(SENDS_FIRST, "systemctl", "start", unit)
    tried_again(lab, [SENDS_FIRST], lambda: log(lab, SENDS_FIRST, rf"to=<{re.escape(to)}>.*status=sent"))
    assert abroad(lab, message_id)


# What it tells


def test_a_mail_that_leaves_is_signed_and_tells_nothing_of_the_inside(lab: Lab) -> None:
    # Without date and Message-ID, which ours adds.
    token = secrets.token_hex(8)
    told = "X-Mailer: Oven/2\nX-Originating-IP: 10.1.2.3\nReceived: from stove; Tue, 1 Sep 2026 00:00:00 +0000\n"
    text = f"From: <ann@hill.example>\nTo: <bob@far.example>\nSubject: {token}\n{told}\nWords: {token}\n.\n"
    sent = {"from": "ann@hill.example", "recipients": ["bob@far.example"], "data": text.replace("\n", "\r\n")}
    place = next(PLACES)
    said = submission(lab, user="ann", source=place, helo="kitchen.ann.example", **sent)
    assert said["end"][0] == 250, said
    arrived = abroad(lab, f"Subject: {token}")
    assert "dkim=pass" in arrived and "header.d=hill.example" in arrived, arrived
    assert re.search(r"^Message-Id: <\S+@smtp-out\.hill\.example>", arrived, re.MULTILINE), arrived
    for word in (*INSIDE, place, "kitchen", "Oven", "10.1.2.3", "stove", "[127.0.0.1]", "localhost"):
        assert word not in arrived, (word, arrived)


@pytest.mark.parametrize("site", ["oak", "elm", "ash"])
def test_the_banner_tells_the_service_and_the_host(lab: Lab, site: str) -> None:
    script = "import smtplib; print(smtplib.SMTP().connect('127.0.0.1', 587))"
    said = lab.run(f"smtp-out-{site}", "python3", "-c", script).stdout
    assert f"smtp-out.hill.example ESMTP Postfix (smtp-out.{site}.net.hill.example)" in said


# How often, and how much


def test_spam_of_a_user_is_refused_too(lab: Lab) -> None:
    gtube = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
    text = mail(sender="ann@hill.example", to="bob@far.example", body=gtube)
    said = submission(lab, user="ann", **{"from": "ann@hill.example"}, recipients=["bob@far.example"], data=text)
    assert said["end"][0] == 554, said


def at_submission(lab: Lab, *sends: str) -> list[str]:
    """What submission answers to a session byte by byte, after the login of ann."""
    before = greeting(lab, {"starttls": True, "user": "ann"})
    where = {"server": "smtp-out.hill.example", "name": "smtp-out.hill.example", "port": 587, "source": next(PLACES)}
    replies = session(lab, *before, *sends, "QUIT\r\n", **where)
    assert replies[len(before)].startswith("235"), replies
    return replies[len(before) + 1 :]


def test_a_client_sends_so_many_mails_in_a_minute_and_no_more(lab: Lab) -> None:
    limit = lab.stack().limits.message_rate
    one = ("MAIL FROM:<ann@hill.example>\r\n", "RSET\r\n")
    said = at_submission(lab, *(one * (limit + 1)))
    assert said[2 * limit - 2].startswith("250"), said
    assert said[2 * limit].startswith("450 4.7.1"), said[-4:]


def test_wrong_passwords_are_told_as_such_however_many(lab: Lab) -> None:
    one = "AUTH PLAIN " + base64.b64encode(b"\0ann\0wrong").decode() + "\r\n"
    where = {"server": "smtp-out.hill.example", "name": "smtp-out.hill.example", "port": 587, "source": next(PLACES)}
    before = greeting(lab, {"starttls": True})
    said = session(lab, *before, *[one] * 4, "QUIT\r\n", **where)[len(before) :]
    assert [reply[:3] for reply in said].count("535") == 4 and "454" not in str(said), said


def test_a_server_without_a_certificate_is_nobody_s_submission(lab: Lab) -> None:
    script = """
import smtplib, ssl
anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
anonymous.maximum_version = ssl.TLSVersion.TLSv1_2
anonymous.set_ciphers("aNULL:@SECLEVEL=0")
for port in (465, 587):
    try:
        if port == 465:
            smtplib.SMTP_SSL("smtp-out.hill.example", port, timeout=10, context=anonymous)
        else:
            smtplib.SMTP("smtp-out.hill.example", port, timeout=10).starttls(context=anonymous)
    except ssl.SSLError as error:
        print(error.reason)
"""
    said = lab.run("client", lab.state.python, "-c", script)
    assert len(said.stdout.split()) == 2, said


def test_an_account_writes_to_so_many_recipients_a_day_from_wherever_and_no_more(unchanged: Lab) -> None:
    lab = unchanged
    lab.change(lambda config: config["limits"].update(recipients_per_day=6))
    lab.up()
    # Each scanner counts by itself.
    first_scanner_is_asked(lab, "smtp-out")

    def sent(user: str, login: str = "") -> tuple[int, str]:
        """What becomes of a mail to four, from another address each time."""
        to = ["postmaster@far.example", *(f"bob+{n}@far.example" for n in range(3))]
        sender = f"{user}@hill.example"
        more = {"from": sender, "recipients": to, "data": mail(sender=sender, to=to[1])}
        said = submission(lab, user=login or user, password=lab.state.passwords[user], **more)
        return said["end"]

    assert sent("ann")[0] == 250
    words = "4.7.1 This account has written to too many recipients today, try again later"
    # A name with its domain is the same account.
    assert sent("ann") == (451, words) and sent("ann", "ann@hill.example") == (451, words)
    # What filters send has a limit of its own: strangers use that up, and the user writes on.
    with filtered(lab, "ben", "".join(f'redirect "bob+{n}@far.example";' for n in range(8))):
        first, second = secrets.token_hex(8), secrets.token_hex(8)
        foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject=first)
        eventually(lambda: sum(first in text for text in foreign.mails(lab.state)) >= 6)
        foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject=second)

        def held() -> set[str]:
            told = log(lab, "maildrop-oak", r"status=deferred.*too many recipients today")
            return set(re.findall(r"^(\w+): to=", told, re.MULTILINE))

        eventually(lambda: len(held()) >= 8)
        assert sent("ben")[0] == 250 and sent("ben") == (451, words)
        for queue_id in held():
            lab.run("maildrop-oak", "postsuper", "-d", queue_id)
    assert not [text for text in foreign.mails(lab.state) if second in text]


HOLD = """
import socket, sys
held = [socket.create_connection(("smtp-out.hill.example", 587), 10, (sys.argv[1], 0)) for _ in range(int(sys.argv[2]))]
print("".join(one.recv(99).decode() for one in held))
"""


def test_a_client_has_so_many_connections_at_once_and_no_more(lab: Lab) -> None:
    limit = lab.stack().limits.connections
    said = lab.run("client", lab.state.python, "-c", HOLD, next(PLACES), str(limit + 1)).stdout.splitlines()
    # Each has a process of its own, and the last to come is not always the last to be counted.
    assert sorted(line[:3] for line in said if line) == ["220"] * limit + ["421"], said


def test_a_mail_that_is_too_large_is_refused_by_its_announced_and_by_its_real_size(lab: Lab) -> None:
    limit = lab.stack().limits.message_size
    said = at_submission(lab, f"MAIL FROM:<ann@hill.example> SIZE={limit + 1}\r\n")
    assert said[0].startswith("552 5.3.4"), said
    head = mail(sender="ann@hill.example", to="bob@far.example", body="x").removesuffix(".\r\n")
    text = head + ("y" * 998 + "\r\n") * (limit // 1000) + ".\r\n"
    said = at_submission(lab, "MAIL FROM:<ann@hill.example>\r\n", "RCPT TO:<bob@far.example>\r\n", "DATA\r\n", text)
    assert said[3].startswith("552 5.3.4"), said


def test_a_large_mail_that_is_allowed_passes_all_filters(lab: Lab) -> None:
    text = mail(sender="ann@hill.example", to="bob@far.example", body=("z" * 70 + "\r\n") * 100_000)
    assert abroad(lab, send(lab, "bob@far.example", text=text), "dkim=pass")


def test_a_mail_with_overlong_lines_leaves_with_a_signature_that_holds(lab: Lab) -> None:
    text = mail(sender="ann@hill.example", to="bob@far.example", body=f"{'y' * 60_000}\n{'z' * 3000}")
    references = " ".join(f"<{n}.{secrets.token_hex(8)}@far.example>" for n in range(50))
    text = text.replace("Subject:", f"References: {references}\r\nUser-Agent: Kitchen/1\r\nSubject:")
    arrived = abroad(lab, send(lab, "bob@far.example", text=text))
    assert "dkim=pass" in arrived and "dkim=fail" not in arrived, arrived
    assert (arrived.count("y" * 900) >= 60, "z" * 900 in arrived, "Kitchen" in arrived) == (True, True, False)
    for word in INSIDE:
        assert word not in arrived, arrived


def test_an_attached_mail_arrives_as_it_is(lab: Lab) -> None:
    fields = "Received: from a by b; now\nX-Mailer: m\nUser-Agent: u\nX-Sender: s\nFrom: <x@y.example>\n"
    parts = f"--b\nContent-Type: message/rfc822\nX-Mailer: part\n\n{fields}\nSpam.\n\n--b--"
    text = mail(sender="ann@hill.example", to="bob@far.example", body=parts)
    head = "MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\nX-Mailer: mine\r\nSubject:"
    arrived = abroad(lab, send(lab, "bob@far.example", text=text.replace("Subject:", head)))
    assert parts in arrived and "mine" not in arrived and "dkim=pass" in arrived, arrived


def test_a_mail_to_many_is_signed_or_refused_at_once(lab: Lab) -> None:
    def to(many: int) -> str:
        everybody = ",\r\n ".join(f"p{n}.{secrets.token_hex(8)}@much.example" for n in range(many))
        text = mail(sender="ann@hill.example", to="bob@far.example")
        return text.replace("To: <bob@far.example>", f"To: <bob@far.example>,\r\n {everybody}\r\nCc: {everybody}")

    arrived = abroad(lab, send(lab, "bob@far.example", text=to(1000)))
    assert arrived.count("@much.example") == 2000 and "dkim=pass" in arrived
    sent = {"from": "ann@hill.example", "recipients": ["bob@far.example"], "data": to(3000)}
    assert submission(lab, user="ann", **sent)["end"][0] == 550


# What comes back, and what waits


def test_a_host_that_asks_to_come_again_is_come_to_again(lab: Lab) -> None:
    to = f"bob+later{secrets.token_hex(4)}@far.example"
    message_id = send(lab, to)
    assert "451 4.7.1" in eventually(lambda: log(lab, SENDS_FIRST, rf"to=<{re.escape(to)}>.*status=deferred"))
    tried_again(lab, [SENDS_FIRST], lambda: log(lab, SENDS_FIRST, f"to=<{re.escape(to)}>.*status=sent"))
    assert abroad(lab, message_id)


def test_the_bounce_of_a_user_s_mail_comes_back_signed_from_nobody(lab: Lab) -> None:
    text = mail(sender="ann@hill.example", to="nobody-here@far.example")
    send(lab, "nobody-here@far.example", text=text)
    line = eventually(lambda: log(lab, SENDS_FIRST, "to=<nobody-here@far.example>.*status=bounced"))
    queue_id = re.findall(r"^(\w+): to=<nobody", line, re.MULTILINE)[0]
    notice = eventually(lambda: log(lab, SENDS_FIRST, f"{queue_id}: sender non-delivery notification"))
    bounce_id = notice.split("notification:")[1].split()[0]
    told = eventually(lambda: log(lab, SENDS_FIRST, rf"{bounce_id}: message-id="))
    arrived = in_mailbox(lab, "ann", re.findall(r"message-id=(<[^>]+>)", told)[0])
    bounce = email.message_from_string(arrived)
    assert bounce["Return-Path"] == "<MAILER-DAEMON>" or bounce["Return-Path"] == "<>", arrived
    assert "d=hill.example" in bounce["DKIM-Signature"] and "dkim=pass" in arrived
    assert "MAILER-DAEMON@smtp-out.hill.example" in bounce["From"]


@pytest.mark.parametrize("host", ["smtp-in-oak", "smtp-in-ash", "smtp-out-elm", "maildrop-oak", "maildrop-elm"])
def test_mail_of_root_reaches_the_postmaster_signed(lab: Lab, host: str) -> None:
    message_id = f"<{secrets.token_hex(8)}@cron>"
    text = f"To: root\nSubject: Cron\nMessage-ID: {message_id}\n\nA word of {host}.\n"
    lab.run(host, "sendmail", "root", text=text)
    arrived = in_mailbox(lab, "ann", message_id)
    assert "d=hill.example" in email.message_from_string(arrived)["DKIM-Signature"], arrived
    # An address that SPF knows, and that can be answered.
    assert re.search(r"^From: root <postmaster@hill\.example>", arrived, re.MULTILINE), arrived
    assert "Return-Path: <postmaster@hill.example>" in arrived


def test_a_new_dkim_key_stands_in_dns_before_it_signs_and_both_are_good(unchanged: Lab) -> None:
    def now(**selectors: Any) -> None:
        unchanged.change(lambda config: config["dkim"].update(selectors))
        assert unchanged.ops("keys", unchanged.stack_name).returncode == 0
        unchanged.up()

    now(published=["lab2027"])
    asked = unchanged.run("foreign", "kdig", "+short", "lab2027._domainkey.hill.example", "TXT").stdout
    assert "v=DKIM1" in asked
    assert "header.s=lab2026" in abroad(unchanged, send(unchanged, "bob@far.example"), "dkim=pass")
    now(selector="lab2027", published=["lab2026"])
    assert "header.s=lab2027" in abroad(unchanged, send(unchanged, "bob@far.example"), "dkim=pass")
