"""What senders, users and strangers meet at the service."""

from __future__ import annotations

import re
import secrets
from functools import partial
from typing import Any

import pytest

from lab import containers, faults, foreign
from services.rspamd import REDIS
from tests.lab.conftest import Lab
from tests.lab.steps import MX, PLACES, eventually, id_of, in_mailbox, mail, on, stopped, submission, talk

# Inbound


@pytest.mark.parametrize("site", MX)
@pytest.mark.parametrize(
    "address", ["nobody-here@hill.example", "nobody-here@moor.example", "ann@smtp-in.hill.example"]
)
def test_an_unknown_recipient_is_refused_at_rcpt(lab: Lab, site: str, address: str) -> None:
    code, text = talk(lab, server=MX[site], **{"from": "bob@far.example"}, recipients=[address])["rcpt"]
    assert code == 550, text


@pytest.mark.parametrize("port,tls", [(25, "starttls"), (465, "implicit")])
def test_smtp_in_relays_for_no_one_and_offers_no_login(lab: Lab, port: int, tls: str) -> None:
    said = talk(lab, port=port, tls=tls, **{"from": "bob@far.example"}, recipients=["carl@far.example"])
    assert said["rcpt"][0] == 554, said
    assert "AUTH" not in said["ehlo"][1]


def test_the_banner_tells_the_service_and_the_host(lab: Lab) -> None:
    assert talk(lab)["connect"][1] == "smtp-in.hill.example ESMTP Postfix (smtp-in.oak.net.hill.example)"


def test_a_listed_client_is_refused(lab: Lab) -> None:
    said = talk(lab, source="203.0.113.66", **{"from": "x@far.example"}, recipients=["ann@hill.example"])
    assert said["rcpt"][0] == 554 and "dnsbl.example" in said["rcpt"][1]


def test_an_error_reply_of_a_blocklist_refuses_nobody(lab: Lab) -> None:
    said = talk(lab, source="203.0.113.67", **{"from": "x@far.example"}, recipients=["ann@hill.example"])
    assert said["rcpt"][0] == 250, said
    unit = lab.postfix("smtp-in-oak")
    log = lab.run("smtp-in-oak", "journalctl", "-u", unit, "-g", "reject_warning.*203.0.113.67", "-n", "1")
    assert "dnsbl.example" in log.stdout


def test_a_listed_sender_domain_is_refused(lab: Lab) -> None:
    said = talk(lab, source="203.0.113.68", **{"from": "x@spam.example"}, recipients=["ann@hill.example"])
    assert said["rcpt"][0] == 554 and "dbl.dnsbl.example" in said["rcpt"][1]


def test_a_mail_to_nobody_is_taken_and_thrown_away(lab: Lab) -> None:
    text = mail(to="noreply@hill.example")
    said = talk(lab, source="203.0.113.68", **{"from": "x@far.example"}, recipients=["noreply@hill.example"], data=text)
    assert said["rcpt"][0] == 250
    if said["end"][0] == 250:
        unit = lab.postfix("smtp-in-oak")
        log = ("journalctl", "-u", unit, "-g", "relay=none.*as the stack says", "-n", "1", "-o", "cat")
        eventually(lambda: "noreply@hill.example" in lab.run("smtp-in-oak", *log).stdout)


@pytest.mark.parametrize(
    ("address", "user"),
    [
        ("info@hill.example", "ann"),
        ("info@moor.example", "ann"),
        ("ann+shop@hill.example", "ann"),
        ("whoever@dale.example", "ben"),
        ("postmaster@dale.example", "ann"),
    ],
)
def test_an_alias_finds_its_reader(lab: Lab, address: str, user: str) -> None:
    message_id = foreign.send(lab.state, sender="bob@far.example", to=address, subject="To you")
    assert in_mailbox(lab, user, message_id)


def test_a_mail_for_two_of_us_reaches_both(lab: Lab) -> None:
    message_id = foreign.send(lab.state, sender="bob@far.example", to="sales@hill.example", subject="To both")
    for user in ("ann", "ben"):
        assert in_mailbox(lab, user, message_id)


