"""Keys are replaced while mail flows, and nobody who goes by the old one is turned away."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import foreign
from lab.network import DNS, LAN4
from services import identity
from tests.lab.conftest import Lab
from tests.lab.steps import MX, PLACES, eventually, talk
from tests.lab.test_certificates import key_of, world

TLSA = "_25._tcp.smtp-in.hill.example"
SECONDS_BETWEEN = 8
"""No client may have more than ten sessions in a minute."""
TO_OAK_ALONE = """
nft -f - <<END
table inet oak { chain out { type filter hook output priority 0;
    ip daddr { 198.51.100.18, 198.51.100.34 } tcp dport 25 reject with tcp reset
    meta nfproto ipv6 tcp dport 25 reject with tcp reset
}; }
END
postconf -e smtp_tls_security_level=dane-only smtp_dns_support_level=dnssec
postfix reload
"""
AS_BEFORE = """
nft delete table inet oak
postconf -e smtp_tls_security_level=may
postconf -X smtp_dns_support_level
postfix reload
"""


def roll(lab: Lab, word: str) -> str:
    done = lab.ops("keys", lab.stack_name, "--roll", word)
    assert done.returncode == 0, done.stdout
    return str(done.stdout)


def published(lab: Lab) -> set[str]:
    asked = lab.run("foreign", "kdig", f"@{LAN4}.{DNS}", "+short", TLSA, "TLSA").stdout
    return {line.replace(" ", "").lower() for line in asked.splitlines()}


def nothing_is_wrong(lab: Lab) -> str:
    """What ``make check`` says. What was just pushed may still be settling: it is asked up to three times."""
    for _ in range(3):
        done = lab.ops("check", lab.stack_name)
        if done.returncode != 1:
            break
    assert done.returncode != 1, done.stdout
    return str(done.stdout)


@contextmanager
def mail_by_dane(lab: Lab) -> Iterator[str]:
    """Mails from the foreign host, which takes no MX but oak's, and that by DANE alone. Gives their subject."""
    subject, ended, sent = f"Roll {secrets.token_hex(6)}", threading.Event(), list[str]()

    def send() -> None:
        while not ended.is_set():
            address = {"sender": "bob@far.example", "to": "ann@hill.example"}
            sent.append(foreign.send(lab.state, subject=subject, **address))
            ended.wait(SECONDS_BETWEEN)

    began = time.time()
    assert lab.run("foreign", "sh", "-ec", TO_OAK_ALONE).returncode == 0
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield subject
    finally:
        ended.set()
        thread.join()
        time.sleep(3)
        logged = lab.run("foreign", "journalctl", "--since", f"@{began:.0f}", "-o", "cat", "-t", "postfix/smtp").stdout
        lab.run("foreign", "sh", "-c", AS_BEFORE)
    assert f"Verified TLS connection established to smtp-in.hill.example[{MX['oak']}]" in logged, logged
    assert not re.search(r"certificate not|TLSA lookup|dane.*fail|Untrusted|Trusted", logged), logged

    def arrived() -> bool:
        found = lab.run("maildrop-oak", "doveadm", "search", "-u", "ann", "mailbox", "*", "subject", subject).stdout
        return len(found.splitlines()) == len(sent)

    assert eventually(arrived, 60), (len(sent), logged)


@pytest.mark.on_release(12)
def test_a_sender_that_demands_dane_delivers_at_each_step_of_a_new_tls_key(lab: Lab) -> None:
    host, word = "smtp-in-oak", "tls/smtp-in-oak"
    before, old = published(lab), key_of(lab, host, identity.CERTIFICATE)
    with mail_by_dane(lab):
        roll(lab, word)
        assert "does not have its next key yet" in lab.ops("keys", lab.stack_name, "--roll", word).stdout
        lab.up()
        both = published(lab)
        assert before < both and len(both) == len(before) + 1
        assert key_of(lab, host, identity.CERTIFICATE) == old
        assert "others may remember" in lab.ops("keys", lab.stack_name, "--roll", word).stdout
        assert "its TLS key is being replaced" in nothing_is_wrong(lab)
        eventually(lambda: lab.ops("keys", lab.stack_name, "--roll", word).returncode == 0, 150)
        lab.up()
        # Strangers are never shown a certificate that they do not believe: it was issued before.
        shown = world(lab, "smtp-in.hill.example", 25, "smtp", MX["oak"])
        assert "Pebble" in shown.get("issuer", ""), shown
        assert key_of(lab, host, identity.PUBLIC) == key_of(lab, host, identity.CERTIFICATE) != old
        assert published(lab) == both
        nothing_is_wrong(lab)
        roll(lab, word)
        lab.up()
        after = published(lab)
        assert after < both and len(after) == len(before) and after != before
    assert "is being replaced" not in nothing_is_wrong(lab)


def knows(lab: Lab, site: str, address: str) -> bool:
    """Whether an MX takes a bounce to a sender that was rewritten."""
    asked = {"server": MX[site], "source": next(PLACES), "from": "", "recipients": [address]}
    return talk(lab, **asked)["rcpt"][0] == 250


def rewritten(lab: Lab, host: str) -> str:
    script = (
        "import socket; s = socket.create_connection(('127.0.0.1', 10001));"
        " s.sendall(b'get bob@far.example\\n'); print(s.recv(999).decode().split()[1])"
    )
    return str(lab.run(host, "python3", "-c", script).stdout).strip()


@pytest.mark.on_release(12)
def test_bounces_come_back_at_each_step_of_a_new_srs_secret(lab: Lab) -> None:
    old = rewritten(lab, "smtp-in-oak")
    for step in range(3):
        roll(lab, "srs")
        lab.up()
        signed = {rewritten(lab, f"smtp-in-{site}") for site in MX}
        assert len(signed) == 1 and (old in signed) == (step == 0)
        for site in MX:
            assert all(knows(lab, site, address) for address in signed)
            assert knows(lab, site, old) == (step < 2)


@pytest.mark.on_release(13)
def test_hosts_verify_one_another_at_each_step_of_a_new_authority(lab: Lab) -> None:
    words = "authority,session,replication"
    for word in (words, "authority", "authority"):
        roll(lab, word)
        lab.up()
        public = lab.stack().keys.public
        half = bool(public.next_authority or public.previous_authority)
        assert ("the stack's authority is being replaced" in nothing_is_wrong(lab)) == half
    public = lab.stack().keys.public
    assert public.next_authority == public.previous_authority == ""
    there = lab.run("maildrop-elm", "cat", identity.AUTHORITY).stdout
    assert there == public.authority
    lab.state.authority_file.write_text(public.authority + lab.state.world_file.read_text())


@pytest.mark.parametrize("word", ["ssh/smtp-in-oak", "dkim"])
def test_what_cannot_be_replaced_here_is_told_so(lab: Lab, word: str) -> None:
    before = lab.stack_file.read_text()
    done = lab.ops("keys", lab.stack_name, "--roll", word)
    assert done.returncode == 1 and "nothing was changed" in done.stdout
    assert lab.stack_file.read_text() == before
