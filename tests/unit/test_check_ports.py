"""What the check concludes from what ports say, from looks at hosts, and how it tells it."""

from __future__ import annotations

import base64
import copy
import datetime as dt
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from rich.console import Console

from check import causes, certificates, hosts, mailboxes, ports, report
from check.finding import Finding, Place, Severity, status
from check.look import former
from check.ports import FOREIGN, Endpoint
from check.ssh import Seen
from check.wire import Talk
from model.load import parse
from model.stack import Host, Stack
from services import identity

NOW = dt.datetime.now(dt.UTC)


def worst(findings: Iterable[Finding]) -> Finding:
    return min(findings, key=lambda finding: list(Severity).index(finding.severity))


def certificate_of(stack: Stack, host: str) -> str:
    pem = certificates.of_pem(stack.keys.public.hosts[host].certificate)
    return base64.b64encode(pem.public_bytes(Encoding.DER)).decode()


def good(stack: Stack, endpoint: Endpoint) -> Talk:
    """What a client meets at a port that is as it should be."""
    target = endpoint.target
    talk: Talk = {"connected": True, "error": "", "verified": target["tls"] != "none", "unverified": ""}
    if target["tls"] != "none":
        whose = endpoint.whose[0].name if endpoint.whose else endpoint.host.name
        talk |= {"version": "TLSv1.3", "certificate": certificate_of(stack, whose)}
    if target.get("versions"):
        talk |= {"old": "", "1.2": "TLSv1.2"}
    if target["protocol"] == "smtp":
        submission = endpoint.service == "submission"
        name = "smtp-out.hill.example" if submission else "smtp-in.hill.example"
        talk |= {
            "banner": f"{name} ESMTP Postfix",
            "before": ["STARTTLS"],
            "after": ["AUTH PLAIN"] if submission else [],
        }
        talk["replies"] = [
            [sender, to, 250, "ok"] if to.startswith("postmaster@") else [sender, to, 550, "no"]
            for sender, to in target["recipients"]
        ]
    if target["protocol"] == "imap":
        talk["banner"] = "* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] Dovecot ready."
    if endpoint.service == "web":
        talk |= {"status": 302, "headers": {"strict-transport-security": "max-age=1"}}
    if endpoint.service == "document":
        talk |= {"status": 200, "headers": {"content-type": endpoint.serves[0]}, "body": endpoint.serves[1]}
    if endpoint.service == "redirect":
        talk |= {"status": 301, "headers": {"location": "https://webmail.hill.example/"}}
    return talk


def silent() -> Talk:
    return {"connected": False, "error": "does not answer", "silent": True, "verified": False, "unverified": ""}


Talks = list[tuple[Endpoint, Talk]]


@pytest.fixture
def talks(keyed_stack: Stack) -> Talks:
    return [(endpoint, good(keyed_stack, endpoint)) for endpoint in ports.public(keyed_stack)]


def of(talks: Talks, host: str, port: int) -> Talk:
    return next(talk for e, talk in talks if e.host.name == host and e.target["port"] == port)


def judged(stack: Stack, talks: Talks) -> Finding:
    return worst(ports.judge(stack, talks, NOW))


# Ports


def test_every_public_port_at_every_address_is_asked(keyed_stack: Stack) -> None:
    asked = {(e.host.name, e.target["port"], e.family) for e in ports.public(keyed_stack)}
    assert len(asked) == 3 * 2 * 2 + 3 * 5 * 2
    assert not any(e.host.site == "elm" for e in ports.public(keyed_stack, ["elm"]))


def test_hosts_are_asked_by_those_who_may_and_by_nobody_else(keyed_stack: Stack) -> None:
    asked = ports.internal(keyed_stack, ports.listens_of(keyed_stack))
    to_mailboxes = {name for name, own in asked.items() for e in own if e.target["port"] == 25 and e.host.name != name}
    assert to_mailboxes == {"smtp-in-oak", "smtp-in-elm", "smtp-in-ash"}
    proxied = {name for name, own in asked.items() for e in own if e.target.get("proxy")}
    assert proxied == {"frontend-oak", "frontend-elm", "frontend-ash"}


