"""What `make check` says of a service that is well, and of one where several things are broken at once."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lab import faults, internet
from tests.lab.conftest import Lab
from tests.lab.steps import MX, eventually, knot
from tests.lab.test_inbound import hand_over

KEY, CERTIFICATE = "/etc/posthorn/tls/host.key", "/etc/posthorn/tls/public.pem"
POLICY = "v=DMARC1; p=none"


def check(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One check, as the operator runs it."""
    command = [lab.state.python, "-m", "ops", "check", lab.stack_name, *arguments]
    return lab.state.run_in("operator", command, capture_output=True, text=True, env={"COLUMNS": "200"})


def found(lab: Lab, *arguments: str) -> dict[str, Any]:
    """The findings of a check, for a machine, with its exit status under ``status``."""
    done = check(lab, "--json", *arguments)
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document | {"status": done.returncode}


def bad(document: dict[str, Any]) -> list[str]:
    """What is not good, one line each: where, what, and what to do."""
    return [
        f"{f['severity']} {f['area']}: {f['where']}: {f['what']} → {f['advice']}"
        for f in document["findings"]
        if f["severity"] not in ("good", "note")
    ]


def says(document: dict[str, Any], *parts: str) -> bool:
    return any(all(part in line for part in parts) for line in bad(document))


# Each breaks one thing, and mends it.


@contextmanager
def record_changed(lab: Lab) -> Iterator[None]:
    asked = lab.run(internet.NAME, "kdig", "+short", "@203.0.113.53", "_dmarc.dale.example", "TXT").stdout.strip()
    change, mend = (
        ("zone-unset dale.example _dmarc TXT", f"zone-set dale.example _dmarc 3600 TXT '{text}'")
        for text in (f'"{POLICY}"', asked)
    )
    knot(lab, "dale.example", *change)
    try:
        yield
    finally:
        knot(lab, "dale.example", *mend)


@contextmanager
def address_listed(lab: Lab) -> Iterator[None]:
    knot(lab, "dnsbl.example", "zone-set dnsbl.example 2.100.51.198 60 A 127.0.0.4")
    try:
        yield
    finally:
        knot(lab, "dnsbl.example", "zone-unset dnsbl.example 2.100.51.198 A")


@contextmanager
def daemon_stopped(lab: Lab) -> Iterator[None]:
    lab.run("smtp-out-ash", "systemctl", "stop", "opendkim")
    lab.run("frontend-ash", "systemctl", "stop", "stunnel@learning")
    try:
        yield
    finally:
        lab.run("smtp-out-ash", "systemctl", "start", "opendkim")
        lab.run("frontend-ash", "systemctl", "start", "stunnel@learning")


@contextmanager
def file_changed(lab: Lab) -> Iterator[None]:
    lab.run("maildrop-elm", "sh", "-c", "echo 'stranger@example.com OK' >> /etc/postfix/clients")
    try:
        yield
    finally:
        lab.run("maildrop-elm", "sed", "-i", "/stranger/d", "/etc/postfix/clients")


@contextmanager
def passwords_taken(lab: Lab) -> Iterator[None]:
    """A file that sorts before the stack's own."""
    path = "/etc/ssh/sshd_config.d/00-a.conf"
    lab.run("frontend-oak", "sh", "-c", f"echo PasswordAuthentication yes > {path}")
    try:
        yield
    finally:
        lab.run("frontend-oak", "rm", path)