def test_a_forwarded_mail_keeps_its_sender_here_and_passes_a_strict_spf_abroad(lab: Lab) -> None:
    message_id = foreign.send(lab.state, sender="bob@far.example", to="team@hill.example", subject="To the team")
    here = in_mailbox(lab, "ben", message_id)
    assert re.search(r"^Return-Path: <bob@far.example>", here, re.MULTILINE)

    def forwarded() -> str | None:
        return next((m for m in foreign.mails(lab.state) if message_id in m and "SRS0=" in m), None)

    abroad = eventually(forwarded)
    sender = re.search(r"^Return-Path: <(SRS0=[^>]+@hill.example)>", abroad, re.MULTILINE)
    assert sender, abroad
    assert "spf=pass" in abroad and "dkim=pass" in abroad
    # The bounce comes back by another site; a forged address does not.
    bounce = talk(lab, server=MX["ash"], **{"from": ""}, recipients=[sender.group(1)])
    assert bounce["rcpt"][0] == 250, bounce
    forged = re.sub(r"^SRS0=....", "SRS0=AAAA", sender.group(1))
    assert talk(lab, server=MX["elm"], **{"from": ""}, recipients=[forged])["rcpt"][0] == 550


def test_with_postsrsd_down_mail_is_deferred(lab: Lab) -> None:
    with stopped(lab, "postsrsd", "smtp-in-oak"):
        said = talk(lab, **{"from": "bob@far.example"}, recipients=["partner@hill.example"])
        assert said["rcpt"][0] == 451, said


def test_with_the_scanners_proxy_down_mail_is_deferred(lab: Lab) -> None:
    with stopped(lab, "rspamd", "smtp-in-oak"):
        said = talk(lab, **{"from": "bob@far.example"}, recipients=["ann@hill.example"])
        assert {code for code, _ in said.values()} & {421, 451, 454}, said


def test_without_any_scanner_mail_is_deferred_and_with_one_it_goes_on(lab: Lab) -> None:
    scanners = ("frontend-oak", "frontend-elm", "frontend-ash")
    with stopped(lab, "rspamd", *scanners):
        said = talk(
            lab, source="203.0.113.68", **{"from": "x@far.example"}, recipients=["ann@hill.example"], data=mail()
        )
        assert said["end"][0] == 451, said
    with stopped(lab, "rspamd", *scanners[:2]):
        message_id = foreign.send(lab.state, sender="bob@far.example", to="ann@hill.example", subject="Still here")
        assert in_mailbox(lab, "ann", message_id)


def test_spam_is_refused(lab: Lab) -> None:
    gtube = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
    said = talk(lab, **{"from": "x@far.example"}, recipients=["ann@hill.example"], data=mail(body=gtube))
    assert said["end"][0] == 554, said


def test_no_second_mail_is_smuggled_in(lab: Lab) -> None:
    smuggler = f"ann+{secrets.token_hex(8)}@hill.example"
    inner = f"MAIL FROM:<{smuggler}>\r\nRCPT TO:<ben@hill.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nx\r\n.\r\n"
    text = mail().removesuffix("\r\n.\r\n") + "\n.\n" + inner
    talk(lab, **{"from": "bob@far.example"}, recipients=["ann@hill.example"], data=text)
    log = lab.run("smtp-in-oak", "journalctl", "-u", lab.postfix("smtp-in-oak"), "-o", "cat", "--since", "-30s").stdout
    assert smuggler not in log


def test_a_scanner_that_swallows_packets_is_passed_over(lab: Lab) -> None:
    faults.fail(lab.state, "site", "oak", black_hole=True)
    try:
        sent = {"from": "bob@far.example", "recipients": ["ann@hill.example"], "data": mail()}
        said = talk(lab, server=MX["elm"], source="203.0.113.68", **sent)
        # Taken, or asked to come again by a scanner: one has looked at it.
        assert said["end"][0] == 250 or said["end"][1] == "4.7.1 Try again later", said
    finally:
        faults.heal(lab.state, "site", "oak")


# Outbound


def test_submission_asks_for_tls_first(lab: Lab) -> None:
    said = submission(lab, tls="none", **{"from": "ann@hill.example"})
    assert "AUTH" not in said["ehlo"][1] and said["mail"][0] == 530


def test_a_wrong_password_is_refused(lab: Lab) -> None:
    assert submission(lab, user="ann", password="wrong")["auth"][0] == 535