def test_ports_as_they_should_be_are_good(keyed_stack: Stack, talks: Talks) -> None:
    assert {finding.severity for finding in ports.judge(keyed_stack, talks, NOW)} == {Severity.GOOD}


@pytest.mark.parametrize(
    ("reply", "severity", "said"),
    [
        (["", FOREIGN, 250, "ok"], Severity.WRONG, "takes mail to others from anybody"),
        (["ann@hill.example", FOREIGN, 250, "ok"], Severity.WRONG, "takes mail for ann@hill.example to others"),
        (["", FOREIGN, 451, "later"], Severity.UNKNOWN, "whether it relays"),
        (["", "no-such-1@hill.example", 250, "ok"], Severity.WRONG, "an address that hill.example does not have"),
        (["", "postmaster@hill.example", 550, "no"], Severity.WRONG, "does not take mail for postmaster@hill.example"),
        (["", "postmaster@hill.example", 554, "blocked using x"], Severity.UNKNOWN, "blocked using x"),
    ],
)
def test_what_an_mx_says_to_strangers(
    keyed_stack: Stack, talks: Talks, reply: list[Any], severity: Severity, said: str
) -> None:
    of(talks, "smtp-in-oak", 25)["replies"] = [reply]
    found = judged(keyed_stack, talks)
    assert found.severity is severity and said in found.what
    assert found.where == "smtp-in-oak 198.51.100.2 port 25"


def test_a_policy_that_is_not_the_stack_s_is_shown(keyed_stack: Stack, talks: Talks) -> None:
    talk = next(talk for e, talk in talks if e.target["name"] == "mta-sts.dale.example")
    talk["body"] = "version: STSv1\nmode: enforce\nmx: mx.elsewhere.example\nmax_age: 1\n"
    found = judged(keyed_stack, talks)
    assert found.severity is Severity.WRONG and "mx: mx.elsewhere.example" in found.what
    assert "https://mta-sts.dale.example/.well-known/mta-sts.txt" in found.what


@pytest.mark.parametrize(
    ("host", "port", "change", "said"),
    [
        ("smtp-in-elm", 25, {"old": "TLSv1.1"}, "still speaks TLSv1.1"),
        ("smtp-in-elm", 25, {"after": ["AUTH PLAIN"]}, "offers AUTH, where passwords are guessed"),
        ("smtp-in-elm", 25, {"banner": "localhost ESMTP"}, "greets as localhost ESMTP"),
        ("frontend-oak", 587, {"before": ["AUTH PLAIN"]}, "takes passwords in clear"),
        ("frontend-oak", 587, {"after": []}, "nobody can submit mail"),
        ("frontend-oak", 465, {"after": []}, "nobody can submit mail"),
        ("smtp-in-oak", 465, {"after": ["AUTH PLAIN"]}, "offers AUTH, where passwords are guessed"),
        ("frontend-oak", 993, {"banner": "* OK [CAPABILITY LOGINDISABLED]"}, "lets nobody log in"),
        ("frontend-oak", 993, {"verified": False, "unverified": "hostname mismatch"}, "hostname mismatch"),
        ("frontend-oak", 443, {"status": 502}, "answers with 502"),
        ("frontend-oak", 80, {"headers": {}}, "does not lead to HTTPS"),
        ("frontend-oak", 993, {"error": "closes the connection"}, "closes the connection"),
    ],
)
def test_what_is_wrong_with_a_port(
    keyed_stack: Stack, talks: Talks, host: str, port: int, change: dict[str, Any], said: str
) -> None:
    of(talks, host, port).update(change)
    found = judged(keyed_stack, talks)
    assert found.severity is Severity.WRONG and said in found.what and found.where.startswith(host)


