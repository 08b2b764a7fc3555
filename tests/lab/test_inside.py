"""Inside a host: what somebody finds there who broke into one of its daemons."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.bundle import bundle
from services.roles import services_of
from services.service import Source
from tests.lab.conftest import Lab
from tests.lab.test_hosts import EACH_KIND, SCAN, listening

PRIMARY = "frontend-oak"
NOBODY = "nobody"


def scan_as(lab: Lab, host: str, user: str, addresses: list[str], ports: set[int]) -> dict[str, set[int]]:
    """The ports that a user of a host finds open at some addresses."""
    task = json.dumps({"addresses": addresses, "ports": sorted(ports), "source": ""})
    done = lab.run(host, "runuser", "-u", user, "--", "python3", "-c", SCAN, text=task)
    assert done.returncode == 0, done.stderr
    return {address: set(found) for address, found in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", EACH_KIND)
def test_each_daemon_of_a_host_reaches_what_it_has_to_and_no_other_port_of_it(lab: Lab, name: str) -> None:
    stack = lab.stack()
    host = stack.all_hosts[name]
    services = services_of(stack, host)
    calls = [call for service in services for call in service.calls]
    public = {listen.port for s in services for listen in s.listens if isinstance(listen.frm, Source)}
    everybody = public | {call.port for call in calls if call.user is None}
    there = listening(lab, [name])
    addresses = ["127.0.0.1", "::1", *map(str, host.addresses.local)]
    open_to_root = scan_as(lab, name, "root", addresses, there)
    assert set().union(*open_to_root.values()) == there
    for user in {NOBODY, *(call.user for call in calls if call.user)}:
        may = everybody | {call.port for call in calls if call.user == user}
        found = scan_as(lab, name, user, addresses, there)
        assert found == {address: ports & may for address, ports in open_to_root.items()}, user


def test_whoever_speaks_with_its_own_host_alone_reaches_no_other(lab: Lab) -> None:
    stack = lab.stack()
    inside = {name: str(host.addresses.local[0]) for name, host in stack.all_hosts.items() if name != PRIMARY}
    ports = {25, 465, 587, 993, 4190, 10465, 10587, 11333, 12587}
    found = scan_as(lab, PRIMARY, "webmail", list(inside.values()), ports)
    assert not set().union(*found.values()), found
    # The host itself does.
    assert 12587 in scan_as(lab, PRIMARY, "www-data", [inside["smtp-out-oak"]], ports)[inside["smtp-out-oak"]]


AS_BEN = """
import smtplib, sys
for said in sys.stdin.read().splitlines():
    smtp = smtplib.SMTP("127.0.0.1", 20587, timeout=10)
    smtp.starttls()
    smtp.ehlo("webmail.hill.example")
    named = smtp.docmd(said)[0]
    smtp.ehlo("webmail.hill.example")
    smtp.mail("ben@hill.example")
    print(named, smtp.rcpt("bob@far.example")[0])
    smtp.close()
"""


def test_a_thief_in_the_web_mail_logs_in_as_nobody(lab: Lab) -> None:
    tries = [
        "XCLIENT LOGIN=ben ADDR=203.0.113.10",
        "XCLIENT ADDR=203.0.113.10 LOGIN=ben",
        "XCLIENT LOGIN=ben",
        "xclient\tlogin=ben",
        "  XCLIENT LOGIN=ben",
        '"XCLIENT" LOGIN=ben',
        "XCLIENT ADDR=203.0.113.10\tLOGIN=ben",
        "XCLIENT ADDR=203.0.113.10",
    ]
    command = ("runuser", "-u", "webmail", "--", "python3", "-c", AS_BEN)
    done = lab.run(PRIMARY, *command, text="\n".join(tries))
    said = [line.split() for line in done.stdout.splitlines()]
    assert [rcpt for _, rcpt in said] == ["554"] * len(tries), (done.stdout, done.stderr)
    assert [named for named, _ in said] == ["220", "220", "500", "500", "500", "500", "220", "220"], done.stdout


@pytest.mark.parametrize("user", ["webmail", "www-data"])
def test_what_the_scanner_has_learnt_is_for_the_scanner_alone(lab: Lab, user: str) -> None:
    command = ("redis-cli", "-s", "/run/redis/redis-server.sock", "ping")
    assert "PONG" not in lab.run(PRIMARY, "runuser", "-u", user, "--", *command).stdout
    assert "PONG" in lab.run(PRIMARY, "runuser", "-u", "_rspamd", "-G", "redis", "--", *command).stdout


LIMIT = 5.0
"""From here systemd calls a service's exposure medium (systemd-analyze(1), security)."""


@pytest.mark.parametrize("host", EACH_KIND)
def test_every_daemon_is_shut_in(lab: Lab, host: str) -> None:
    pushed = bundle(lab.stack(), lab.stack().all_hosts[host])
    daemons = {path.split("/")[-2].removesuffix(".d") for path in pushed["files"] if path.endswith(".d/revive.conf")}
    listed = lab.run(host, "systemd-analyze", "security", "--no-pager", "--json=short").stdout
    exposure: dict[str, Any] = {entry["unit"]: float(entry["exposure"]) for entry in json.loads(listed)}
    # The SSH server gives operators, and the agent, the whole host.
    wide = {unit: exposure[unit] for unit in daemons - {"ssh.service"} if exposure[unit] >= LIMIT}
    assert not wide
    ours = {unit: value for unit, value in exposure.items() if unit.startswith("posthorn-") and value >= LIMIT}
    assert not ours
