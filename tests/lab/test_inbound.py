"""What comes in by the MX hosts, at every site: who is refused, where an address leads, what is forwarded and how."""

from __future__ import annotations

import email
import json
import re
import secrets
from functools import partial
from typing import Any

import dkim
import pytest

from lab import containers
from tests.lab.conftest import Lab
from tests.lab.steps import (
    INSIDE,
    MX,
    PLACES,
    abroad,
    eventually,
    greeting,
    id_of,
    in_mailbox,
    log,
    mail,
    on,
    session,
    stopped,
    submission,
    talk,
)

HAND_OVER = """
import json, smtplib, sys
task = json.load(sys.stdin)
with smtplib.SMTP(task["server"], 25, "mx.far.example", timeout=30) as smtp:
    smtp.starttls()
    for to, text in task["mails"]:
        smtp.sendmail(task["sender"], [to], text)
"""


def signature(lab: Lab, text: str) -> str:
    """The DKIM signature of the foreign host to a mail."""
    key = (containers.upper(lab.state, "foreign") / "etc/opendkim/far.key").read_bytes()
    return str(dkim.sign(text.encode(), b"far", b"far.example", key).decode())


def hand_over(lab: Lab, server: str, *recipients: str, sender: str = "bob@far.example") -> list[str]:
    """The foreign host signs mails and gives them to one MX, in one session. Returns their Message-IDs."""
    texts = [mail(to=to).removesuffix(".\r\n") for to in recipients]
    texts = [signature(lab, text) + text for text in texts]
    task = {"server": server, "sender": sender, "mails": list(zip(recipients, texts, strict=True))}
    done = lab.run("foreign", "python3", "-c", HAND_OVER, text=json.dumps(task))
    assert done.returncode == 0, done.stderr
    return [id_of(text) for text in texts]


def txt_record(lab: Lab, name: bytes, timeout: float = 5) -> bytes:
    """A TXT record as the lab's resolver has it, for dkimpy."""
    asked = ("kdig", "+short", f"+timeout={timeout}", "@203.0.113.54", name.decode(), "TXT")
    said = lab.run("internet", *asked).stdout
    return "".join(re.findall(r'"([^"]*)"', said)).encode()


# Who is refused

LISTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "client": ({"source": "203.0.113.66"}, {"source": "203.0.113.67"}),
    "sender": ({"from": "x@spam.example"}, {"from": "x@error.example"}),
    "helo": ({"helo": "spam.example"}, {"helo": "error.example"}),
    "reverse client": ({"source": "203.0.113.69"}, {"source": "203.0.113.70"}),
}
UNLISTED = {"source": "203.0.113.68", "from": "x@far.example", "recipients": ["ann@hill.example"]}


@pytest.mark.parametrize("site", MX)
def test_no_list_knows_an_honest_sender(lab: Lab, site: str) -> None:
    assert talk(lab, server=MX[site], **UNLISTED)["rcpt"][0] == 250


@pytest.mark.parametrize("site", MX)
@pytest.mark.parametrize("what", LISTED)
def test_who_is_listed_is_refused_with_the_name_of_the_list(lab: Lab, site: str, what: str) -> None:
    code, text = talk(lab, server=MX[site], **UNLISTED | LISTED[what][0])["rcpt"]
    assert code == 554 and "blocked using" in text and "dnsbl.example" in text, text


@pytest.mark.parametrize("site", MX)
@pytest.mark.parametrize("what", LISTED)
def test_an_error_of_any_list_refuses_nobody_and_is_noted(lab: Lab, site: str, what: str) -> None:
    said = talk(lab, server=MX[site], **UNLISTED | LISTED[what][1])
    assert said["rcpt"][0] == 250, said
    word = {"client": r"203\.0\.113\.67", "reverse client": r"203\.0\.113\.70"}.get(what, "error.example")
    eventually(lambda: log(lab, f"smtp-in-{site}", f"reject_warning: RCPT.*{word}"))


@pytest.mark.parametrize("port,tls", [(25, "none"), (25, "starttls"), (465, "implicit")])
def test_all_ports_refuse_the_same(lab: Lab, port: int, tls: str) -> None:
    site = {"port": port, "tls": tls, "server": MX["elm"]}
    assert talk(lab, **site, **UNLISTED | {"source": "203.0.113.66"})["rcpt"][0] == 554
    assert talk(lab, **site, **UNLISTED | {"recipients": ["nobody-here@hill.example"]})["rcpt"][0] == 550
    assert talk(lab, **site, **UNLISTED | {"recipients": ["carl@far.example"]})["rcpt"][0] == 554
    assert talk(lab, **site, **UNLISTED | {"from": ""})["rcpt"][0] == 250