def test_a_port_that_has_no_public_certificate_yet_is_waited_for(keyed_stack: Stack, talks: Talks) -> None:
    unverified = "unable to get local issuer certificate"
    of(talks, "smtp-in-elm", 25).update(verified=False, unverified=unverified)
    found = judged(keyed_stack, talks)
    assert found.severity is Severity.ADVICE and "journalctl -u posthorn-certificate on smtp-in-elm" in found.advice


def test_a_key_of_another_host_is_not_taken_for_its_own(keyed_stack: Stack, talks: Talks) -> None:
    of(talks, "smtp-in-oak", 25)["certificate"] = certificate_of(keyed_stack, "smtp-in-elm")
    assert "its key is none that the stack has for it" in judged(keyed_stack, talks).what


def test_an_mx_that_is_silent_while_others_answer_is_wrong(keyed_stack: Stack, talks: Talks) -> None:
    gone = [(e, silent() if e.host.name == "smtp-in-elm" else talk) for e, talk in talks]
    found = [f for f in ports.judge(keyed_stack, gone, NOW) if f.severity is not Severity.GOOD]
    assert len(found) == 1 and found[0].severity is Severity.WRONG
    assert found[0].what == "answers on none of its ports (25, 465), while others do"
    assert "WITHOUT=elm" in found[0].advice


def test_being_turned_away_for_asking_too_often_is_nobody_s_fault(keyed_stack: Stack, talks: Talks) -> None:
    said = "greets with 421 4.7.0 smtp-out.hill.example Error: too many connections from 203.0.113.10"
    of(talks, "frontend-oak", 587).update(connected=False, error=said)
    found = judged(keyed_stack, talks)
    assert found.severity is Severity.UNKNOWN and found.advice == "ask again in a minute"


def test_a_port_that_is_silent_everywhere_may_be_shut_where_we_are(keyed_stack: Stack, talks: Talks) -> None:
    gone = [(e, silent() if e.target["port"] == 25 else talk) for e, talk in talks]
    found = judged(keyed_stack, gone)
    assert found.severity is Severity.UNKNOWN and "port 25 answers nowhere" in found.what
    assert "run this from elsewhere" in found.advice


def test_where_nothing_is_reached_nothing_is_called_wrong(keyed_stack: Stack, talks: Talks) -> None:
    found = ports.judge(keyed_stack, [(e, silent()) for e, _ in talks], NOW)
    assert {finding.severity for finding in found} == {Severity.UNKNOWN}


def test_an_open_port_that_is_not_for_the_internet_is_wrong(keyed_stack: Stack) -> None:
    shut = list(ports.shut(keyed_stack, ports.listens_of(keyed_stack)))
    tried = {e.target["port"] for e in shut if e.host.name == "smtp-in-oak"}
    assert {143, 6379, 10587, 11333, 587} <= tried and not tried & {22, 25, 465}
    assert worst(ports.judge_shut(shut[0], {"connected": True})).severity is Severity.WRONG


# Certificates


@pytest.mark.parametrize(("days", "severity"), [(-2, "wrong"), (3, "wrong"), (15, "advice"), (60, "good")])
def test_a_certificate_is_renewed_in_time(keyed_stack: Stack, days: int, severity: str) -> None:
    certificate = certificates.of_pem(keyed_stack.keys.public.hosts["smtp-in-oak"].certificate)
    now = certificate.not_valid_after_utc - dt.timedelta(days=days)
    found = worst(certificates.judge_days(Place("ports", "x"), keyed_stack, certificate, now, "its certificate"))
    assert found.severity == severity
    assert severity == "good" or "make keys STACK=lab" in found.advice


