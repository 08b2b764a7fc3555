"""Every host for itself: which ports it shows to whom, who gets in, and that what dies comes back."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from rich.console import Console

from agent import SOURCE as AGENT
from lab.proof import ProofFailed, prove
from model.network import Role
from model.stack import Host
from services.bundle import bundle
from services.roles import services_of
from services.service import Source
from tests.lab.conftest import Lab
from tests.lab.steps import eventually

SCAN = """
import asyncio, json, sys
task = json.load(sys.stdin)
found = {address: [] for address in task["addresses"]}
async def is_open(gate, address, port):
    async with gate:
        try:
            source = (task["source"], 0) if ":" not in address and task["source"] else None
            _, writer = await asyncio.wait_for(asyncio.open_connection(address, port, local_addr=source), 3)
        except (OSError, asyncio.TimeoutError):
            return
        writer.transport.abort()
        found[address].append(port)
async def main():
    gate = asyncio.Semaphore(400)
    await asyncio.gather(*(is_open(gate, address, port) for address in found for port in task["ports"]))
    print(json.dumps(found))
asyncio.run(main())
"""
STRANGER = "203.0.113.68"
TO_STRANGERS = {Role.SMTP_IN: {25, 465}, Role.FRONTEND: {80, 443, 465, 587, 993}}
"""What the internet may reach, by role. Nothing else is there for it."""


def listening(lab: Lab, hosts: Iterable[str]) -> set[int]:
    """Every TCP port that something on these hosts listens on, to whomever."""
    lines = "".join(lab.run(host, "ss", "-Hltn").stdout for host in hosts).splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in lines}


def scan(lab: Lab, where: str, addresses: list[str], ports: Iterable[int], source: str = "") -> dict[str, set[int]]:
    """The ports that are open at some addresses, as seen from somewhere."""
    task = {"addresses": addresses, "ports": sorted(ports), "source": source}
    python = lab.state.python if where == "client" else "python3"
    done = lab.run(where, python, "-c", SCAN, text=json.dumps(task))
    assert done.returncode == 0, done.stderr
    return {address: set(found) for address, found in json.loads(done.stdout).items()}


def test_strangers_find_the_declared_ports_and_no_others(lab: Lab) -> None:
    stack = lab.stack()
    ports = {*range(1, 1025), *listening(lab, stack.all_hosts)}
    public = [str(address) for host in stack.all_hosts.values() for address in host.addresses.public]
    found = scan(lab, "client", public, ports, STRANGER)
    for host in stack.all_hosts.values():
        wanted: set[int] = set().union(*(TO_STRANGERS.get(role, set()) for role in host.roles))
        for address in host.addresses.public:
            # By IPv6 the lab's client comes from a network of users: ManageSieve is open to those.
            users = {4190} if address.version == 6 and host.has(Role.FRONTEND) else set()
            assert found[str(address)] == wanted | users, f"{host.name} at {address}"
    inside = [str(address) for host in stack.all_hosts.values() for address in host.addresses.local]
    assert not set().union(*scan(lab, "client", inside, (22, 25, 465, 587, 993), STRANGER).values())


def allowed(lab: Lab, host: Host, neighbour: Host) -> set[int]:
    """The TCP ports that the services of a host declare to a neighbour."""
    found = set()
    for service in services_of(lab.stack(), host):
        for listen in service.listens:
            if listen.protocol != "tcp":
                continue
            if isinstance(listen.frm, Source) or any(
                address == source or (hasattr(source, "hosts") and address in source)  # type: ignore[operator]
                for source in listen.frm
                for address in neighbour.addresses.local
            ):
                found.add(listen.port)
    return found


@pytest.mark.parametrize("name", ["smtp-out-oak", "maildrop-elm"])
def test_a_neighbour_inside_finds_what_is_declared_to_it_and_no_more(lab: Lab, name: str) -> None:
    stack = lab.stack()
    neighbour = stack.all_hosts[name]
    ports = {*range(1, 1025), *listening(lab, stack.all_hosts)}
    others = [host for host in stack.all_hosts.values() if host.name != name]
    found = scan(lab, name, [str(address) for host in others for address in host.addresses.local], ports)
    for host in others:
        for address in host.addresses.local:
            assert found[str(address)] == allowed(lab, host, neighbour), f"{host.name} at {address}"
            assert 22 not in found[str(address)]


NEW = {"frontend-ash": ("198.18.3.77", "2001:db8:1:3::77"), "maildrop-oak": ("198.18.1.77", "2001:db8:1:1::77")}
"""Other addresses for two hosts, which between them have every kind of daemon."""
ASK = """
import sys
agent = {"__name__": "agent"}
exec(sys.stdin.read(), agent)
print(agent["probe_dns"]({"address": sys.argv[1], "name": "hill.example", "type": "MX", "secure": True}))
"""
"""Asks a resolver over UDP. Says what is wrong, or None."""


def test_a_host_that_is_renumbered_is_heard_at_its_new_addresses_however_late_they_come(lab: Lab) -> None:
    stack, host = lab.stack(), "frontend-ash"
    old = [str(address) for address in stack.all_hosts[host].addresses.local]

    def renumber(wanted: dict[str, Any]) -> None:
        for was, becomes in zip(old, NEW[host], strict=True):
            for file in wanted["files"].values():
                file["content"] = re.sub(rf"(?<![\w:.]){re.escape(was)}(?![\w:.]\w)", becomes, file["content"])
            for probe in wanted["health"]:
                probe["addresses"] = [becomes if address == was else address for address in probe.get("addresses", ())]

    try:
        # The daemons start while the addresses are not there.
        done = lab.push(host, renumber)
        assert done.returncode == 0 and "unbound.service" in done.stdout, done.stdout + done.stderr
        for name, addresses in NEW.items():
            for address in addresses:
                length, nodad = ("64", ["nodad"]) if ":" in address else ("24", [])
                lab.run(name, "ip", "address", "add", f"{address}/{length}", "dev", "local0", *nodad)
        neighbour = stack.all_hosts["maildrop-elm"]
        every = {name: allowed(lab, stack.all_hosts[name], neighbour) for name in NEW}
        found = scan(lab, neighbour.name, [a for both in NEW.values() for a in both], set().union(*every.values()))
        assert found == {address: every[name] for name, both in NEW.items() for address in both}
        assert {11335, 53} <= every[host] and {12345, 12348, 993} <= every["maildrop-oak"]
        for address in NEW[host]:
            answer = lab.run(neighbour.name, "python3", "-c", ASK, address, text=AGENT)
            assert answer.stdout == "None\n", f"{address}: {answer.stdout}{answer.stderr}"
    finally:
        for name, addresses in NEW.items():
            for address in addresses:
                lab.run(name, "ip", "address", "del", f"{address}/{64 if ':' in address else 24}", "dev", "local0")
        done = lab.push(host)
    assert done.returncode == 0, done.stderr


@pytest.mark.on_release(12)
def test_a_daemon_that_listens_at_less_than_its_host_has_is_a_push_that_failed(lab: Lab) -> None:
    host, path = "frontend-ash", "/etc/stunnel/learning.conf"

    def narrow(wanted: dict[str, Any]) -> None:
        text = wanted["files"][path]["content"]
        wanted["files"][path]["content"] = text.replace("accept = :::11335", "accept = 198.18.3.14:11335")
        wanted["health_seconds"] = 2

    done = lab.push(host, narrow)
    assert done.returncode == 1, done.stdout
    missing = "2001:db8:1:3::14, 198.51.100.35, 2001:db8:2:3::3"
    assert f"{host}: learning: port 11335: nobody listens at {missing} (tcp)" in done.stderr
    assert "the services run with them as before" in done.stderr


@pytest.mark.on_release(12)
def test_a_daemon_that_missed_an_address_is_started_again_by_the_next_push(lab: Lab) -> None:
    host, unit, file = "frontend-ash", "stunnel@learning.service", "/etc/stunnel/learning.conf"
    # Its file is right again, and what it runs with is not.
    miss = f"""
        cp -p {file} /run/kept
        sed -i s/:::11335/198.18.3.14:11335/ {file}
        systemctl restart {unit}
        timeout 10 sh -c 'until ss -Hltn | grep -q 198.18.3.14:11335; do sleep 0.05; done'
        cp -p /run/kept {file}
    """
    lab.run(host, "sh", "-c", miss)
    done = lab.push(host)
    assert done.returncode == 0 and f"restarted {unit}" in done.stdout, done.stdout + done.stderr
    assert "nothing to do" in lab.push(host).stdout


@pytest.mark.parametrize("host", ["smtp-in-oak", "smtp-out-elm", "maildrop-oak", "frontend-ash"])
def test_nobody_gets_in_by_a_password(lab: Lab, host: str) -> None:
    address = str(lab.stack().all_hosts[host].management_address)
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "PubkeyAuthentication=no"]
    command = ["ssh", *(word for option in options for word in ("-o", option)), f"root@{address}", "true"]
    done = lab.state.run_in("operator", command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 255 and "Permission denied (publickey)" in done.stderr, done.stderr


def test_a_file_of_cloud_init_that_allows_passwords_does_not_count(lab: Lab) -> None:
    host, path = "smtp-in-elm", "/etc/ssh/sshd_config.d/50-cloud-init.conf"
    lab.run(host, "sh", "-c", f"echo PasswordAuthentication yes > {path} && systemctl reload ssh")
    try:
        test_nobody_gets_in_by_a_password(lab, host)
    finally:
        lab.run(host, "sh", "-c", f"rm {path} && systemctl reload ssh")


EACH_KIND = ("smtp-in-oak", "smtp-out-oak", "maildrop-elm", "frontend-ash")


@pytest.mark.parametrize("host", EACH_KIND)
def test_a_host_takes_security_updates_by_itself_and_its_logs_have_an_end(lab: Lab, host: str) -> None:
    apt = lab.run(host, "apt-config", "dump").stdout
    assert 'APT::Periodic::Unattended-Upgrade "1";' in apt
    origins = [line for line in apt.splitlines() if line.startswith("Unattended-Upgrade::Origins-Pattern:: ")]
    assert len(origins) == 1 and "Debian-Security" in origins[0], origins
    assert "SystemMaxUse=500M" in lab.run(host, "systemd-analyze", "cat-config", "systemd/journald.conf").stdout
    rotation = lab.run(host, "logrotate", "--debug", "/etc/logrotate.conf")
    assert rotation.returncode == 0 and "error:" not in rotation.stderr, rotation.stderr
    timers = lab.run(host, "systemctl", "list-timers", "--all", "--plain", "--no-legend").stdout
    assert "logrotate.timer" in timers


KILL = """
import json, os, signal, subprocess, sys, time