@pytest.mark.parametrize("site", MX)
@pytest.mark.parametrize(
    "to",
    [
        "carl%far.example@hill.example",
        "carl%far.example@smtp-in.hill.example",
        "far.example!carl@hill.example",
        "far.example!carl",
        "@hill.example:carl@far.example",
        '"carl@far.example"@hill.example',
        '"carl@far.example"',
        "carl@far.example@hill.example",
        "carl@[203.0.113.25]",
        "ann@maildrop.net.hill.example.far.example",
        "SRS0=AAAA=ZZ=far.example=carl@hill.example",
    ],
)
def test_no_way_of_writing_an_address_leads_through(lab: Lab, site: str, to: str) -> None:
    code, text = talk(lab, server=MX[site], **UNLISTED | {"recipients": [to]})["rcpt"]
    assert code in (501, 504, 550, 553, 554), text


def test_a_sender_without_a_domain_is_nobody(lab: Lab) -> None:
    code, text = talk(lab, **UNLISTED | {"from": "root"})["rcpt"]
    assert code == 504 and "need fully-qualified address" in text, text


@pytest.mark.parametrize("name", ["a..name", "-"])
def test_a_greeting_that_is_no_name_is_refused(lab: Lab, name: str) -> None:
    assert talk(lab, **UNLISTED | {"helo": name})["rcpt"][0] == 501


def test_nobody_is_told_who_lives_here(lab: Lab) -> None:
    said = session(lab, "EHLO mx.far.example\r\n", "VRFY ann\r\n", "EXPN info\r\n", "ETRN hill.example\r\n", "QUIT\r\n")
    assert all(word not in said[1] for word in ("VRFY", "ETRN", "DSN", "AUTH"))
    assert [reply[:3] for reply in said[2:5]] == ["502", "500", "459"], said


def test_whoever_does_not_wait_for_answers_is_refused(lab: Lab) -> None:
    early = "EHLO mx.far.example\r\nMAIL FROM:<x@far.example>\r\nRCPT TO:<ann@hill.example>\r\nDATA\r\n"
    said = session(lab, early, early=True)
    assert not [reply for reply in said if reply.startswith("354")], said


