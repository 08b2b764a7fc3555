"""Certificates that the world believes: asked for by every host, shown on every port, renewed without a word."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab import internet
from lab.network import DNS, LAN4
from lab.state import State
from model.stack import WEB_LABELS
from ops.name_server import asking_hosts
from services import certificate, identity
from tests.lab.conftest import Lab

SERVICE = "posthorn-certificate.service"
HANDSHAKE = """
import hashlib, json, socket, ssl, sys
asked = json.load(sys.stdin)
context = ssl.create_default_context(cafile=asked["believes"])
plain = socket.create_connection((asked["address"], asked["port"]), 20)
stream = plain.makefile("rwb", buffering=0)
def until(start):
    while not (line := stream.readline()).startswith(start):
        assert line, "closed"
if asked["starttls"] == "smtp":
    until(b"220 "); stream.write(b"EHLO client.far.example\\r\\n"); until(b"250 ")
    stream.write(b"STARTTLS\\r\\n"); until(b"220 ")
elif asked["starttls"] == "sieve":
    until(b"OK"); stream.write(b"STARTTLS\\r\\n"); until(b"OK")
try:
    secure = context.wrap_socket(plain, server_hostname=asked["name"])
except ssl.SSLCertVerificationError as error:
    print(json.dumps({"refused": error.verify_message}))
else:
    names = [value for _, value in secure.getpeercert()["subjectAltName"]]
    issuer = dict(part[0] for part in secure.getpeercert()["issuer"])["commonName"]
    print(json.dumps({"names": names, "issuer": issuer, "der": secure.getpeercert(True).hex()}))
"""
PORTS = [
    ("smtp-in.hill.example", 25, "smtp"),
    ("smtp-in.hill.example", 465, ""),
    ("smtp-out.hill.example", 465, ""),
    ("smtp-out.hill.example", 587, "smtp"),
    ("imap.hill.example", 993, ""),
    ("imap.hill.example", 4190, "sieve"),
    ("nginx0.hill.example", 587, "smtp"),
    ("nginx0.hill.example", 993, ""),
    ("webmail.hill.example", 443, ""),
    ("mta-sts.dale.example", 443, ""),
    ("autoconfig.moor.example", 443, ""),
]


def shaken(lab: Lab, address: str, port: int, name: str, starttls: str, believes: str, where: str) -> dict[str, Any]:
    """What a TLS client that believes one authority sees."""
    asked = {"address": address, "port": port, "name": name, "starttls": starttls, "believes": believes}
    done = lab.run(where, "python3", "-c", HANDSHAKE, text=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def world(lab: Lab, name: str, port: int, starttls: str, address: str = "") -> dict[str, Any]:
    return shaken(lab, address or name, port, name, starttls, str(lab.state.world_file), "client")


@pytest.mark.parametrize(("name", "port", "starttls"), PORTS)
def test_a_stranger_believes_what_every_public_port_shows(lab: Lab, name: str, port: int, starttls: str) -> None:
    seen = world(lab, name, port, starttls)
    assert "refused" not in seen, seen
    assert name in seen["names"] and "Pebble" in seen["issuer"]
    label, _, domain = name.partition(".")
    if label in WEB_LABELS:
        # The names below a domain have a certificate of their own.
        assert set(seen["names"]) == {f"{one}.{domain}" for one in WEB_LABELS}
    # The names of the inside are nobody's business.
    assert not [other for other in seen["names"] if "net.hill.example" in other]


@pytest.mark.parametrize(
    ("host", "port", "starttls"),
    [
        ("maildrop-oak", 25, "smtp"),
        ("maildrop-elm", 465, ""),
        ("maildrop-oak", 993, ""),
        ("maildrop-elm", 4190, "sieve"),
        ("smtp-out-elm", 587, "smtp"),
        ("smtp-in-elm", 25, "smtp"),
        ("frontend-elm", 443, ""),
    ],
)
def test_hosts_of_the_stack_believe_the_stacks_own_authority_alone(
    lab: Lab, host: str, port: int, starttls: str
) -> None:
    there = lab.stack().all_hosts[host]
    where = "smtp-in-oak" if host.startswith("maildrop") and port in (25, 465) else "frontend-oak"
    seen = shaken(lab, str(there.local4), port, there.fqdn, starttls, identity.AUTHORITY, where)
    assert there.fqdn in seen.get("names", ()), seen
    # And not the world's, which might be talked into a certificate for an internal name.
    believed = lab.run(where, "cp", identity.PRIVATE_ROOTS, "/tmp/world.pem")
    assert believed.returncode == 0
    assert "refused" in shaken(lab, str(there.local4), port, there.fqdn, starttls, "/tmp/world.pem", where)


def key_of(lab: Lab, host: str, file: str) -> str:
    return str(lab.run(host, "openssl", "x509", "-in", file, "-noout", "-pubkey").stdout)


def test_both_certificates_are_of_one_key(lab: Lab) -> None:
    for host in ("smtp-in-ash", "frontend-elm"):
        assert key_of(lab, host, identity.PUBLIC) == key_of(lab, host, identity.CERTIFICATE)


def serial(lab: Lab, host: str) -> str:
    return str(lab.run(host, "openssl", "x509", "-in", identity.PUBLIC, "-noout", "-serial").stdout)


def ask_again(lab: Lab, *hosts: str) -> list[str]:
    """Has hosts ask for new certificates, all at the same time. Returns what those said that failed."""
    script = f"rm -f {certificate.STATE}/issued.pem; systemctl start {SERVICE}"
    running = [
        subprocess.Popen(
            lab.state.command_in(host, ["sh", "-c", script]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in hosts
    ]
    said = [(process.communicate()[0], process.returncode) for process in running]
    return [text for text, status in said if status]


class Idle:
    """A user who is connected, and waits for mail (RFC 2177), while things happen."""

    SCRIPT = """
