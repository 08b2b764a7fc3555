"""What an operator does with a running service: looks, changes, repairs, goes on without a site."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from lab import containers, faults, up
from lab.proof import prove
from tests.lab.conftest import PUSH, Lab
from tests.lab.steps import eventually


def alias(config: dict[str, Any]) -> None:
    config["domains"]["hill.example"]["aliases"]["garden"] = "ben"


def test_a_second_up_changes_nothing(lab: Lab) -> None:
    printed = lab.up()
    assert " unchanged" in printed
    assert not [line for line in printed.splitlines() if line.strip().startswith(("+ ", "~ ", "- "))]


def test_a_refresh_finds_nothing_changed(lab: Lab) -> None:
    done = lab.ops("refresh", lab.stack_name, "--yes")
    assert done.returncode == 0, done.stdout
    assert " unchanged" in done.stdout and "updated" not in done.stdout


def test_a_preview_shows_host_file_and_line_and_touches_nothing(unchanged: Lab) -> None:
    unchanged.change(alias)
    before = unchanged.run("smtp-in-oak", "cat", "/etc/postfix/virtual").stdout
    done = unchanged.ops("preview", unchanged.stack_name)
    assert done.returncode == 0, done.stdout
    for host in ("smtp-in-oak", "smtp-in-elm", "smtp-in-ash"):
        assert f"::{host}-files]" in done.stdout
    assert "/etc/postfix/virtual" in done.stdout
    assert "+ garden@hill.example ben@maildrop.net.hill.example" in " ".join(done.stdout.split())
    # At mailbox hosts the login by that address comes; what stays as it is is not shown.
    assert "~ /etc/dovecot/logins" in done.stdout and "/etc/postfix/mailboxes" not in done.stdout
    assert unchanged.run("smtp-in-oak", "cat", "/etc/postfix/virtual").stdout == before


def test_an_alias_that_is_added_takes_mail_and_restarts_nothing(unchanged: Lab) -> None:
    def started() -> str:
        asked = unchanged.run("smtp-in-oak", "systemctl", "show", "-p", "ExecMainPID,MainPID", unit)
        return str(asked.stdout)

    unit = unchanged.postfix("smtp-in-oak")
    before = started()
    unchanged.change(alias)
    printed = unchanged.up()
    assert f"reloaded {unit}" in printed
    assert started() == before
    asked = unchanged.run("smtp-in-oak", "postmap", "-q", "garden@hill.example", "texthash:/etc/postfix/virtual")
    assert asked.stdout.strip() == "ben@maildrop.net.hill.example"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda c: c["hosts"]["smtp-in-oak"].update(rols=["smtp-in"]),
            "hosts.smtp-in-oak.rols: unknown key, did you mean roles?",
        ),
        (
            lambda c: c["hosts"]["smtp-in-oak"]["addresses"]["local"].__setitem__(0, "198.18.9.9"),
            "hosts.smtp-in-oak.addresses.local[0]: 198.18.9.9 is not in a local prefix of site oak",
        ),
        (
            lambda c: c["domains"]["hill.example"]["aliases"].update(x="nobody@dale.invalid.hill.example", y="carl"),
            "domains.hill.example.aliases.y: there is no account carl",
        ),
    ],
)
def test_a_stack_file_that_is_wrong_is_told_in_one_message_and_nothing_is_changed(
    lab: Lab, spoil: Any, said: str
) -> None:
    before = lab.stack_file.read_text()
    try:
        lab.change(spoil)
        done = lab.ops("up", lab.stack_name, "--yes")
    finally:
        lab.stack_file.write_text(before)
    assert done.returncode == 1
    assert "is not valid, nothing was changed" in done.stdout
    assert said in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout and "Updating" not in done.stdout


def test_a_secret_that_is_missing_is_named_with_the_command_that_makes_it(lab: Lab) -> None:
    before = lab.stack_file.read_text()
    try:
        lab.change(lambda c: c["keys"]["public"]["hosts"].pop("maildrop-elm"))
        done = lab.ops("up", lab.stack_name, "--yes")
    finally:
        lab.stack_file.write_text(before)
    assert done.returncode == 1
    assert f"keys.public.hosts.maildrop-elm: is missing: run make keys STACK={lab.stack_name}" in done.stdout
    assert "Traceback" not in done.stdout


def broken(lab: Lab, host: str, path: str, content: str, *, seconds: int = 5) -> str:
    """Pushes the host's present bundle with one file spoilt. Returns what the agent said."""

    def spoil(wanted: dict[str, Any]) -> None:
        wanted["files"][path]["content"] = content
        wanted["health_seconds"] = seconds

    done = lab.push(host, spoil)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return str(done.stderr)