@contextmanager
def certificate_expiring(lab: Lab) -> Iterator[None]:
    """The right key with a certificate that is nearly three months old, and by nobody's authority."""
    before = lab.run("smtp-in-elm", "cat", CERTIFICATE).stdout
    key = serialization.load_pem_private_key(lab.run("smtp-in-elm", "cat", KEY).stdout.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]), dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=87))
        .not_valid_after(now + dt.timedelta(days=3, hours=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("smtp-in.hill.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    after = certificate.public_bytes(serialization.Encoding.PEM).decode()
    _put(lab, after)
    try:
        yield
    finally:
        _put(lab, before)


def _put(lab: Lab, certificate: str) -> None:
    lab.run("smtp-in-elm", "sh", "-c", f"cat > {CERTIFICATE} && systemctl reload postfix", text=certificate)


@contextmanager
def mx_black_holed(lab: Lab) -> Iterator[None]:
    faults.fail(lab.state, "link", "ash-internet", black_hole=True)
    try:
        yield
    finally:
        faults.heal(lab.state, "link", "ash-internet")


@pytest.fixture(scope="module")
def broken(lab: Lab) -> Iterator[dict[str, Any]]:
    """What one check says while seven things are broken, after an alias has sent a mail on in vain."""
    hand_over(lab, MX["elm"], "gone@hill.example")
    search = ("journalctl", "-q", "-t", "postfix/bounce", "-g", ": sender non-delivery")
    eventually(lambda: lab.run("smtp-in-elm", *search).stdout)
    within = (daemon_stopped, file_changed, passwords_taken, certificate_expiring)
    breaks = (record_changed, address_listed, *within, mx_black_holed)
    with ExitStack() as stack:
        for each in breaks:
            stack.enter_context(each(lab))
        document = found(lab)
    yield document


def test_something_wrong_is_told_by_the_exit_status(broken: dict[str, Any]) -> None:
    assert broken["status"] == 1 and broken["result"] == "wrong"


def test_a_record_that_was_changed_by_hand_is_shown_beside_the_stack_s(broken: dict[str, Any]) -> None:
    said = "wrong records: dale.example: _dmarc.dale.example TXT is v=DMARC1; p=none at"
    assert says(broken, said, "and not v=DMARC1; p=reject")


def test_an_address_on_a_blocklist_is_named(broken: dict[str, Any]) -> None:
    assert says(broken, "wrong blocklists: dnsbl.example: 198.51.100.2 is listed (127.0.0.4)")


def test_a_daemon_that_does_not_run_is_named_with_its_host(broken: dict[str, Any]) -> None:
    assert says(broken, "wrong hosts: smtp-out-ash: opendkim.service does not run")
    deaf = "198.18.3.14, 2001:db8:1:3::14, 198.51.100.35, 2001:db8:2:3::3"
    assert says(broken, f"wrong hosts: frontend-ash: learning on port 11335: nobody listens at {deaf} (tcp)")


def test_a_file_that_was_changed_by_hand_is_shown_by_line(broken: dict[str, Any]) -> None:
    line = "/etc/postfix/clients is not what the stack says: +stranger@example.com OK"
    assert says(broken, f"wrong hosts: maildrop-elm: {line}")


def test_a_host_whose_ssh_takes_passwords_is_named(broken: dict[str, Any]) -> None:
    assert says(broken, "wrong hosts: frontend-oak: its SSH server takes passwords (passwordauthentication yes)")


def test_a_certificate_that_ends_soon_is_seen_at_its_port_and_on_its_host(broken: dict[str, Any]) -> None:
    assert says(broken, "wrong ports: smtp-in-elm 198.51.100.18 port 25: its certificate ends in 3 days"), bad(broken)
    assert says(broken, "smtp-in-elm 198.51.100.18 port 25: its certificate does not prove that it is smtp-in")
    assert says(broken, f"wrong hosts: smtp-in-elm: {CERTIFICATE} ends in 3 days")


def test_an_mx_that_swallows_packets_is_wrong_and_the_others_are_not(broken: dict[str, Any]) -> None:
    said = "wrong ports: smtp-in-ash: answers on none of its ports (25, 465), while others do"
    assert says(broken, said, "WITHOUT=ash")
    assert not says(broken, "smtp-in-oak", "answers")


def test_what_an_alias_sent_on_and_came_back_is_told_with_the_alias_and_the_reason(broken: dict[str, Any]) -> None:
    way, words = "gone@moor.example to nobody-here@far.example (", ': "550 5.1.1 <nobody-here@far.example>: '
    assert says(broken, "advice hosts: smtp-in-elm: of what was sent on, ", way, words), bad(broken)


def test_nothing_else_is_called_wrong(broken: dict[str, Any]) -> None:
    known = (
        "of what was sent on",
        "dale.example",
        "dnsbl.example",
        "smtp-out-ash",
        "maildrop-elm",
        "frontend-oak",
        "smtp-in-elm",
        "-ash",
    )
    assert [line for line in bad(broken) if not any(word in line for word in known)] == []
    # Also of the hosts above: whatever was pushed is what runs.
    assert not says(broken, "has not taken up its present files")


def test_what_was_changed_on_a_host_is_put_right_by_what_the_check_advises(lab: Lab, broken: dict[str, Any]) -> None:
    lab.run("smtp-in-ash", "sh", "-c", "echo '# a colleague was here' >> /etc/postfix/virtual")
    (finding,) = [
        f for f in found(lab)["findings"] if f["where"] == "smtp-in-ash" and "/etc/postfix/virtual" in f["what"]
    ]
    assert finding["advice"] == f"make up STACK={lab.stack_name} PUSH=smtp-in-ash puts it right"
    printed = lab.up("--push", "smtp-in-ash")
    assert "smtp-in-ash: changed /etc/postfix/virtual" in printed and "smtp-in-oak-files" not in printed
    assert "a colleague" not in lab.run("smtp-in-ash", "cat", "/etc/postfix/virtual").stdout


def test_a_lost_site_is_left_out_by_a_word(lab: Lab) -> None:
    faults.fail(lab.state, "site", "elm", black_hole=True)
    try:
        document = found(lab, "--without", "elm")
    finally:
        faults.heal(lab.state, "site", "elm")
    assert document["status"] == 0, bad(document)
    assert not [f for f in document["findings"] if f["where"].startswith("smtp-in-elm")]


def test_a_service_that_is_well_is_told_so_in_a_few_lines(lab: Lab, broken: dict[str, Any]) -> None:
    # Both sides of what was cut find one another again.
    deadline = time.monotonic() + 60
    while (done := check(lab)).returncode:
        print(done.stdout)
        assert time.monotonic() < deadline, done.stdout
    lines = done.stdout.rstrip().splitlines()
    assert " good (" in lines[-1] and "wrong" not in lines[-1]
    areas = {line.split()[1]: line[0] for line in lines if line[1:2] == " " != line[2:3]}
    good = ("records", "addresses", "policies", "blocklists", "ports", "between", "mailboxes")
    # What came back stays to be told for a day.
    assert areas == {**dict.fromkeys(good, "✓"), "hosts": "!"}


def test_what_is_not_reached_could_not_be_told(lab: Lab) -> None:
    # The client's place has no way to the site-local network, and no key of an operator.
    command = [lab.state.python, "-m", "ops", "check", lab.stack_name, "--json"]
    environment = {"POSTHORN_PROJECT": str(lab.state.project), "SSH_AUTH_SOCK": ""}
    done = lab.state.run_in("client", command, capture_output=True, text=True, env=environment)
    document = json.loads(done.stdout)
    assert done.returncode == 2, bad(document)
    assert says(document, "unknown hosts: smtp-in-oak: ", "at 198.18.1.11 port 22", "run this from a network that may")
    assert any(f["area"] == "ports" and f["what"] == "relays for no one" for f in document["findings"])
