"""What the world finds in the stack's zones, and how the stack handles records that somebody else touched."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab.network import LAN4, RESOLVER
from services import mta_sts
from services.zones import RRset, rrsets
from tests.lab.conftest import Lab
from tests.lab.steps import knot

SERVER = "203.0.113.53"
ZONES = {"hill.example", "net.hill.example", "dale.example", "moor.example"}


def asked(lab: Lab, name: str, kind: str, *, server: str = SERVER) -> tuple[bool, list[str]]:
    """Whether an answer was validated, and its records as a host abroad sees them."""
    done = lab.run("foreign", "kdig", f"@{server}", "+dnssec", "+noall", "+header", "+answer", name, kind)
    flags = done.stdout.partition("Flags:")[2].partition(";")[0].split()
    lines = [line.split(None, 4) for line in done.stdout.splitlines() if line and not line.startswith(";")]
    return "ad" in flags, [line[4] for line in lines if line[3] == kind]


def values(rrset: RRset) -> set[str]:
    """The records of an RRset as kdig prints them."""

    def shown(record: str) -> str:
        return record.upper().replace(" ", "") if rrset.type == "TLSA" else record

    return {shown(record) for record in rrset.records}


def test_every_record_is_there_and_signed(lab: Lab) -> None:
    wanted = rrsets(lab.stack())
    script = "".join(f"{rrset.name} {rrset.type}\n" for rrset in wanted)
    # One process for all: a question a line.
    command = f"xargs -L 1 kdig @{SERVER} +noall +answer +tcp"
    answered = lab.run("foreign", "sh", "-c", command, text=script)
    assert answered.returncode == 0, answered.stderr
    there: dict[tuple[str, str], set[str]] = {}
    for line in answered.stdout.splitlines():
        if line and not line.startswith(";"):
            name, _, _, kind, data = line.split(None, 4)
            data = data.replace(" ", "") if kind == "TLSA" else data
            there.setdefault((name.rstrip("."), kind), set()).add(data)
    assert {(r.name, r.type): values(r) for r in wanted} == {
        (r.name, r.type): there.get((r.name, r.type), set()) for r in wanted
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hill.example", "MX"),
        ("_25._tcp.smtp-in.hill.example", "TLSA"),
        ("_mta-sts.dale.example", "TXT"),
        ("_imaps._tcp.moor.example", "SRV"),
        ("2.100.51.198.in-addr.arpa", "PTR"),
    ],
)
def test_a_resolver_finds_the_answer_signed(lab: Lab, name: str, kind: str) -> None:
    validated, records = asked(lab, name, kind, server=f"{LAN4}.{RESOLVER}")
    assert validated and records


def test_a_sender_that_demands_dane_finds_the_key_of_every_mx(lab: Lab) -> None:
    """What a Postfix with ``dane-only`` asks: the name, its TLSA records, and a handshake that fits one of them."""
    for address in ("198.51.100.2", "198.51.100.18", "198.51.100.34"):
        done = lab.run(
            "foreign",
            "sh",
            "-c",
            "posttls-finger -t 20 -l dane-only -L summary -c -P /etc/ssl/certs '[smtp-in.hill.example]' 2>&1",
        )
        assert "Verified TLS connection established" in done.stdout, (address, done.stdout)


# Mail programs and senders


def test_a_mail_program_finds_its_settings_by_the_users_domain(lab: Lab) -> None:
    for path in (
        "/mail/config-v1.1.xml?emailaddress=ann%40dale.example",
        "/.well-known/autoconfig/mail/config-v1.1.xml",
    ):
        answer = lab.client("web", server="autoconfig.dale.example", path=path)
        assert answer["status"] == 200 and answer["headers"]["content-type"].startswith("application/xml")
        provider = ElementTree.fromstring(answer["text"]).find("emailProvider")
        assert provider is not None
        assert "dale.example" in [domain.text for domain in provider.findall("domain")]
        told = [
            [server.findtext(part) for part in ("hostname", "port", "socketType", "username")]
            for kind in ("incomingServer", "outgoingServer")
            for server in provider.findall(kind)
        ]
        assert told == [
            ["imap.hill.example", "993", "SSL", "%EMAILADDRESS%"],
            ["smtp-out.hill.example", "465", "SSL", "%EMAILADDRESS%"],
            ["smtp-out.hill.example", "587", "STARTTLS", "%EMAILADDRESS%"],
        ]


def test_the_settings_that_a_mail_program_is_told_let_the_user_in(lab: Lab) -> None:
    text = lab.client("web", server="autoconfig.hill.example", path="/mail/config-v1.1.xml")["text"]
    provider = ElementTree.fromstring(text).find("emailProvider")
    assert provider is not None
    for outgoing in provider.findall("outgoingServer"):
        sent = lab.client(
            "submit",
            server=outgoing.findtext("hostname"),
            port=int(outgoing.findtext("port") or 0),
            user="ann@hill.example",
            password=lab.state.passwords["ann"],
            **{"from": "ann@hill.example", "to": "ben@hill.example", "subject": "Settings", "text": "They work.\n"},
        )
        assert "error" not in sent, sent
        read = lab.client(
            "fetch",
            server=provider.findtext("incomingServer/hostname"),
            user="ben@hill.example",
            password=lab.state.passwords["ben"],
            message_id=sent["message_id"],
        )
        assert read.get("copies") == 1, read


@pytest.mark.parametrize("path", ["/autodiscover/autodiscover.xml", "/Autodiscover/Autodiscover.xml"])
def test_outlook_is_answered_when_it_posts_its_question(lab: Lab, path: str) -> None:
    question = (
        '<?xml version="1.0" encoding="utf-8"?><Autodiscover xmlns="http://schemas.microsoft.com/exchange/'
        'autodiscover/outlook/requestschema/2006"><Request><EMailAddress>ann@moor.example</EMailAddress></Request>'
        "</Autodiscover>"
    )
    answer = lab.client("web", server="autodiscover.moor.example", path=path, body=question)
    assert answer["status"] == 200, answer
    space = "{http://schemas.microsoft.com/exchange/autodiscover/outlook/responseschema/2006a}"
    protocols = ElementTree.fromstring(answer["text"]).iter(f"{space}Protocol")
    told = [tuple(p.findtext(f"{space}{part}") for part in ("Type", "Server", "Port")) for p in protocols]
    assert told == [("IMAP", "imap.hill.example", "993"), ("SMTP", "smtp-out.hill.example", "465")]


def test_the_mta_sts_policy_is_the_one_whose_id_stands_in_dns(lab: Lab) -> None:
    stack = lab.stack()
    for domain in stack.domains:
        answer = lab.client("web", server=f"mta-sts.{domain}", path="/.well-known/mta-sts.txt")
        assert answer["status"] == 200 and answer["headers"]["content-type"].startswith("text/plain")
        assert answer["text"] == mta_sts.policy(stack)
        _, (record,) = asked(lab, f"_mta-sts.{domain}", "TXT")
        assert f"id={mta_sts.policy_id(stack)}" in record
        _, (mx,) = asked(lab, domain, "MX")
        assert f"mx: {mx.split()[1].rstrip('.')}\n" in answer["text"]


def test_nothing_but_the_documents_is_served_under_these_names(lab: Lab) -> None:
    for label, path in (("autoconfig", "/"), ("autodiscover", "/mail/config-v1.1.xml"), ("mta-sts", "/.well-known/")):
        assert lab.client("web", server=f"{label}.hill.example", path=path)["status"] == 404


# Records that somebody else touches


@contextmanager
def foreign_record(lab: Lab, zone: str, owner: str, kind: str, data: str) -> Iterator[None]:
    knot(lab, zone, f"zone-set {zone} {owner} 60 {kind} {data}")
    try:
        yield
    except BaseException:
        knot(lab, zone, f"zone-unset {zone} {owner} {kind}")
        raise


def silent(config: dict[str, Any]) -> None:
    config["dns"]["silent"] = ["park.dale.example"]
    config["dns"].setdefault("ttl", {})["submission"] = 61


def test_a_record_of_somebody_else_is_taken_over_by_an_explicit_word_alone(lab: Lab) -> None:
    before = lab.stack_file.read_text()
    try:
        lab.change(silent)
        with foreign_record(lab, "dale.example", "park", "MX", "'10 mx.far.example.'"):
            refused = lab.ops("up", lab.stack_name, "--yes")
            said = " ".join(refused.stdout.split())
            assert refused.returncode != 0
            assert "park.dale.example. MX is on 203.0.113.53 already, and not made by this stack" in said
            assert "make up ADOPT=park.dale.example./MX" in said
            assert asked(lab, "park.dale.example", "MX")[1] == ["10 mx.far.example."]
            lab.up("--adopt", "park.dale.example/MX")
            assert asked(lab, "park.dale.example", "MX")[1] == ["0 ."]
        # An alias that changes stays an alias.
        assert asked(lab, "smtp-out.hill.example", "CNAME")[1] == ["nginx0.hill.example."]
        # What was taken over is the stack's own from now on: it goes with the name, when deleting is meant.
        lab.stack_file.write_text(before)
        lab.change(lambda config: config["dns"].update(deletions={"share": 10}))
        refused = lab.ops("up", lab.stack_name, "--yes")
        assert refused.returncode == 1
        assert re.search(r"zone dale\.example: \d+ of \d+ RRsets would be deleted", refused.stdout), refused.stdout
        lab.up("--delete", "dale.example")
        assert asked(lab, "park.dale.example", "MX")[1] == []
        # The apex is its operator's.
        assert asked(lab, "dale.example", "NS")[1] and asked(lab, "dale.example", "SOA")[1]
    finally:
        lab.stack_file.write_text(before)


def test_a_word_for_a_record_that_the_stack_does_not_have_is_an_error(lab: Lab) -> None:
    done = lab.ops("up", lab.stack_name, "--yes", "--adopt", "www.dale.example/A")
    assert done.returncode == 1
    assert "ADOPT=www.dale.example/A: the stack publishes no such RRset" in done.stdout


def test_a_refresh_shows_what_somebody_changed_and_up_puts_it_right(unchanged: Lab) -> None:
    name, owner = "_smtp._tls.moor.example", "_smtp._tls"
    before = asked(unchanged, name, "TXT")[1]
    other = f"zone-set moor.example {owner} 3600 TXT '\"v=TLSRPTv1; rua=mailto:eve@far.example\"'"
    knot(unchanged, "moor.example", f"zone-unset moor.example {owner} TXT", other)
    done = unchanged.ops("refresh", unchanged.stack_name, "--yes")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"RRset {re.escape(name)}-TXT.*updated", done.stdout), done.stdout
    unchanged.up()
    assert asked(unchanged, name, "TXT")[1] == before


def test_up_stops_before_it_deletes_much_of_a_zone_and_says_how_to_go_on(lab: Lab) -> None:
    before = lab.stack_file.read_text()
    try:
        lab.change(lambda config: config["domains"].pop("moor.example"))
        refused = lab.ops("up", lab.stack_name, "--yes")
    finally:
        lab.stack_file.write_text(before)
    said = " ".join(refused.stdout.split())
    assert refused.returncode == 1 and "not started, nothing was changed" in said
    assert re.search(r"zone moor\.example: (\d+) of \1 RRsets would be deleted, 100 % where", said), said
    assert f"make up STACK={lab.stack_name} DELETE=moor.example" in said
    assert asked(lab, "moor.example", "MX")[1] == ["10 smtp-in.hill.example."]


def test_what_leads_the_world_in_is_published_last_and_removed_first(lab: Lab) -> None:
    """Pulumi deletes in the reverse order of dependencies: so they have to be in its state."""
    exported = lab.state.run_in(
        "operator",
        ["pulumi", "-C", str(lab.state.project), "stack", "export", "--stack", lab.stack_name],
        capture_output=True,
        text=True,
    )
    resources = json.loads(exported.stdout)["deployment"]["resources"]
    needs = {r["urn"].rpartition("::")[2]: r.get("dependencies", []) for r in resources}

    def behind(name: str) -> set[str]:
        return {urn.rpartition("::")[2] for urn in needs[name]}

    assert behind("hill.example-MX") >= {"smtp-in.hill.example-A", "smtp-in.hill.example-AAAA"}
    assert behind("_imaps._tcp.dale.example-SRV") >= {"nginx0.hill.example-A", "nginx0.hill.example-AAAA"}
    assert behind("autoconfig.dale.example-CNAME") >= {"nginx0.hill.example-A"}
    assert behind("moor.example-TXT") >= {"_spf.hill.example-TXT"}
    assert behind("_spf.hill.example-TXT") >= {"_spf4.hill.example-TXT", "_spf6.hill.example-TXT"}
    assert behind("smtp-in.hill.example-A") >= {"smtp-in-oak-files"}
    assert behind("11.1.18.198.in-addr.arpa-PTR") >= {"smtp-in.oak.net.hill.example-A"}