def test_a_bad_nginx_file_leaves_the_old_one_serving(lab: Lab) -> None:
    before = lab.run("frontend-ash", "cat", "/etc/nginx/nginx.conf").stdout
    said = broken(lab, "frontend-ash", "/etc/nginx/nginx.conf", before + "\nnonsense;\n")
    assert said.startswith("frontend-ash: frontend: nginx -t -q refuses the new configuration:")
    assert 'unknown directive "nonsense"' in said
    assert lab.run("frontend-ash", "cat", "/etc/nginx/nginx.conf").stdout == before
    assert lab.run("frontend-ash", "systemctl", "is-active", "nginx").stdout.strip() == "active"


def test_a_misspelt_parameter_of_postfix_never_reaches_it(lab: Lab) -> None:
    before = lab.run("smtp-out-ash", "cat", "/etc/postfix/main.cf").stdout
    said = broken(lab, "smtp-out-ash", "/etc/postfix/main.cf", before + "\nsmtpd_tls_securty_level = may\n")
    assert "smtp-out-ash: smtp-out:" in said and "smtpd_tls_securty_level" in said
    assert lab.run("smtp-out-ash", "cat", "/etc/postfix/main.cf").stdout == before


WAITING = """
import socket
sessions = [socket.create_connection(("127.0.0.1", 25)) for _ in range(4)]
for session in sessions:
    session.recv(1000)
for session in sessions:
    session.sendall(b"QUIT\\r\\n")
    session.recv(1000)
"""
"""Leaves processes of Postfix that wait for the next client: with what they read when they started."""


def test_a_file_that_passes_its_check_and_does_not_work_is_taken_back(lab: Lab) -> None:
    path = "/etc/postfix/mailboxes"
    before = lab.run("maildrop-elm", "cat", path).stdout
    assert lab.run("maildrop-elm", "python3", "-c", WAITING).returncode == 0
    said = broken(lab, "maildrop-elm", path, "nobody@maildrop.net.hill.example nobody\n", seconds=2)
    assert f"does not accept {next(iter(lab.stack().accounts))}@maildrop.net.hill.example" in said
    assert "The files were put back" in said
    assert lab.run("maildrop-elm", "cat", path).stdout == before


def test_what_only_the_new_workers_of_nginx_show_to_be_wrong_is_taken_back(lab: Lab) -> None:
    host, path = "frontend-ash", "/etc/nginx/nginx.conf"
    before = lab.run(host, "cat", path).stdout
    said = broken(lab, host, path, before.replace("return 302 ", "return 500; # "), seconds=1)
    assert said.startswith(f"{host}: frontend: 127.0.0.1 port 443: answers / with 500\n  The files were put back"), said
    assert lab.run(host, "cat", path).stdout == before


@pytest.mark.on_release(12)
def test_a_reload_that_nginx_refuses_is_not_taken_for_done(lab: Lab) -> None:
    host, path = "frontend-ash", "/etc/nginx/nginx.conf"
    before = lab.run(host, "cat", path).stdout
    # Its check does not bind, so only the reload finds that somebody else has this address.
    taken = before.replace("listen [::]:80;", "listen [::]:80;\n        listen 127.0.0.1:11334;", 1)
    assert taken != before
    said = broken(lab, host, path, taken, seconds=1)
    assert said.startswith(f"{host}: frontend: 127.0.0.1 port 443: what answers has not taken up its new files\n"), said
    assert lab.run(host, "cat", path).stdout == before