ENDS = {"LF.LF": "\n.\n", "CRLF.LF": "\r\n.\n", "LF.CRLF": "\n.\r\n", "CR.CR": "\r.\r", "CRLF.CR": "\r\n.\r"}
DOORS: dict[str, dict[str, Any]] = {
    "25": {"port": 25},
    "25 with STARTTLS": {"port": 25, "starttls": True},
    "465": {"port": 465, "tls": "implicit"},
    "587": {"port": 587, "starttls": True, "user": "ann"},
    "465 of submission": {"port": 465, "tls": "implicit", "user": "ann"},
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("end", ENDS)
def test_one_mail_is_one_mail_whatever_ends_its_lines(lab: Lab, door: str, end: str) -> None:
    at = dict(DOORS[door])
    before = greeting(lab, at)
    user = at.pop("user", None)
    sender = f"{user}@hill.example" if user else "bob@far.example"
    hidden = f"{secrets.token_hex(6)}@hill.example"
    inner = f"MAIL FROM:<{hidden}>\r\nRCPT TO:<ben@hill.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nx\r\n.\r\n"
    text = mail(sender=sender, to="ben@hill.example").removesuffix("\r\n.\r\n") + ENDS[end] + inner
    at.pop("starttls", None)
    if user:
        at |= {"server": "smtp-out.hill.example", "name": "smtp-out.hill.example", "source": next(PLACES)}
    envelope = (f"MAIL FROM:<{sender}>\r\n", "RCPT TO:<ben@hill.example>\r\n", "DATA\r\n")
    said = session(lab, *before, *envelope, text, "QUIT\r\n", **at)
    position = next(i for i, reply in enumerate(said) if reply.startswith("354"))
    # One answer to the mail, one to QUIT.
    assert len(said) == position + 3 and said[-1].startswith("221"), said


# Who is let in, and kept out, by word of the stack

PARTNER = "203.0.113.71"
"""It stands on the same blocklist as 203.0.113.66."""


def bare(lab: Lab, sender: str, *, signed: bool = False) -> str:
    """A mail without date, recipient and Message-ID, half like spam; the foreign host may have signed it."""
    text = f"From: <{sender}>\r\nSubject: {secrets.token_hex(8)}\r\n\r\nWords of {secrets.token_hex(8)}.\r\n"
    return f"{signature(lab, text) if signed else ''}{text}.\r\n"


@pytest.mark.parametrize("site", MX)
def test_a_listed_client_that_is_let_in_by_word_passes_lists_and_scores(lab: Lab, site: str) -> None:
    sent = {"server": MX[site], **UNLISTED, "source": PARTNER, "data": bare(lab, "x@far.example")}
    assert talk(lab, **sent)["end"][0] == 250
    # All else holds for it too.
    assert talk(lab, **sent | {"recipients": ["carl@far.example"]})["rcpt"][0] == 554
    assert talk(lab, **sent | {"recipients": ["nobody-here@hill.example"]})["rcpt"][0] == 550
    assert talk(lab, **sent | {"data": bare(lab, "ben@hill.example")})["end"] == (
        554,
        "5.7.1 this mail is not from ben@hill.example (RFC 9989)",
    )
    gtube = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
    assert talk(lab, **sent | {"data": mail(body=gtube)})["end"][0] == 554
    assert talk(lab, **sent | {"from": "foe@far.example"})["end"][0] == 554


@pytest.mark.parametrize("site", MX)
def test_a_client_that_is_kept_out_is_told_so(lab: Lab, site: str) -> None:
    code, text = talk(lab, server=MX[site], **UNLISTED | {"source": "203.0.113.72"})["rcpt"]
    assert code == 554 and "No mail is taken from your address here" in text, text


@pytest.mark.parametrize(
    ("author", "signed", "codes"),
    [
        ("friend@far.example", True, (250,)),
        ("friend@far.example", False, (451, 554)),
        ("other@far.example", True, (451, 554)),
    ],
)
def test_an_author_that_is_let_in_by_word_has_to_be_proved(
    lab: Lab, author: str, signed: bool, codes: tuple[int, ...]
) -> None:
    # SPF does not hold for it: any host may say that envelope sender. Nobody has written to this recipient before.
    to = f"ann+{secrets.token_hex(6)}@hill.example"
    said = talk(lab, **UNLISTED | {"from": author, "recipients": [to], "data": bare(lab, author, signed=signed)})
    assert said["end"][0] in codes, said


@pytest.mark.parametrize(
    ("envelope", "author"),
    [
        ("foe@far.example", "x@far.example"),
        ("x@far.example", "foe@far.example"),
        ("x@a.pest.example", "x@far.example"),
        ("x@far.example", "x@pest.example"),
    ],
)
def test_a_sender_that_is_kept_out_is_told_so(lab: Lab, envelope: str, author: str) -> None:
    code, text = talk(lab, **UNLISTED | {"from": envelope, "data": mail(sender=author)})["end"]
    sender = envelope if envelope != "x@far.example" else author
    assert (code, text) == (554, f"5.7.1 no mail of {sender} is taken here")


# Where an address leads

PLACES_OF = {
    "ann@hill.example": ("ann",),
    "ann+shop@hill.example": ("ann",),
    "info@hill.example": ("ann",),
    "info@moor.example": ("ann",),
    "sales@hill.example": ("ann", "ben"),
    "sales@moor.example": ("ann", "ben"),
    "team@hill.example": ("ben",),
    "whoever@dale.example": ("ben",),
    "who.ever+x@dale.example": ("ben",),
    "ann@dale.example": ("ann",),
    # Without a domain (RFC 5321 section 4.5.1).
    "Postmaster": ("ann",),
    **{f"{name}@{domain}.example": ("ann",) for name in ("postmaster", "abuse") for domain in ("hill", "dale", "moor")},
}


@pytest.mark.parametrize("site", MX)
def test_every_address_leads_to_its_readers_at_every_site(lab: Lab, site: str) -> None:
    ids = dict(zip(PLACES_OF, hand_over(lab, MX[site], *PLACES_OF), strict=True))
    for address, users in PLACES_OF.items():
        for user in ("ann", "ben"):
            if user in users:
                eventually(partial(on, lab, "maildrop-oak", user, ids[address]))
            else:
                assert not on(lab, "maildrop-oak", user, ids[address]), address
    # One of them has a reader abroad too.
    assert abroad(lab, ids["team@hill.example"], "SRS0=")


def deliver(lab: Lab, *mails: dict[str, Any], server: str = MX["oak"]) -> list[list[str]]:
    """Mails as they are, from a client whose mail passes the scanners, with the replies to each."""
    replies: list[list[str]] = lab.client("deliver", server=server, port=25, source=PARTNER, mails=mails)["replies"]
    return replies


def letter(text: str, *recipients: str, parameters: str = "") -> dict[str, Any]:
    mail_from = f"MAIL FROM:<bob@far.example>{parameters}"
    return {"mail": mail_from, "rcpt": [f"RCPT TO:<{to}>" for to in recipients], "data": text.removesuffix(".\r\n")}


def test_letters_of_all_alphabets_arrive_as_they_are_and_what_no_mailbox_takes_is_not_offered(lab: Lab) -> None:
    text = mail().replace("A word", "Gr\xc3\xbc\xc3\x9fe aus K\xc3\xb6ln")
    plain, marked = deliver(
        lab, letter(text, "ann@hill.example"), letter(text, "ann@hill.example", parameters=" SMTPUTF8")
    )
    assert plain[-1].startswith("250") and marked[0].startswith("555 5.5.4"), (plain, marked)
    assert "Subject: Gr\u00fc\u00dfe aus K\u00f6ln" in in_mailbox(lab, "ann", id_of(text))
    for door in ({}, {"port": 465, "tls": "implicit"}):
        assert "8BITMIME" in talk(lab, **door)["ehlo"][1] and "SMTPUTF8" not in talk(lab, **door)["ehlo"][1]
    said = submission(lab)["ehlo"][1]
    assert "8BITMIME" in said and "SMTPUTF8" not in said


def test_no_mail_comes_back_for_what_its_sender_says_of_its_way(lab: Lab) -> None:
    texts = {}
    for to in ("postmaster@smtp-in.hill.example", "postmaster@smtp-in.oak.net.hill.example", "ann@hill.example"):
        texts[to] = f"Delivered-To: {to}\r\nDelivered-To: ann@maildrop.net.hill.example\r\n{mail(to=to)}"
    for said in deliver(lab, *(letter(text, to) for to, text in texts.items())):
        assert said[-1].startswith("250"), said
    for text in texts.values():
        assert in_mailbox(lab, "ann", id_of(text))


def test_a_sender_whom_no_mailbox_takes_is_refused_whoever_is_written_to(lab: Lab) -> None:
    sent = [
        letter(mail(), to) | {"mail": 'MAIL FROM:<"a\x01"@far.example>'} for to in ("ann@hill.example", "postmaster")
    ]
    for said in deliver(lab, *sent):
        assert said[-1].startswith("553 5.6.7"), said


def test_a_mail_to_many_arrives_whole_or_is_refused(lab: Lab) -> None:
    texts = []
    for many in (1500, 3000):
        to = ",\r\n ".join(f'"Person {n}" <p{n}@much.example>' for n in range(many))
        texts.append(mail().replace("To: <ann@hill.example>", f"To: {to}"))
    whole, cut = deliver(lab, *(letter(text, "ann@hill.example") for text in texts))
    assert whole[-1].startswith("250") and cut[-1].startswith("550 5.3.4"), (whole, cut)
    assert in_mailbox(lab, "ann", id_of(texts[0])).count("@much.example>") == 1500


def test_a_reader_who_is_named_by_several_addresses_gets_one_mail(lab: Lab) -> None:
    text = mail()
    named = ("ann@hill.example", "sales@hill.example", "ann@moor.example", "Sales@moor.example")
    (said,) = deliver(lab, letter(text, *named))
    assert said[-1].startswith("250"), said
    for user in ("ann", "ben"):
        answer = lab.client("fetch", server="imap.hill.example", user=user, message_id=id_of(text))
        assert answer["copies"] == 1, (user, answer)


CROWD = """
cd /etc/postfix
cp -p virtual virtual.before
echo "crowd@hill.example ben@maildrop.net.hill.example$(printf ', p%s@discard.invalid' $(seq 1200))" >> virtual
postconf -e virtual_alias_expansion_limit=1300
postfix reload
"""
AS_BEFORE = """
cd /etc/postfix
mv virtual.before virtual
postconf -e "virtual_alias_expansion_limit=$(postconf -h virtual_alias_recursion_limit)"
postfix reload
"""


@pytest.mark.on_release(12)
def test_an_alias_of_more_than_a_thousand_addresses_is_delivered(lab: Lab) -> None:
    # That the limit follows from the stack is in the unit tests.
    assert lab.run("smtp-in-elm", "sh", "-ec", CROWD).returncode == 0
    try:
        text = mail()
        (said,) = deliver(lab, letter(text, "crowd@hill.example"), server=MX["elm"])
        assert said[-1].startswith("250"), said
        assert in_mailbox(lab, "ben", id_of(text))
    finally:
        lab.run("smtp-in-elm", "sh", "-ec", AS_BEFORE)


def test_a_mailbox_host_whose_dovecot_is_gone_is_passed_over_at_once(lab: Lab) -> None:
    with stopped(lab, "dovecot", "maildrop-oak"):
        text = mail()
        (said,) = deliver(lab, letter(text, "ann@hill.example"))
        assert said[-1].startswith("250"), said
        eventually(lambda: on(lab, "maildrop-elm", "ann", id_of(text)), 20)


def test_what_waited_while_no_mailbox_host_was_well_comes_by_itself_within_a_minute(lab: Lab) -> None:
    with stopped(lab, "dovecot", "maildrop-oak", "maildrop-elm"):
        text = mail()
        (said,) = deliver(lab, letter(text, "ann@hill.example"))
        assert said[-1].startswith("250"), said
        eventually(lambda: log(lab, "smtp-in-oak", "to=<ann@maildrop.*status=deferred"))
    # Nobody has the queue tried.
    assert in_mailbox(lab, "ann", id_of(text), seconds=60)


# What is forwarded


@pytest.mark.parametrize("site", ["oak", "ash"])
def test_a_forwarded_mail_is_sealed_unchanged_and_tells_nothing_of_the_inside(lab: Lab, site: str) -> None:
    (message_id,) = hand_over(lab, MX[site], "team@hill.example")
    text = abroad(lab, message_id, "SRS0=")
    status, results, why = dkim.arc_verify(text.encode(), dnsfunc=partial(txt_record, lab))
    assert status == b"pass", (why, results, text)
    seal = email.message_from_string(text)
    assert "d=hill.example" in seal["ARC-Seal"] and "spf=pass" in seal["ARC-Authentication-Results"]
    assert seal["From"] == "<bob@far.example>" and seal["To"] == "<team@hill.example>" and seal["Subject"] == "A word"
    for word in INSIDE:
        assert word not in text, text


@pytest.mark.parametrize("site", ["oak", "elm"])
def test_the_bounce_of_a_forwarded_mail_is_signed_and_reaches_its_sender(lab: Lab, site: str) -> None:
    (message_id,) = hand_over(lab, MX[site], "gone@hill.example")
    text = abroad(lab, message_id, "MAILER-DAEMON", "multipart/report")
    bounce = email.message_from_string(text)
    assert bounce["Return-Path"] == "<>" and "MAILER-DAEMON@smtp-in.hill.example" in bounce["From"]
    assert "d=hill.example" in bounce["DKIM-Signature"]
    assert "dkim=pass" in text
    for word in INSIDE:
        assert word not in text, text


@pytest.mark.parametrize("local", ['"john doe"', "a%b", "x" * 60])
def test_a_sender_whose_bounces_could_not_come_back_is_left_as_it_is(lab: Lab, local: str) -> None:
    # The foreign host lets its SPF pass, which is no longer proved.
    sender = f"{local}@soft.far.example"
    (message_id,) = hand_over(lab, MX["ash"], "team@hill.example", sender=sender)
    text = abroad(lab, message_id, "To: <team@hill.example>")
    assert f"Return-Path: <{sender}>" in text and "dkim=pass" in text, text


@pytest.mark.parametrize("site", ["oak", "elm"])
def test_a_forwarded_mail_takes_the_tls_that_its_next_host_demands(lab: Lab, site: str) -> None:
    hand_over(lab, MX[site], "strict@hill.example", "misled@hill.example")
    host = f"smtp-in-{site}"
    eventually(lambda: log(lab, host, "Verified TLS connection established to mx.dane-over-sts.far.example"))
    deferred = eventually(lambda: log(lab, host, r"to=<bob@sts-broken\.far\.example>.*status=deferred"))
    assert "Server certificate not verified" in deferred, deferred
    for queue_id in set(re.findall(r"^(\w+): to=<bob@sts-broken", deferred, re.MULTILINE)):
        lab.run(host, "postsuper", "-d", queue_id)