def state(unit):
    command = ["systemctl", "show", "-p", "MainPID,ActiveState", "--", unit]
    asked = subprocess.run(command, capture_output=True, text=True).stdout
    now = dict(line.split("=", 1) for line in asked.splitlines())
    pid = int(now["MainPID"])
    if not pid and unit.startswith("postfix"):
        # Its unit names no process; Postfix itself does.
        try:
            pid = int(open("/var/spool/postfix/pid/master.pid").read())
            os.kill(pid, 0)
        except (OSError, ValueError):
            pid = 0
    return pid, now["ActiveState"]

units = json.load(sys.stdin)
before = {unit: state(unit)[0] for unit in units}
for pid in before.values():
    if pid:
        os.kill(pid, signal.SIGKILL)
waiting, deadline = dict(before), time.monotonic() + 40
while waiting and time.monotonic() < deadline:
    time.sleep(0.2)
    for unit, old in list(waiting.items()):
        pid, active = state(unit)
        if active == "active" and pid and pid != old:
            del waiting[unit]
print(json.dumps({"never ran": [u for u, pid in before.items() if not pid], "dead": sorted(waiting)}))
"""


def test_every_daemon_that_is_killed_comes_back(lab: Lab) -> None:
    stack = lab.stack()

    def kill_all(host: Host) -> dict[str, Any]:
        files = bundle(stack, host)["files"]
        end = ".service.d/revive.conf"
        units = [path.split("/")[-2].removesuffix(".d") for path in files if path.endswith(end)]
        assert units
        done = lab.run(host.name, "python3", "-c", KILL, text=json.dumps(units))
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    with ThreadPoolExecutor(max_workers=len(stack.all_hosts)) as pool:
        said = dict(zip(stack.all_hosts, pool.map(kill_all, stack.all_hosts.values()), strict=True))
    wrong = {host: found for host, found in said.items() if any(found.values())}
    assert not wrong, wrong

    def proved() -> bool:
        # As long as a filter is on its way up, "try later" is the right answer.
        try:
            prove(lab.state, Console(width=160))
        except ProofFailed:
            return False
        return True

    eventually(proved, 60)