CUTS = """
import copy, json, re, subprocess, sys, time

PUSH = '''
import json, os, signal, sys
b = json.load(sys.stdin)
g = {"__name__": "agent"}
exec(b["agent"], g)
if sys.argv[1]:
    g[sys.argv[1]] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
g["main"](b)
'''
wanted, found = json.load(sys.stdin), []

def altered(edit):
    bundle = copy.deepcopy(wanted)
    file = bundle["files"]["/etc/stunnel/learning.conf"]
    file["content"] = edit(file["content"])
    return bundle

def also_at(port):
    return altered(lambda text: text + f"[more]\\nclient = yes\\naccept = 127.0.0.1:{port}\\nconnect = 127.0.0.1:9\\n")

def push(bundle, cut=""):
    done = subprocess.run([sys.executable, "-c", PUSH, cut], input=json.dumps(bundle), capture_output=True, text=True)
    # It listens a moment after it was started.
    ports, deadline = [], time.monotonic() + (0 if cut else 10)
    while 11335 not in ports:
        listening = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True).stdout
        ports = sorted({int(port) for port in re.findall(r":(11335|1139\\d) ", listening)})
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    found.append((done.returncode, ports, done.stdout + done.stderr))

old, new, third = wanted, also_at(11391), also_at(11392)
deaf = altered(lambda text: text.replace("11335", "11393")) | {"health_seconds": 0.5}
for cut, bundle, after in json.loads(sys.argv[1]):
    named = {"old": old, "new": new, "third": third, "deaf": deaf}
    push(named[bundle], cut)
    push(named[after])
    push(old)
print(json.dumps(found))
"""
"""Pushes that are cut where a function of the agent would begin, each followed by another, and by what was there."""