def test_a_tlsa_record_means_one_key(keyed_stack: Stack) -> None:
    oak, elm = (certificates.of_pem(keyed_stack.keys.public.hosts[f"smtp-in-{s}"].certificate) for s in ("oak", "elm"))
    record = f"3 1 1 {hashlib.sha256(certificates.public_key(oak)).hexdigest()}"
    assert certificates.matches_tlsa(record, oak) and not certificates.matches_tlsa(record, elm)


# Hosts


@pytest.fixture
def host(keyed_stack: Stack) -> Host:
    return keyed_stack.all_hosts["smtp-in-oak"]


def renewal(of: str = "", at: str = NOW.isoformat(), **more: Any) -> dict[str, Any]:
    """The status of renewals that went well just before the look, but for one."""
    well = {"failures": 0, "error": None, "ends": "2030-01-01T00:00:00+00:00", "tried": at}
    return {"tried": at, "certificates": {"": well, "hill.example": well} | {of: well | more}}


def look(**more: Any) -> Seen:
    """A look at a host that is well."""
    well: dict[str, Any] = {
        "failed": {},
        "time": NOW.timestamp(),
        "machine": {"container": "", "memory": 100, "available": 60, "load": 0.1, "processors": 2, "release": "12.1"},
        "clock": {"synchronized": True},
        "disks": [{"path": "/", "size": 100, "free": 50, "inodes": 100, "free_inodes": 50}],
        "units": {"failed": [], "restarts": {}},
        "replaced": [],
        "logins": {"passwordauthentication": "no", "kbdinteractiveauthentication": "no"},
        "drift": {"changed": [], "left_over": [], "not_active": [], "behind": [], "lines": {}},
        "health": {"asked": 3, "wrong": []},
        "queue": {"count": {}, "oldest": 0, "reasons": []},
        "lessons": {},
        "packages": {"versions": {"postfix": "3.7.11-0"}, "lists": 0.0, "security": [], "reboot": False},
        "certificates": {},
    }
    return Seen(report=well | more)


def test_a_host_that_is_well_is_good(keyed_stack: Stack, host: Host) -> None:
    found = hosts.judge(keyed_stack, host, look(), NOW)
    assert {finding.severity for finding in found} == {Severity.GOOD, Severity.NOTE}


@pytest.mark.parametrize(
    ("seen", "severity", "said"),
    [
        ({"units": {"failed": ["postfix@-.service"], "restarts": {}}}, "wrong", "postfix@-.service has failed"),
        ({"units": {"failed": [], "restarts": {"x": 3}}}, "advice", "x died and was started again, 3 times"),
        ({"disks": [{"path": "/", "size": 100, "free": 2, "inodes": 9, "free_inodes": 9}]}, "wrong", "2 B of 100 B"),
        (
            {"disks": [{"path": "/", "size": 9, "free": 9, "inodes": 100, "free_inodes": 9}]},
            "advice",
            "9 of 100 inodes",
        ),
        (
            {"queue": {"count": {"deferred": 1}, "oldest": 90000, "reasons": [["why", 1]]}},
            "wrong",
            "for 25 hours (why)",
        ),
        ({"queue": {"count": {"deferred": 3}, "oldest": 7200, "reasons": []}}, "advice", "3 mails wait"),
        ({"queue": {"count": {"hold": 2}, "oldest": 1, "reasons": []}}, "advice", "2 mails are held"),
        ({"lessons": {"frontend-oak": {"count": 2, "oldest": 8000}}}, "advice", "2 lessons for frontend-oak wait"),
        ({"replaced": ["/usr/sbin/nginx"]}, "advice", "nginx: the old program still runs"),
        (
            {"logins": {"passwordauthentication": "yes", "kbdinteractiveauthentication": "no"}},
            "wrong",
            "its SSH server takes passwords (passwordauthentication yes)",
        ),
        (
            {"health": {"asked": 1, "wrong": [{"service": "x", "kind": "smtp", "port": 25, "said": "no"}]}},
            "wrong",
            "x on port 25: no",
        ),
        ({"renewal": renewal(failures=1, error="it is down")}, "advice", "was not renewed, once: it is down"),
        ({"renewal": renewal(failures=6, error="no")}, "advice", "was not renewed, 6 times: no"),
        ({"renewal": renewal(failures=7, error="no")}, "wrong", "was not renewed, 7 times: no"),
        ({"renewal": renewal(failures=1, error="no", ends=None)}, "wrong", "was not renewed, once: no"),
        (
            {"renewal": renewal(of="dale.example", failures=7, error="its zone is gone")},
            "wrong",
            "its public certificate for the names of dale.example was not renewed, 7 times: its zone is gone",
        ),
        ({"renewal": renewal(at="2020-01-01T00:00:00+00:00")}, "wrong", "nobody has looked after its public"),
        # As a host says it whose program is the one before.
        ({"renewal": {"failures": 7, "error": "no", "ends": None, "tried": NOW.isoformat()}}, "wrong", "7 times: no"),
        ({"failed": {"disks": "OSError: no"}}, "unknown", "its disks: OSError: no"),
    ],
)
def test_what_is_wrong_with_a_host(
    keyed_stack: Stack, host: Host, seen: dict[str, Any], severity: str, said: str
) -> None:
    found = worst(hosts.judge(keyed_stack, host, look(**seen), NOW))
    assert found.severity == severity and said in found.what and found.advice