def test_whoever_did_not_log_in_sends_nothing(lab: Lab) -> None:
    said = submission(lab, **{"from": "ann@hill.example"}, recipients=["bob@far.example"])
    assert said["rcpt"][0] >= 500, said
    # At RCPT, Postfix takes this recipient from everybody.
    for author in ("bob@far.example", "ann@hill.example"):
        text = mail(sender=author, to="postmaster")
        said = submission(lab, **{"from": author}, recipients=["Postmaster"], data=text)
        assert said["rcpt"][0] == 250 and said["end"][0] == 554 and "Access denied" in said["end"][1], said


def test_a_user_reaches_the_postmaster_without_a_domain(lab: Lab) -> None:
    text = mail(sender="ben@hill.example", to="Postmaster")
    said = submission(lab, user="ben", **{"from": "ben@hill.example"}, recipients=["Postmaster"], data=text)
    assert said["end"][0] == 250 and in_mailbox(lab, "ann", id_of(text)), said


@pytest.mark.parametrize("sender", ["ben@hill.example", "president@far.example"])
def test_nobody_sends_as_another(lab: Lab, sender: str) -> None:
    said = submission(lab, user="ann", **{"from": sender}, recipients=["bob@far.example"])
    assert said["auth"][0] == 235 and said["rcpt"][0] == 553, said


@pytest.mark.parametrize(("author", "code"), [("ben@hill.example", 554), ("ann+list@moor.example", 250)])
def test_the_from_header_is_the_user_s_own(lab: Lab, author: str, code: int) -> None:
    text = mail(sender=author, to="bob@far.example")
    sent = {"from": "ann@hill.example", "recipients": ["bob@far.example"], "data": text}
    said = submission(lab, user="ann", **sent)
    assert said["end"][0] == code, said


@pytest.mark.parametrize("name", ["Sender", "Resent-From", "Resent-Sender"])
def test_nobody_names_another_as_who_sent_a_mail(lab: Lab, name: str) -> None:
    def said(*addresses: str) -> tuple[int, str]:
        text = "".join(f"{name}: <{a}>\r\n" for a in addresses) + mail(sender="ann@hill.example", to="bob@far.example")
        sent = {"from": "ann@hill.example", "recipients": ["bob@far.example"], "data": text}
        return submission(lab, user="ann", **sent)["end"]

    assert said("info@moor.example", "ben@hill.example") == (
        554,
        f"5.7.1 ann may not write as ben@hill.example ({name})",
    )
    assert said("info@moor.example")[0] == 250


def test_what_leaves_tells_nothing_of_the_user_s_place(lab: Lab) -> None:
    told = "User-Agent: Kitchen/1\r\nX-Originating-IP: 10.1.2.3\r\nReceived: from fridge by stove; now\r\n"
    text = told + mail(sender="ann@hill.example", to="bob@far.example")
    said = submission(lab, user="ann", **{"from": "ann@hill.example"}, recipients=["bob@far.example"], data=text)
    assert said["end"][0] == 250, said
    arrived = foreign.wait_for(lab.state, id_of(text), 60)
    assert arrived
    for word in ("203.0.113.80", "Kitchen", "10.1.2.3", "fridge", "net.hill.example", "client.far.example"):
        assert word not in arrived, arrived


TLS_FIRST = {"port": 465, "tls": "implicit"}


def test_submission_with_tls_first_is_held_to_the_same_rules(lab: Lab) -> None:
    said = submission(lab, **TLS_FIRST, **{"from": "ann@hill.example"}, recipients=["bob@far.example"])
    assert "AUTH PLAIN" in said["ehlo"][1] and "STARTTLS" not in said["ehlo"][1] and said["rcpt"][0] >= 500, said
    assert submission(lab, **TLS_FIRST, user="ann", password="wrong")["auth"][0] == 535
    said = submission(lab, **TLS_FIRST, user="ann", **{"from": "ben@hill.example"}, recipients=["bob@far.example"])
    assert said["auth"][0] == 235 and said["rcpt"][0] == 553, said