@pytest.mark.on_release(12)
def test_a_daemon_runs_with_what_was_pushed_last_wherever_the_push_before_was_cut(lab: Lab) -> None:
    host, cuts = "frontend-ash", ("_units", "wait_until_healthy", "_remember")
    tries = [(cut, "new", after) for cut, after in zip(cuts, ("third", "old", "new"), strict=True)]
    tries += [("_units", "deaf", "deaf"), ("wait_until_healthy", "deaf", "old")]
    done = lab.push(host, program=f"import sys; sys.argv.append({json.dumps(tries)!r})\n{CUTS}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ports = {"old": [11335], "new": [11335, 11391], "third": [11335, 11392], "deaf": [11335]}
    for (cut, bundle, after), ended, next_one, last in zip(tries, *(found[i::3] for i in range(3)), strict=True):
        assert ended[0] == -9, ended
        assert next_one[:2] == [1 if after == "deaf" else 0, ports[after]], (cut, bundle, next_one)
        assert next_one[2].startswith("an earlier run on this host was cut"), next_one
        assert last[:2] == [0, ports["old"]], (cut, bundle, last)
    refused = found[10][2]
    assert "nobody listens" in refused and "the services run with them as before" in refused


def test_an_agent_that_was_killed_finishes_its_work_in_the_next_run(unchanged: Lab) -> None:
    # As if a run had been cut after the files were swapped and before the units took them up.
    unchanged.run("smtp-in-elm", "sh", "-c", "echo '# by hand' >> /etc/postfix/transport; rm /etc/nftables.conf")
    unchanged.change(alias)
    printed = unchanged.up()
    assert "smtp-in-elm: changed /etc/nftables.conf" in printed
    assert "by hand" not in unchanged.run("smtp-in-elm", "cat", "/etc/postfix/transport").stdout


KILLED = f"""
import glob, os, signal, subprocess, sys, time

def is_unpacked():
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            words = open(path, "rb").read().split(b"\\0")
        except OSError:
            continue
        if words[0].endswith(b"dpkg") and b"--unpack" in words:
            return True
    return False

push = subprocess.Popen([sys.executable, "-c", {PUSH!r}], stdin=subprocess.PIPE, start_new_session=True)
push.stdin.write(sys.stdin.buffer.read())
push.stdin.close()
while not is_unpacked():
    assert push.poll() is None, "it ended before anything was unpacked"
    time.sleep(0.001)
os.KILL(push.pid, signal.SIGKILL)
print(os.path.exists("/usr/sbin/policy-rc.d"))
"""
"""A push that is killed while dpkg unpacks."""


@pytest.mark.parametrize("kill", ["kill", "killpg"], ids=["alone", "with its apt"])
def test_a_push_that_was_killed_while_packages_install_is_finished_by_the_next(lab: Lab, kill: str) -> None:
    host = "frontend-ash"
    lab.run(host, "dpkg", "--purge", "opensmtpd", "ed")
    killed = lab.push(host, program=KILLED.replace("os.KILL", f"os.{kill}"))
    assert killed.stdout == "True\n", killed.stderr
    done = lab.push(host)
    assert done.returncode == 0, done.stderr
    assert lab.run(host, "ls", "/usr/sbin/policy-rc.d").returncode
    assert lab.run(host, "dpkg", "--audit").stdout == ""
    assert lab.run(host, "systemctl", "is-active", "opensmtpd", "nginx").stdout.split() == ["active"] * 2


def test_a_change_that_fails_brings_back_what_it_ended(lab: Lab) -> None:
    host, path = "frontend-ash", "/etc/nginx/nginx.conf"

    def end(wanted: dict[str, Any]) -> None:
        wanted["files"][path]["content"] += "# new\n"
        del wanted["units"]["opensmtpd.service"]
        wanted["masked"].append("logrotate.timer")
        wanted["health"].append({"service": "frontend", "kind": "command", "run": ["false"]})
        wanted["health_seconds"] = 1

    done = lab.push(host, end)
    assert done.returncode == 1 and "the services run with them as before" in done.stderr, done.stderr
    for verb, said in (("is-active", "active"), ("is-enabled", "enabled")):
        asked = lab.run(host, "systemctl", verb, "opensmtpd.service", "logrotate.timer", "nginx.service")
        assert asked.stdout.split() == [said] * 3
    assert "nothing to do" in lab.push(host).stdout


def test_a_host_that_was_made_anew_is_filled_again_by_up_alone(lab: Lab) -> None:
    name = "smtp-out-elm"
    up.reinstall(lab.state, name, blank=True)
    printed = lab.up()
    assert "smtp-out-elm: changed" in printed and "smtp-out-oak-files" not in printed
    units = (lab.postfix(name), "dovecot", "opendkim")
    assert lab.run(name, "systemctl", "is-active", *units).stdout.split() == ["active"] * 3
    # It asks for a certificate that the world believes, and gets one.
    up.wait_for_certificates(lab.state, lab.stack())


def test_a_host_that_was_started_anew_is_as_the_stack_says(lab: Lab) -> None:
    name = "frontend-ash"
    faults.fail(lab.state, "host", name)
    faults.heal(lab.state, "host", name)
    containers.wait_for_ssh(lab.state, {name: "198.18.3.14"})
    # Not by --wait, which was seen to return a minute late on a busy machine.
    started = ("running", "degraded")
    eventually(lambda: lab.run(name, "systemctl", "is-system-running").stdout.strip() in started, 120)
    # Its scanner reads for some seconds before it listens.
    eventually(lambda: ":11333" in lab.run(name, "ss", "-Hltn").stdout)
    done = lab.push(name)
    assert "nothing to do" in done.stdout, done.stdout + done.stderr


def test_an_access_that_does_not_cover_the_operator_shuts_nobody_out(unchanged: Lab) -> None:
    unchanged.change(lambda config: config["access"].update(ssh_from=["192.0.2.0/24"]))
    before = unchanged.run("smtp-in-oak", "cat", "/etc/nftables.conf").stdout
    done = unchanged.ops("up", unchanged.stack_name, "--yes")
    assert done.returncode != 0
    assert "which is in no network of access.ssh_from (192.0.2.0/24)" in " ".join(done.stdout.split())
    assert unchanged.run("smtp-in-oak", "cat", "/etc/nftables.conf").stdout == before


@pytest.fixture
def without_elm(lab: Lab) -> Any:
    faults.fail(lab.state, "site", "elm", black_hole=True)
    yield lab
    faults.heal(lab.state, "site", "elm")


def test_up_without_a_lost_site_names_it_first_and_then_works(without_elm: Lab, unchanged: Lab) -> None:
    unchanged.change(alias)
    refused = unchanged.ops("up", unchanged.stack_name, "--yes")
    assert refused.returncode == 1
    assert "host smtp-in-elm does not answer at 198.18.2.11 port 22" in refused.stdout
    assert "WITHOUT=elm" in refused.stdout and "Traceback" not in refused.stdout
    printed = unchanged.up("--without", "elm")
    assert "smtp-in-oak: changed /etc/postfix/virtual" in printed and "smtp-in-elm-files" not in printed
    faults.heal(unchanged.state, "site", "elm")


def test_mail_flows_while_a_site_is_lost(lab: Lab) -> None:
    faults.fail(lab.state, "site", "elm", black_hole=True)
    try:
        prove(lab.state, Console(width=160))
    finally:
        faults.heal(lab.state, "site", "elm")


def test_a_host_that_answers_with_another_key_gets_nothing(unchanged: Lab) -> None:
    def other_key(config: dict[str, Any]) -> None:
        hosts = config["hosts"]
        hosts["smtp-in-ash"]["existing"]["host_key"] = hosts["smtp-in-elm"]["existing"]["host_key"]
        alias(config)

    before = unchanged.run("smtp-in-ash", "cat", "/etc/postfix/virtual").stdout
    unchanged.change(other_key)
    done = unchanged.ops("up", unchanged.stack_name, "--yes")
    assert done.returncode != 0
    assert "key" in done.stdout.lower()
    assert unchanged.run("smtp-in-ash", "cat", "/etc/postfix/virtual").stdout == before


def test_a_record_that_somebody_else_changed_is_not_overwritten(unchanged: Lab) -> None:
    from lab import internet

    def knot(value: str) -> None:
        unset, put = "zone-unset moor.example _dmarc TXT", f"zone-set moor.example _dmarc 3600 TXT {value}"
        commands = "; ".join(f"knotc {c} >/dev/null" for c in ("zone-begin moor.example", unset, put))
        done = unchanged.run(internet.NAME, "sh", "-ec", f"{commands}; knotc zone-commit moor.example >/dev/null")
        assert done.returncode == 0, done.stderr

    def stricter(config: dict[str, Any]) -> None:
        config["dns"]["dmarc"] = "v=DMARC1; p=quarantine"

    before = unchanged.stack().dns.dmarc
    knot("'\"v=DMARC1; p=none\"'")
    try:
        unchanged.change(stricter)
        done = unchanged.ops("up", unchanged.stack_name, "--yes")
        assert done.returncode != 0
        said = " ".join(done.stdout.split())
        assert "_dmarc.moor.example. TXT on 203.0.113.53 was changed by somebody else" in said, done.stdout
        assert "p=none" in said
    finally:
        knot(f"'\"{before}\"'")


def test_every_daemon_runs_and_none_was_restarted_by_its_death(lab: Lab) -> None:
    for host in lab.stack().all_hosts:
        failed = lab.run(host, "systemctl", "list-units", "--state=failed", "--no-legend", "--plain").stdout
        units = [line.split()[0] for line in failed.splitlines()]
        assert not units, f"{host}: {lab.run(host, 'systemctl', 'status', '--no-pager', '-n', '20', *units).stdout}"