import imaplib, json, ssl, sys
asked = json.loads(sys.stdin.readline())
imap = imaplib.IMAP4_SSL(asked["server"], 993, ssl_context=ssl.create_default_context(cafile=asked["believes"]))
imap.login(asked["user"], asked["password"]); imap.select("INBOX")
print("ready", flush=True)
sys.stdin.readline()
print(imap.noop()[0], imap.search(None, "ALL")[0], flush=True)
"""

    def __init__(self, state: State) -> None:
        self.process = subprocess.Popen(
            state.command_in("client", ["python3", "-c", self.SCRIPT]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        asked = {"server": "imap.hill.example", "user": "ann", "password": state.passwords["ann"]}
        self.say(json.dumps({**asked, "believes": str(state.world_file)}))
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def still_there(self) -> str:
        self.say("go on")
        printed, errors = self.process.communicate(timeout=30)
        return printed.strip() or errors.strip()


def test_all_hosts_renew_at_the_same_time_and_no_connection_is_dropped(lab: Lab) -> None:
    stack = lab.stack()
    hosts = [host.name for host in asking_hosts(stack)]
    before = {host: (serial(lab, host), key_of(lab, host, identity.PUBLIC)) for host in hosts}
    user = Idle(lab.state)
    assert ask_again(lab, *hosts) == []
    for host in hosts:
        assert serial(lab, host) != before[host][0], host
        assert key_of(lab, host, identity.PUBLIC) == before[host][1], host
    assert user.still_there() == "OK OK"
    # What is shown is the new one, and what TLSA says of it is still true.
    seen = world(lab, "imap.hill.example", 993, "")
    as_hex = f"openssl x509 -in {identity.PUBLIC} -outform DER | od -An -v -tx1 | tr -d ' \\n'"
    shown = {lab.run(replica, "sh", "-c", as_hex).stdout for replica in ("maildrop-oak", "maildrop-elm")}
    assert seen["der"] in shown
    dane = lab.run(
        "foreign", "sh", "-c", "posttls-finger -t 20 -l dane-only -L summary -c '[smtp-in.hill.example]' 2>&1"
    )
    assert "Verified TLS connection established" in dane.stdout
    # Nothing of it stays in DNS.
    for name in ("imap", "nginx0", "smtp-in"):
        asked = lab.run("foreign", "kdig", f"@{LAN4}.{DNS}", "+short", f"_acme-challenge.{name}.hill.example", "TXT")
        assert asked.stdout.strip() == ""


@contextmanager
def no_directory(lab: Lab) -> Iterator[None]:
    lab.run(
        internet.NAME,
        "sh",
        "-ec",
        "nft add table inet acme; nft add chain inet acme in '{ type filter hook input "
        "priority 0; }'; nft add rule inet acme in tcp dport 14000 reject with tcp reset",
    )
    try:
        yield
    finally:
        lab.run(internet.NAME, "nft", "delete", "table", "inet", "acme")


def status(lab: Lab, host: str) -> dict[str, Any]:
    """What became of each certificate of a host last; that of its services is under no name."""
    found: dict[str, Any] = json.loads(lab.run(host, "cat", f"{certificate.STATE}/status.json").stdout)
    certificates: dict[str, Any] = found["certificates"]
    return certificates


def test_an_authority_that_fails_is_seen_while_the_old_certificate_serves(lab: Lab) -> None:
    host = "maildrop-oak"
    before = serial(lab, host)
    with no_directory(lab):
        assert ask_again(lab, host) != []
        failed = lab.run(host, "systemctl", "--failed", "--plain", "--no-legend").stdout
        assert SERVICE in failed
        told = status(lab, host)[""]
        assert told["failures"] == 1 and "acme.example:14000" in told["error"]
        said = lab.run(host, "journalctl", "-u", SERVICE, "-n", "20", "-o", "cat").stdout
        assert "no certificate from https://acme.example:14000/dir" in said
        assert serial(lab, host) == before
        assert "refused" not in world(lab, "imap.hill.example", 993, "")
    assert ask_again(lab, host) == []
    told = status(lab, host)[""]
    assert told["failures"] == 0 and told["error"] is None
    assert SERVICE not in lab.run(host, "systemctl", "--failed", "--plain", "--no-legend").stdout


def test_a_domain_that_cannot_be_validated_fails_alone(lab: Lab) -> None:
    host, settings = "frontend-ash", certificate.SETTINGS
    before = lab.run(host, "cat", settings).stdout
    wanted = json.loads(before)
    # The name server takes no answers for it: it was not told of it.
    wanted["certificates"]["customer.hill.example"] = ["mta-sts.customer.hill.example"]
    moor = identity.public("moor.example")
    old = lab.run(host, "openssl", "x509", "-in", moor, "-noout", "-serial").stdout
    lab.run(
        host, "sh", "-c", f"cat >{settings}; rm {certificate.STATE}/moor.example.issued.pem", text=json.dumps(wanted)
    )
    try:
        done = lab.run(host, "systemctl", "start", SERVICE)
        assert done.returncode != 0
        told = status(lab, host)
        failed = {of: told[of]["error"] for of in told if told[of]["error"]}
        assert [*failed] == ["customer.hill.example"], failed
        where = "_acme-challenge.mta-sts.customer.hill.example. ("
        assert f"takes no answer of this host at {where}" in failed["customer.hill.example"], failed
        # All others are looked after, and what was issued beside it is in place.
        new = lab.run(host, "openssl", "x509", "-in", moor, "-noout", "-serial").stdout
        assert new.startswith("serial=") and new != old
        said = lab.run(host, "journalctl", "-u", SERVICE, "-n", "20", "-o", "cat").stdout
        assert "no certificate from https://acme.example:14000/dir for the names of customer.hill.example" in said
        # The timer leaves it alone for a while.
        tried = told["customer.hill.example"]["tried"]
        by_timer = "TRIGGER_TIMER_REALTIME_USEC=1"
        again = ["systemd-run", "-q", "--wait", "-p", f"User={certificate.USER}", "-p", f"Environment={by_timer}"]
        assert lab.run(host, *again, certificate.PROGRAM, "renew").returncode == 0
        assert status(lab, host)["customer.hill.example"]["tried"] == tried
    finally:
        lab.run(host, "sh", "-c", f"cat >{settings}", text=before)
        assert lab.run(host, "systemctl", "start", SERVICE).returncode == 0
    assert not lab.run(host, "sh", "-c", f"ls {certificate.STATE} | grep customer").stdout


def test_a_certificate_is_asked_for_again_long_before_it_ends(lab: Lab) -> None:
    """The program on the host, asked what it thinks of certificates of several ages."""
    script = """