def test_a_certificate_that_was_never_asked_for_counts_as_none(keyed_stack: Stack, host: Host) -> None:
    seen = renewal()
    seen["certificates"] |= {"dale.example": {}, "moor.example": {}}
    found = hosts.judge(keyed_stack, host, look(renewal=seen), NOW)
    assert "looks after its public certificates (2)" in [finding.what for finding in found]
    assert worst(found).what == "2 of its public certificates were not yet asked for"


def test_the_certificate_of_a_domain_that_left_is_not_looked_at(keyed_stack: Stack, host: Host) -> None:
    text, late = keyed_stack.keys.public.hosts[host.name].certificate, NOW + dt.timedelta(days=36500)
    left = identity.public("left.example")
    found = hosts.judge(keyed_stack, host, look(certificates={identity.PUBLIC: text, left: text}), late)
    wrong = [finding.what for finding in found if finding.severity is Severity.WRONG]
    assert len(wrong) == 1 and wrong[0].startswith(f"{identity.PUBLIC} ended ")


def test_a_file_that_was_changed_by_hand_is_shown_with_its_lines(keyed_stack: Stack, host: Host) -> None:
    path = "/etc/postfix/main.cf"
    drift = {"changed": [path], "left_over": [], "not_active": [], "behind": [], "lines": {path: ["+mynetworks = 0/0"]}}
    found = worst(hosts.judge(keyed_stack, host, look(drift=drift), NOW))
    assert found.severity is Severity.WRONG and found.what == f"{path} is not what the stack says: +mynetworks = 0/0"


def test_a_clock_that_is_wrong_is_said_how(keyed_stack: Stack, host: Host) -> None:
    seen = look()
    found = worst(hosts.judge(keyed_stack, host, Seen(report=seen.report, offset=-12.0), NOW))
    assert found.what == "its clock is 12 s behind"


@pytest.mark.parametrize(
    ("kind", "others", "severity"),
    [
        ("silent", False, "unknown"),
        ("silent", True, "wrong"),
        ("refused", True, "wrong"),
        ("key", False, "wrong"),
        ("login", False, "unknown"),
    ],
)
def test_a_host_that_is_not_reached_may_be_our_own_fault(
    keyed_stack: Stack, host: Host, kind: str, others: bool, severity: str
) -> None:
    found = worst(hosts.judge_reach(keyed_stack, host, Seen(error="e", kind=kind), others=others))
    assert found.severity == severity and found.advice