def test_what_is_submitted_with_tls_first_leaves_signed_and_tells_nothing_of_the_place(lab: Lab) -> None:
    text, place = mail(sender="ann@hill.example", to="bob@far.example"), next(PLACES)
    sent = {"from": "ann@hill.example", "recipients": ["bob@far.example"], "data": text}
    said = submission(lab, **TLS_FIRST, user="ann", source=place, **sent)
    assert said["end"][0] == 250, said
    arrived = foreign.wait_for(lab.state, id_of(text), 60)
    assert arrived and "dkim=pass" in arrived and place not in arrived, arrived


@pytest.mark.parametrize("door", [{}, TLS_FIRST])
def test_limits_are_about_the_real_client(lab: Lab, door: dict[str, Any]) -> None:
    place = next(PLACES)
    submission(lab, source=place, **door)
    hosts = [f"smtp-out-{site}" for site in MX]
    logs = "".join(lab.run(h, "journalctl", "-u", lab.postfix(h), "-o", "cat", "--since", "-20s").stdout for h in hosts)
    assert re.search(rf"connect from \S+\[{re.escape(place)}\]", logs)


def test_without_its_signer_nothing_leaves_unsigned(lab: Lab) -> None:
    text = mail(sender="ann@hill.example", to="bob@far.example")
    with stopped(lab, "opendkim", "smtp-out-oak"):
        said = submission(lab, user="ann", **{"from": "ann@hill.example"}, recipients=["bob@far.example"], data=text)
        assert {code for code, _ in said.values()} & {421, 451, 454}, said


# Logins


@pytest.mark.parametrize("login", ["ann", "ANN@Hill.example", "info@hill.example", "info@moor.example"])
def test_a_name_and_each_own_address_open_the_same_mailbox(lab: Lab, login: str) -> None:
    message_id = foreign.send(lab.state, sender="bob@far.example", to="ann@hill.example", subject="By any name")
    assert in_mailbox(lab, login, message_id, password=lab.state.passwords["ann"])


@pytest.mark.parametrize(
    ("login", "user"), [("sales@hill.example", "ann"), ("ann@far.example", "ann"), ("whoever@dale.example", "ben")]
)
def test_an_address_that_is_not_one_s_own_lets_nobody_in(lab: Lab, login: str, user: str) -> None:
    password = lab.state.passwords[user]
    seen = lab.client("look", server="imap.hill.example", user=login, password=password)
    assert "AUTHENTICATIONFAILED" in seen.get("error", ""), seen
    assert submission(lab, user=login, password=password)["auth"][0] == 535


def test_whoever_submits_by_an_address_writes_as_the_account_and_as_nobody_else(lab: Lab) -> None:
    password = lab.state.passwords["ann"]
    for sender, code in (("ann@hill.example", 250), ("ben@hill.example", 553)):
        sent = {"from": sender, "recipients": ["bob@far.example"]}
        said = submission(lab, user="Info@hill.example", password=password, **sent)
        assert said["auth"][0] == 235 and said["rcpt"][0] == code, said


def test_filters_are_put_by_an_address(lab: Lab) -> None:
    said = lab.client(
        "sieve",
        server="imap.hill.example",
        user="info@hill.example",
        password=lab.state.passwords["ann"],
        name="by-address",
        script="keep;\n",
    )["said"]
    assert said[-1].startswith("OK"), said
    try:
        for host in ("maildrop-oak", "maildrop-elm"):
            listed = partial(lab.run, host, "doveadm", "sieve", "list", "-u", "ann")
            eventually(lambda listed=listed: "by-address" in listed().stdout, 10)  # type: ignore[misc]
    finally:
        lab.run("maildrop-oak", "doveadm", "sieve", "deactivate", "-u", "ann")
        lab.run("maildrop-oak", "doveadm", "sieve", "delete", "-u", "ann", "by-address")


# Mailboxes


def test_a_mail_is_soon_at_both_mailbox_hosts(lab: Lab) -> None:
    message_id = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Twice kept")
    hosts = ("maildrop-oak", "maildrop-elm")
    eventually(lambda: any(on(lab, host, "ben", message_id) for host in hosts))
    for host in hosts:
        eventually(partial(on, lab, host, "ben", message_id), 5)