import datetime as dt, importlib.machinery, importlib.util, json
loader = importlib.machinery.SourceFileLoader("certificate", "PROGRAM")
program = importlib.util.module_from_spec(importlib.util.spec_from_loader("certificate", loader))
loader.exec_module(program)
wanted, current = program.settings(), program.files_of("")[0]
there, key, status = program.issued(current), program.key_of(current), {"directory": wanted["directory"]}
def due(days):
    there.begins, there.ends = program.now() - dt.timedelta(days=90 - days), program.now() + dt.timedelta(days=days)
    return program.due(wanted, "", there, status, key)
others = {**wanted, "certificates": {"": ["a.example"]}}
print(json.dumps([due(60), due(40), due(29), program.due(others, "", there, status, key)]))
""".replace("PROGRAM", certificate.PROGRAM)
    done = lab.run("maildrop-elm", "python3", "-B", "-c", script)
    assert done.returncode == 0, done.stderr
    fresh, later, soon, renamed = json.loads(done.stdout)
    assert fresh is None and later is None
    assert soon.startswith("it ends in") and renamed == "the names changed"


def test_a_host_may_answer_its_own_challenges_and_change_nothing_else(lab: Lab) -> None:
    def update(change: str) -> int:
        text = f"server {LAN4}.{DNS}\nzone hill.example.\nupdate {change}\nsend\n"
        done = lab.run("frontend-ash", "knsupdate", "-v", "-k", f"{identity.FOLDER}tsig", text=text)
        return int(done.returncode)

    own = "_acme-challenge.nginx0.hill.example."
    assert update(f"add {own} 0 TXT a-test") == 0
    assert update(f"delete {own} TXT a-test") == 0
    for change in (
        f"add {own} 0 A 203.0.113.66",
        "add _acme-challenge.smtp-in.hill.example. 0 TXT another-host",
        "add evil.hill.example. 60 A 203.0.113.66",
        "delete hill.example. MX",
    ):
        assert update(change) != 0, change


def test_what_asks_the_world_runs_as_nobody_in_particular_and_never_sees_the_key(lab: Lab) -> None:
    asked = lab.run("smtp-in-oak", "runuser", "-u", certificate.USER, "--", "cat", identity.KEY)
    assert asked.returncode != 0 and "Permission denied" in asked.stderr
    level = lab.run("smtp-in-oak", "systemd-analyze", "security", "--no-pager", SERVICE).stdout.splitlines()[-1]
    assert float(level.split(":")[1].split()[0]) < 2.5, level


def test_until_one_is_issued_the_stacks_own_certificate_stands_in_its_place(lab: Lab) -> None:
    """What a push does first on a host that has none: it asks nobody."""
    host = "smtp-out-ash"
    with no_directory(lab):
        first = certificate.first(lab.stack(), lab.stack().all_hosts[host])
        lab.run(host, "rm", identity.PUBLIC, f"{certificate.STATE}/issued.pem")
        done = lab.run(host, "sh", "-c", first)
        assert done.returncode == 0, done.stderr
        issuer = lab.run(host, "openssl", "x509", "-in", identity.PUBLIC, "-noout", "-issuer").stdout
        assert "hill.example authority" in issuer
    assert ask_again(lab, host) == []
    issuer = lab.run(host, "openssl", "x509", "-in", identity.PUBLIC, "-noout", "-issuer").stdout
    assert "Pebble" in issuer
    # One that is there and fits the key is left.
    before = serial(lab, host)
    assert lab.run(host, "sh", "-c", first).returncode == 0
    assert serial(lab, host) == before