def test_a_host_that_lags_behind_in_versions_is_named() -> None:
    stack_of = {name: look().report for name in ("a", "b", "c")}
    old = look(packages={"versions": {"postfix": "3.7.9-0"}}).report
    found = worst(hosts.judge_versions(None, {**stack_of, "d": old}))  # type: ignore[arg-type, dict-item]
    assert found.what == "postfix is 3.7.11-0 on most hosts, and 3.7.9-0 on d"


# Mailboxes


def state(**more: Any) -> dict[str, Any]:
    """What the sync service of a mailbox host says when all is well: docs/replication.md."""
    return {
        "format": 1,
        "ok": True,
        "time": 10_000.0,
        "refused": None,
        "peer": {"name": "maildrop.elm.net.hill.example", "up": True, "since": 1_000.0},
        "pending": {"users": 0, "to_hand_over": 0, "oldest_seconds": 0.0},
        "waiting": {},
        "stuck": [],
        "lag_seconds": {"p95": 0.09},
        "pass": {"at": 9_800.0, "users": 2, "left": 0},
        "audit": {"at": 9_000.0, "differences": {}},
    } | more


@pytest.mark.parametrize(
    ("change", "severity", "said"),
    [
        ({}, "good", "all changes are at the other host, 95 % within 0.09 s"),
        ({"refused": "the store is another's"}, "wrong", "nothing is synced: the store is another's"),
        ({"peer": {"name": "elm", "up": False, "since": 400.0}}, "wrong", "elm does not answer it for 3 hours"),
        (
            {"ok": False, "stuck": ["ann"], "waiting": {"ann": {"said": "no space"}}},
            "wrong",
            "the mailbox of ann does not sync: no space",
        ),
        ({"audit": {"at": 1.0, "differences": {"ben": "INBOX"}}}, "wrong", "ben differs at the two hosts: INBOX"),
        ({"pending": {"users": 3, "oldest_seconds": 90.0}}, "advice", "3 users have changes"),
        ({"pending": {"users": 3, "oldest_seconds": 900.0}}, "wrong", "3 users have changes"),
        ({"pass": {"at": 9_800.0, "users": 1, "left": 0}}, "advice", "the last pass saw 1 users"),
    ],
)
def test_the_state_of_the_mailboxes(keyed_stack: Stack, change: dict[str, Any], severity: str, said: str) -> None:
    found = worst(mailboxes.judge(keyed_stack, {"maildrop-oak": state(**change)}))
    assert found.severity == severity and said in found.what


def test_a_mailbox_whose_account_is_gone_is_told_with_the_words_that_remove_it() -> None:
    home = {"size": 3 * 1024 * 1024, "changed": 0.0}
    reports: dict[str, Any] = {name: {"time": 864000.0, "former": {"carl": home}} for name in ("oak", "elm")}
    (found,) = mailboxes.judge_former({**reports, "smtp-in-oak": {"time": 1.0, "former": {}}, "ash": {"time": 1.0}})
    assert (found.where, found.severity) == ("carl", Severity.NOTE)
    said = "3 MiB, unchanged for 10 days"
    assert found.what == f"a mailbox without an account is kept: {said} at elm; {said} at oak"
    assert found.advice.endswith("to remove it for good, at elm and at oak: rm -r /var/vmail/users/carl")


def test_homes_without_an_account_are_seen_with_all_that_is_in_them(tmp_path: Path) -> None:
    for name in ("ann", "carl"):
        (tmp_path / name / "mdbox").mkdir(parents=True)
        (tmp_path / name / "mdbox" / "m.1").write_text("x" * 10_000)
    seen = former({"homes": str(tmp_path), "accounts": ["ann"]})
    assert list(seen) == ["carl"] and 10_000 <= seen["carl"]["size"] < 30_000
    assert former({"homes": "", "accounts": []}) == {}