def test_the_loss_of_the_primary_mailbox_host_loses_nothing(lab: Lab) -> None:
    before = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="Before")
    eventually(lambda: on(lab, "maildrop-elm", "ben", before))
    containers.kill("maildrop-oak")
    try:
        during = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="During")
        for message_id in (before, during):
            assert in_mailbox(lab, "ben", message_id)
    finally:
        eventually(lambda: containers.leader(lab.state, "maildrop-oak") is None)
        faults.heal(lab.state, "host", "maildrop-oak")
        containers.wait_for_ssh(lab.state, {"maildrop-oak": "198.18.1.13"})
    eventually(lambda: on(lab, "maildrop-oak", "ben", during), 15)


def test_a_filter_that_a_user_puts_works_at_both_hosts(lab: Lab) -> None:
    script = 'require ["fileinto", "mailbox"];\nif header :contains "subject" "garden" { fileinto :create "Garden"; }\n'
    said = lab.client("sieve", server="imap.hill.example", user="ben", name="garden", script=script)["said"]
    assert said[-1].startswith("OK"), said
    for host in ("maildrop-oak", "maildrop-elm"):
        listed = partial(lab.run, host, "doveadm", "sieve", "list", "-u", "ben")
        eventually(lambda listed=listed: "garden ACTIVE" in listed().stdout, 5)  # type: ignore[misc]
    message_id = foreign.send(lab.state, sender="bob@far.example", to="ben@hill.example", subject="The garden")
    assert in_mailbox(lab, "ben", message_id, folder="Garden")


def test_managesieve_is_closed_to_strangers(lab: Lab) -> None:
    script = "import socket; print(socket.create_connection(('198.51.100.3', 4190), 5).recv(99))"
    done = lab.run("foreign", "python3", "-c", script)
    assert "Dovecot" not in done.stdout


KNOCK = """
import socket, sys
for _ in range(int(sys.argv[1])):
    with socket.create_connection(("smtp-out.hill.example", 587), 10, ("203.0.113.68", 0)) as one:
        print(one.recv(99).decode()[:3])
"""


def test_a_client_that_connects_too_often_is_told_to_wait(lab: Lab) -> None:
    rate = lab.stack().limits.connection_rate
    codes = lab.run("client", lab.state.python, "-c", KNOCK, str(rate + 3)).stdout.split()
    assert codes[:3] == ["220"] * 3 and codes[-1] == "421", codes


# Learning


def lessons(lab: Lab, scanner: str, kind: str) -> int:
    """How many mails a scanner has learnt, as its store has it: ``rspamc stat`` is half a minute behind."""
    return int(lab.run(scanner, "redis-cli", "-s", REDIS, "HGET", "RS", f"learns_{kind}").stdout.strip() or 0)


def test_a_mail_moved_into_junk_teaches_every_scanner_once_even_one_that_was_away(lab: Lab) -> None:
    scanners = ("frontend-oak", "frontend-elm", "frontend-ash")
    words = " ".join(secrets.token_hex(4) for _ in range(60))
    message_id = foreign.send(lab.state, sender="bob@far.example", to="ann@hill.example", subject="Offer", text=words)
    before = {name: lessons(lab, name, "spam") for name in scanners}
    with stopped(lab, "stunnel@learning", "frontend-elm"):
        moved = lab.client("move", server="imap.hill.example", user="ann", message_id=message_id, to="Junk")
        assert moved.get("moved") and moved["seconds"] < 5, moved
        for name in ("frontend-oak", "frontend-ash"):
            eventually(lambda name=name: lessons(lab, name, "spam") == before[name] + 1)  # type: ignore[misc]
    for host in ("maildrop-oak", "maildrop-elm"):
        lab.run(host, "systemctl", "start", "posthorn-learn.service")
    eventually(lambda: lessons(lab, "frontend-elm", "spam") == before["frontend-elm"] + 1)
    eventually(lambda: on(lab, "maildrop-elm", "ann", message_id))
    ham = {name: lessons(lab, name, "ham") for name in scanners}
    lab.client("move", server="imap.hill.example", user="ann", message_id=message_id, folder="Junk", to="INBOX")
    for name in scanners:
        eventually(lambda name=name: lessons(lab, name, "ham") == ham[name] + 1)  # type: ignore[misc]
    # The scanner takes back what it learnt of the same mail before; nobody was taught twice.
    assert all(lessons(lab, name, "spam") <= before[name] + 1 for name in scanners)