def test_an_account_that_nobody_can_write_to_is_told(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["accounts"] |= dict.fromkeys(("carl", "dora", "emil"), config["accounts"]["ann"])
    config["domains"]["hill.example"]["aliases"]["d"] = "dora+x"
    config["domains"]["dale.example"]["aliases"]["e"] = ["ann", "emil+y@maildrop.net.hill.example"]
    (found,) = mailboxes.judge_addresses(parse("lab", "Pulumi.lab.yaml", config))
    assert found.where == "carl" and "no alias of any domain leads to it" in found.what


# Telling


FOUND = [
    Place("records", "hill.example").good("hill.example MX"),
    Place("hosts", "a").note("a container"),
    Place("hosts", "b").note("a container"),
    Place("ports", "x port 25").wrong("an open relay", "stop it"),
]


def test_the_exit_status_says_the_worst() -> None:
    unknown = Place("ports", "y").unknown("silent", "go elsewhere")
    assert status(FOUND[:3]) == 0
    assert status([*FOUND[:3], unknown]) == 2
    assert status([*FOUND, unknown]) == 1
    assert status([Place("hosts", "a").better("x", "y")]) == 0


def test_people_see_what_is_wrong_and_what_to_do_and_the_rest_in_a_line() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table("lab", FOUND, 1.0))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert "✓ records         1 good at 1 place" in lines
    assert "·   a and 1 other a container" in lines
    assert "✗   x port 25     an open relay" in lines and "                  → stop it" in lines
    assert lines[-1] == "lab: 1 wrong, 1 good (1.0 s)"


def test_one_command_mends_what_is_wrong_at_several_hosts_alike() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    hosts = [Place("hosts", name).wrong("changed", f"make up PUSH={name}") for name in ("oak", "elm", "ash")]
    console.print(report.table("lab", hosts, 1.0))
    text = console.export_text()
    assert "ash and 2 others" in text and "→ make up PUSH=ash,elm,oak" in text


def test_machines_get_everything() -> None:
    document = json.loads(report.as_json("lab", FOUND, 1.0))
    assert document["result"] == "wrong" and document["counts"]["note"] == 2
    assert document["findings"][3] == {
        "severity": "wrong",
        "area": "ports",
        "where": "x port 25",
        "what": "an open relay",
        "advice": "stop it",
        "cause": "",
    }


def test_prometheus_gets_counts() -> None:
    text = report.as_metrics("lab", FOUND, 1.0)
    assert 'posthorn_check_findings{stack="lab",area="ports",severity="wrong"} 1' in text.splitlines()


# One cause


def ill(findings: list[Finding]) -> dict[str, str]:
    """What is not good, by its words, with what explains it."""
    return {f.what: f.cause for f in causes.named(findings) if f.severity not in (Severity.GOOD, Severity.NOTE)}


def idle(*units: str) -> dict[str, Any]:
    return {"changed": [], "left_over": [], "not_active": list(units), "behind": [], "lines": {}}


def test_a_port_that_refuses_is_explained_by_the_daemon_that_does_not_run(keyed_stack: Stack) -> None:
    front, asks = keyed_stack.all_hosts["frontend-ash"], keyed_stack.all_hosts["smtp-in-ash"]
    probes = [
        {"service": service, "kind": "http", "port": port, "said": "refuses the connection"}
        for service, port in (("rspamd", 11334), ("frontend", 993))
    ]
    seen = look(drift=idle("rspamd.service"), health={"asked": 3, "wrong": probes})
    target = ports._hop(keyed_stack, front, 11333)
    assert target is not None
    hop = Endpoint(front, "hop", target, ports.BETWEEN, asks.name, (front,))
    refuses: Talk = {"connected": False, "refused": True, "error": "refuses the connection"}
    hangs: Talk = {"connected": False, "error": "closes the connection"}
    found = hosts.judge(keyed_stack, front, seen, NOW) + ports.judge(keyed_stack, [(hop, refuses)], NOW)
    because = "frontend-ash: rspamd.service does not run"
    assert ill(found) == {
        "rspamd.service does not run": "",
        "refuses the connection": because,
        "rspamd on port 11334: refuses the connection": because,
        # It has nothing to do with that.
        "frontend on port 993: refuses the connection": "",
    }
    assert (
        ill(hosts.judge(keyed_stack, front, seen, NOW) + ports.judge(keyed_stack, [(hop, hangs)], NOW))[
            "closes the connection"
        ]
        == ""
    ), "a daemon that does not run closes nothing"


def test_a_full_disk_explains_what_the_queue_on_it_refuses_and_nothing_else(keyed_stack: Stack, host: Host) -> None:
    def full(path: str) -> list[Finding]:
        disk = {"path": path, "size": 100, "free": 0, "inodes": 9, "free_inodes": 9}
        mx = next(e for e in ports.public(keyed_stack) if e.host == host and e.service == "mx")
        replies = [("", "postmaster@hill.example", 452, "4.3.1 Insufficient system storage")]
        findings = hosts.judge(keyed_stack, host, look(disks=[disk]), NOW)
        for sender, recipient, code, text in replies:
            findings += ports._reply(mx.place, sender, recipient, code, text, (causes.queue(host),))
        return findings

    what = "does not take mail for postmaster@hill.example: 452 4.3.1 Insufficient system storage"
    for path in ("/", "/var/spool/postfix"):
        assert ill(full(path))[what] == f"{host.name}: {path}: 0 B of 100 B free"
    assert ill(full("/tmp"))[what] == ""


def test_what_follows_from_a_unit_that_failed_follows_from_its_failure(keyed_stack: Stack, host: Host) -> None:
    probe = {"service": "opendkim", "kind": "listen", "port": 8891, "said": "nobody listens"}
    units = {"failed": ["opendkim.service"], "restarts": {}}
    seen = look(drift=idle("opendkim.service"), units=units, health={"asked": 3, "wrong": [probe]})
    first = f"{host.name}: opendkim.service has failed"
    assert ill(hosts.judge(keyed_stack, host, seen, NOW)) == {
        "opendkim.service has failed": "",
        "opendkim.service does not run": first,
        "opendkim on port 8891: nobody listens": first,
    }


def test_a_data_disk_that_is_not_mounted_explains_the_paths_that_are_kept_on_it(keyed_stack: Stack) -> None:
    front, mounts = keyed_stack.all_hosts["frontend-oak"], ("data.mount", "var-lib-acme.mount")
    units = {"failed": ["data.mount"], "restarts": {}}
    found = ill(hosts.judge(keyed_stack, front, look(drift=idle(*mounts, "nginx.service"), units=units), NOW))
    because = "frontend-oak: data.mount has failed"
    assert found == {
        "data.mount has failed": "",
        **{f"{mount} does not run": because for mount in mounts},
        "nginx.service does not run": "",
    }


def test_the_report_tells_what_follows_below_its_cause_and_counts_it_apart() -> None:
    cause = Place("hosts", "a").wrong("x does not run", "start it", explains=("x",))
    effects = [Place("ports", f"a port {n}").wrong("refuses", "see why", ("x",)) for n in range(5)]
    found = causes.named([cause, *effects, Place("ports", "b").good("answers")])
    console = Console(width=200)
    with console.capture() as printed:
        console.print(report.table("s", found, 1.0))
    lines = [line.strip() for line in printed.get().splitlines()]
    at = next(n for n, line in enumerate(lines) if line.endswith("x does not run"))
    assert lines[at + 1 : at + 6] == [
        "→ start it",
        *(f"so: a port {n}: refuses" for n in range(3)),
        "and 2 more",
    ]
    assert lines[-1] == "s: 1 wrong, 5 that follow from it, 1 good (1.0 s)" and status(found) == 1
    told = json.loads(report.as_json("s", found, 1.0))
    assert [f["cause"] for f in told["findings"] if f["area"] == "ports" and f["severity"] == "wrong"] == [
        "a: x does not run"
    ] * 5
