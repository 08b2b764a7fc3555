"""Every record of every kind, and every reason for which records are refused."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from model.base import StackError
from model.load import load, parse
from model.stack import Stack
from ops.keys import certificates_without_names
from ops.pulumi import OperatorError, Project
from ops.records import RRSET, adopted, too_many_deletions
from ops.records import published as seen
from services import mta_sts
from services.bundle import bundle
from services.zones import RRset, record_problems, rrsets, text
from services.zones.validators import problems_of, removed_from_dmarc
from tests.unit.conftest import STACKS

Found = dict[tuple[str, str], RRset]


def published(stack: Stack) -> Found:
    return {(rrset.name, rrset.type): rrset for rrset in rrsets(stack)}


def strings(record: str) -> str:
    """A TXT record as its readers see it: all strings, joined without a space."""
    return "".join(part for index, part in enumerate(record.split('"')) if index % 2)


def texts(records: Found, name: str) -> list[str]:
    return [strings(record) for record in records[name, "TXT"].records]


@pytest.fixture(scope="module")
def records(keyed_stack: Stack) -> Found:
    return published(keyed_stack)


@pytest.fixture
def changed(keyed_config: dict[str, Any]) -> Callable[[Callable[[dict[str, Any]], Any]], Stack]:
    """The lab's stack with something changed."""

    def change(edit: Callable[[dict[str, Any]], Any]) -> Stack:
        config = copy.deepcopy(keyed_config)
        edit(config)
        return parse("lab", "Pulumi.lab.yaml", config)

    return change


Changed = Callable[[Callable[[dict[str, Any]], Any]], Stack]


# Every kind


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("dale.example", "MX", ["10 smtp-in.hill.example."]),
        ("dale.example", "TXT", ['"v=spf1 include:_spf.hill.example -all"']),
        ("smtp-in.hill.example", "TXT", ['"v=spf1 include:_spf.hill.example -all"']),
        ("egress.hill.example", "TXT", ['"v=spf1 include:_spf.hill.example -all"']),
        ("nginx0.hill.example", "TXT", ['"v=spf1 -all"']),
        ("nginx0.hill.example", "MX", ["0 ."]),
        ("gw.oak.hill.example", "MX", ["0 ."]),
        ("_dmarc.dale.example", "TXT", ['"v=DMARC1; p=reject; rua=mailto:postmaster@hill.example"']),
        ("_smtp._tls.dale.example", "TXT", ['"v=TLSRPTv1; rua=mailto:postmaster@hill.example"']),
        ("mta-sts.dale.example", "CNAME", ["nginx0.hill.example."]),
        ("autoconfig.dale.example", "CNAME", ["nginx0.hill.example."]),
        ("autodiscover.dale.example", "CNAME", ["nginx0.hill.example."]),
        ("imap.hill.example", "CNAME", ["nginx0.hill.example."]),
        ("smtp-out.hill.example", "CNAME", ["nginx0.hill.example."]),
        ("webmail.hill.example", "CNAME", ["nginx0.hill.example."]),
        ("_submissions._tcp.dale.example", "SRV", ["0 1 465 nginx0.hill.example."]),
        ("_submission._tcp.dale.example", "SRV", ["10 1 587 nginx0.hill.example."]),
        ("_imaps._tcp.dale.example", "SRV", ["0 1 993 nginx0.hill.example."]),
        ("_sieve._tcp.dale.example", "SRV", ["0 1 4190 nginx0.hill.example."]),
        ("_imap._tcp.dale.example", "SRV", ["0 0 0 ."]),
        ("_pop3._tcp.dale.example", "SRV", ["0 0 0 ."]),
        ("_pop3s._tcp.dale.example", "SRV", ["0 0 0 ."]),
        ("smtp-in.oak.net.hill.example", "A", ["198.18.1.11"]),
        ("smtp-in.oak.net.hill.example", "AAAA", ["2001:db8:1:1::11"]),
        ("smtp-in.net.hill.example", "A", ["198.18.1.11", "198.18.2.11", "198.18.3.11"]),
        ("2.100.51.198.in-addr.arpa", "PTR", ["smtp-in.hill.example."]),
        ("3.100.51.198.in-addr.arpa", "PTR", ["nginx0.hill.example."]),
        ("130.100.51.198.in-addr.arpa", "PTR", ["gw.elm.hill.example."]),
        ("11.1.18.198.in-addr.arpa", "PTR", ["smtp-in.oak.net.hill.example."]),
    ],
)
def test_a_record_is_published(records: Found, name: str, kind: str, expected: list[str]) -> None:
    assert list(records[name, kind].records) == expected


def test_every_domain_has_the_same_kinds_of_records(keyed_stack: Stack, records: Found) -> None:
    def below(domain: str) -> set[tuple[str, str]]:
        others = [d for d in ("net.hill.example", *keyed_stack.domains) if d != domain]
        own = {"_dmarc", "_domainkey", "_tcp", "_tls", "_mta-sts", "mta-sts", "autoconfig", "autodiscover"}
        return {
            (name.removesuffix(domain), kind)
            for name, kind in records
            if name == domain or (name.endswith(f".{domain}") and name.removesuffix(f".{domain}").split(".")[-1] in own)
            if not any(name.endswith(other) for other in others) and "._report." not in name
        }

    assert below("hill.example") == below("dale.example") == below("moor.example")


@pytest.mark.parametrize(
    ("name", "kind", "seconds"),
    [
        ("smtp-in.hill.example", "A", 60),
        ("smtp-in.net.hill.example", "A", 60),
        ("imap.hill.example", "CNAME", 60),
        # A key could not be replaced in minutes if others remembered it for a day.
        ("_25._tcp.smtp-in.hill.example", "TLSA", 60),
        ("nginx0.hill.example", "A", 600),
        ("smtp-out.hill.example", "CNAME", 3600),
        ("dale.example", "MX", 86400),
        ("_dmarc.dale.example", "TXT", 3600),
        ("smtp-in.oak.net.hill.example", "A", 300),
        ("2.100.51.198.in-addr.arpa", "PTR", 300),
    ],
)
def test_a_record_is_remembered_as_long_as_is_good_for_it(records: Found, name: str, kind: str, seconds: int) -> None:
    assert records[name, kind].ttl == seconds


def test_an_mx_is_known_by_the_key_of_every_host_that_serves_it(keyed_stack: Stack, records: Found) -> None:
    def digest(host: str) -> str:
        certificate = x509.load_pem_x509_certificate(keyed_stack.keys.public.hosts[host].certificate.encode())
        key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return f"3 1 1 {hashlib.sha256(key).hexdigest()}"

    tlsa = records["_25._tcp.smtp-in.hill.example", "TLSA"]
    assert set(tlsa.records) == {digest(f"smtp-in-{site}") for site in ("oak", "elm", "ash")}
    assert tlsa.phase == "internal", "a key is published before it serves"
    assert records["_25._tcp.maildrop.elm.net.hill.example", "TLSA"].records == (digest("maildrop-elm"),)


def test_each_name_that_an_mx_leads_to_has_a_tlsa_record(records: Found) -> None:
    targets = {r.split()[1].rstrip(".") for (_, kind), s in records.items() if kind == "MX" for r in s.records}
    for target in targets - {""}:
        assert (f"_25._tcp.{target}", "TLSA") in records


def test_the_id_of_the_policy_follows_its_content(keyed_stack: Stack, records: Found, changed: Changed) -> None:
    (value,) = texts(records, "_mta-sts.hill.example")
    assert re.fullmatch(r"v=STSv1; id=[a-z0-9]{1,32}", value)
    other = changed(lambda c: c["service"].setdefault("names", {}).update(smtp_in="mx"))
    assert texts(published(other), "_mta-sts.hill.example") != [value]
    assert f"mx: {keyed_stack.public_name('smtp_in')}\n" in mta_sts.policy(keyed_stack)


def test_front_ends_serve_what_is_looked_up_under_names_that_their_certificate_holds(keyed_stack: Stack) -> None:
    host = keyed_stack.all_hosts["frontend-elm"]
    files = bundle(keyed_stack, host)["files"]
    served = files["/etc/nginx/discovery.conf"]["content"]
    for domain in keyed_stack.domains:
        for label in ("mta-sts", "autoconfig", "autodiscover"):
            assert f"{label}.{domain}" in served
            assert f"{label}.{domain}" in keyed_stack.certificate_names(host)
    policy = files["/usr/local/share/posthorn/mta-sts/.well-known/mta-sts.txt"]["content"]
    assert policy == mta_sts.policy(keyed_stack)


def test_every_target_of_an_srv_record_is_in_the_certificates_behind_it(keyed_stack: Stack, records: Found) -> None:
    behind = {"_submissions": "smtp-out", "_submission": "smtp-out", "_imaps": "maildrop", "_sieve": "maildrop"}
    for name, role in behind.items():
        target = records[f"{name}._tcp.hill.example", "SRV"].records[0].split()[-1].rstrip(".")
        for host in keyed_stack.hosts_with(role):
            assert target in keyed_stack.certificate_names(host)


def test_certificates_of_the_domains_come_from_the_named_authorities_alone(changed: Changed) -> None:
    records = published(changed(lambda c: c["dns"].update(caa=["ca.example", "other.example"])))
    for domain in ("hill.example", "dale.example", "moor.example"):
        assert records[domain, "CAA"].records == (
            '0 issue "ca.example"',
            '0 issue "other.example"',
            '0 iodef "mailto:postmaster@hill.example"',
        )
    # Internal names are the business of the stack's own authority.
    assert records["net.hill.example", "CAA"].records[0] == '0 issue ";"'


def test_no_authority_is_named_where_the_stack_names_none(records: Found) -> None:
    assert not [name for name, kind in records if kind == "CAA"]


def test_a_domain_that_sends_no_mail_says_so_and_still_takes_some(changed: Changed) -> None:
    def quiet(config: dict[str, Any]) -> None:
        config["domains"]["moor.example"] = {"sends": False, "texts": ["proof=1"]}

    stack = changed(quiet)
    records = published(stack)
    assert records["moor.example", "MX"].records == ("10 smtp-in.hill.example.",)
    assert texts(records, "moor.example") == ["v=spf1 -all", "proof=1"]
    assert texts(records, "_dmarc.moor.example")[0].startswith("v=DMARC1; p=reject;")
    assert texts(records, "*._domainkey.moor.example") == ["v=DKIM1; p="]
    assert ("lab2026._domainkey.moor.example", "TXT") not in records
    signers = bundle(stack, stack.all_hosts["smtp-out-oak"])["files"]["/etc/opendkim/signers"]["content"]
    assert "dale.example" in signers and "moor.example" not in signers
    assert not [address for address in stack.addresses_of("ann") if address.endswith("@moor.example")]


def test_a_name_that_neither_sends_nor_takes_mail_says_both(changed: Changed) -> None:
    records = published(changed(lambda c: c["dns"].update(silent=["www.dale.example"])))
    assert records["www.dale.example", "MX"].records == ("0 .",)
    assert texts(records, "www.dale.example") == ["v=spf1 -all"]
    assert texts(records, "_dmarc.www.dale.example")[0].startswith("v=DMARC1; p=reject;")
    assert texts(records, "*._domainkey.www.dale.example") == ["v=DKIM1; p="]
    assert ("www.dale.example._report._dmarc.hill.example", "TXT") in records


def test_a_new_dkim_key_is_published_before_it_signs(keyed_config: dict[str, Any], keyed_stack: Stack) -> None:
    from model.keys import Keys
    from ops.keys import complete

    config = copy.deepcopy(keyed_config)
    config["dkim"]["published"] = ["lab2027"]
    before = parse("lab", "Pulumi.lab.yaml", config)
    private = Keys.parse_private(config["keys"]["private"])
    ring = complete(before, before.keys.public, private)
    assert ring.made == [f"DKIM key lab2027 of {domain}" for domain in sorted(before.domains)]
    config["keys"] = {"public": ring.public, "private": json.dumps(ring.private)}
    stack = parse("lab", "Pulumi.lab.yaml", config)
    records = published(stack)
    for domain in stack.domains:
        old, new = (texts(records, f"{selector}._domainkey.{domain}") for selector in ("lab2026", "lab2027"))
        assert old and new and old != new
        assert old == texts(published(keyed_stack), f"lab2026._domainkey.{domain}")
    table = bundle(stack, stack.all_hosts["smtp-out-oak"])["files"]["/etc/opendkim/keytable"]["content"]
    assert ":lab2026:" in table and "lab2027" not in table


def test_reports_go_where_they_are_said_to(changed: Changed) -> None:
    def elsewhere(config: dict[str, Any]) -> None:
        config["dns"] |= {"reports": "dmarc@dale.example", "dmarc": "v=DMARC1; p=none"}

    records = published(changed(elsewhere))
    assert texts(records, "_dmarc.hill.example") == ["v=DMARC1; p=none; rua=mailto:dmarc@dale.example"]
    assert texts(records, "_smtp._tls.hill.example") == ["v=TLSRPTv1; rua=mailto:dmarc@dale.example"]
    assert ("hill.example._report._dmarc.dale.example", "TXT") in records


# SPF


def test_others_who_send_for_a_domain_stand_in_its_spf_record(changed: Changed) -> None:
    stack = changed(lambda c: c["domains"]["dale.example"].update(also_from=["include:spf.far.example"]))
    (value,) = texts(published(stack), "dale.example")
    assert value == "v=spf1 include:_spf.hill.example include:spf.far.example -all"


def test_a_stack_with_many_addresses_has_spf_records_that_each_fit_into_an_answer(changed: Changed) -> None:
    def many(config: dict[str, Any]) -> None:
        config["gateways"][0]["prefixes"] = [f"203.0.113.{last}/32" for last in range(0, 100, 2)]

    stack = changed(many)
    records = published(stack)
    parts = [name for name, kind in records if kind == "TXT" and name.startswith("_spf4")]
    assert len(parts) > 1
    together = " ".join(strings(records[name, "TXT"].records[0]) for name in parts).split()
    assert {f"ip4:203.0.113.{last}" for last in range(0, 100, 2)} <= set(together)
    assert all(len(strings(records[name, "TXT"].records[0])) <= 450 for name in parts)
    (top,) = texts(records, "_spf.hill.example")
    assert all(f"include:{name} " in top for name in parts)
    assert record_problems(stack) == []


def test_no_two_words_of_any_text_run_together(records: Found) -> None:
    case_study = published(load(STACKS / "Pulumi.ipng.yaml"))
    for found in (records, case_study):
        for (_, kind), rrset in found.items():
            for record in rrset.records if kind == "TXT" else ():
                for word in strings(record).split() if strings(record).startswith("v=spf1") else ():
                    assert re.fullmatch(r"v=spf1|[~-]all|include:[a-z0-9._-]+|ip[46]:[0-9a-f.:/]+", word)


# Validators


def set_(name: str, kind: str, *values: str, zone: str = "hill.example", ttl: int = 3600, path: str = "here") -> RRset:
    return RRset(name, kind, ttl, values, zone, "service", path)


HOST = set_("mx.hill.example", "A", "198.51.100.2")
ALIAS = set_("imap.hill.example", "CNAME", "mx.hill.example.")


@pytest.mark.parametrize(
    ("rrset", "reason"),
    [
        (set_("mx.dale.example", "A", "198.51.100.2"), "is not in the zone hill.example (RFC 1034 section 4.2)"),
        (set_("x" * 64 + ".hill.example", "A", "198.51.100.2"), "a label has 1 to 63 octets (RFC 1035 section 2.3.4)"),
        (
            set_(".".join(["x" * 63] * 4) + ".hill.example", "A", "198.51.100.2"),
            "the name is longer than 255 octets (RFC 1035 section 2.3.4)",
        ),
        (
            set_("hill.example", "NS", "ns.example."),
            "a NS at the apex of a zone is not the stack's to publish (RFC 1034 section 4.2.1)",
        ),
        (set_("mx.hill.example", "A", "198.51.100.3"), "here publishes records of this name and type too"),
        (set_("a.hill.example", "A", "198.51.100.3", "198.51.100.3"), "198.51.100.3 stands twice (RFC 2181 section 5)"),
        (set_("mx.hill.example", "CNAME", "a.far.example."), "A stands at the same name (RFC 1034 section 3.6.2)"),
        (set_("a.hill.example", "CNAME", "imap.hill.example."), "imap.hill.example. is an alias itself"),
        (set_("a.hill.example", "CNAME", "b.hill.example."), "nothing is published at b.hill.example."),
        (set_("hill.example", "MX", "10 imap.hill.example."), "imap.hill.example. is an alias (RFC 2181 section 10.3)"),
        (set_("hill.example", "MX", "10 b.hill.example."), "b.hill.example. has no address (RFC 2181 section 10.3)"),
        (set_("hill.example", "MX", "10 mx.hill.example"), "mx.hill.example does not end in a dot"),
        (set_("hill.example", "MX", "99999 mx.hill.example."), "the preference 99999 is not a number below 65536"),
        (set_("hill.example", "MX", "0 .", "10 mx.hill.example."), "a null MX stands alone (RFC 7505 section 3)"),
        (set_("_imaps._tcp.hill.example", "SRV", "0 1 993 imap.hill.example."), "hill.example. is an alias (RFC 2782)"),
        (set_("imaps.hill.example", "SRV", "0 1 993 mx.hill.example."), "the name is not _service._protocol.domain"),
        (set_("_imaps._tcp.hill.example", "SRV", "0 0 0 .", "0 1 993 mx.hill.example."), "has this record alone"),
        (
            set_("9.100.51.198.in-addr.arpa", "PTR", "mx.hill.example.", zone="100.51.198.in-addr.arpa"),
            "mx.hill.example. does not lead back to 198.51.100.9 (RFC 1912 section 2.1)",
        ),
        (set_("hill.example", "TXT", '"' + "x" * 256 + '"'), "a TXT record is of strings of at most 255 octets"),
        (set_("hill.example", "TXT", '"ä"'), "has other than printable ASCII characters"),
        (set_("hill.example", "TXT", '"v=spf1 -all"', '"v=spf1 ~all"'), "has 2 SPF records, where one may stand"),
        (set_("hill.example", "TXT", '"v=spf1 include:a.example"'), "the SPF record does not end in -all or ~all"),
        (
            set_("hill.example", "TXT", text("v=spf1 " + " ".join(f"include:{i}.org" for i in range(11)) + " -all")),
            "SPF takes 11 look-ups, 10 are allowed (RFC 7208 section 4.6.4)",
        ),
        (set_("hill.example", "TXT", '"v=spf1 include:hill.example -all"'), "look-ups, 10 are allowed"),
        (
            set_("hill.example", "TXT", text("v=spf1 " + " ".join(f"ip4:198.51.100.{i}" for i in range(40)) + " -all")),
            "it fits into no answer (RFC 7208 section 3.4)",
        ),
        (set_("_dmarc.hill.example", "TXT", '"v=DMARC1; p=maybe"'), "has no policy p=none, quarantine or reject"),
        (set_("_dmarc.hill.example", "TXT", '"p=none; v=DMARC1"'), "is not v=DMARC1 and then tags, each once"),
        (set_("_dmarc.hill.example", "TXT", '"v=DMARC1; p=none; rua=me@hill.example"'), "rua is not a list of mailto:"),
        (set_("_dmarc.hill.example", "TXT", '"v=DMARC1; p=none; np=refuse"'), "np is not none, quarantine or reject"),
        (set_("_dmarc.hill.example", "TXT", '"v=DMARC1; p=none; psd=no"'), "psd is not y, n or u (RFC 9989"),
        (set_("_dmarc.hill.example", "TXT", '"v=DMARC1; p=none; t=0"'), "t is not y or n (RFC 9989"),
        (set_("hill.example", "TXT", '"v=DKIM1; p="'), "a DKIM key stands alone at selector._domainkey.domain"),
        (set_("_25._tcp.mx.hill.example", "TLSA", "3 1 1 abc"), "3 1 1 abc is not 3 1 1 and a SHA-256 digest"),
        (set_("_25._tcp.b.hill.example", "TLSA", "3 1 1 " + "0" * 64), "b.hill.example has no address"),
        (set_("a.hill.example", "A", "198.51.100.3", ttl=1), "a TTL of 1 s is not from 30 s to a week"),
        (set_("a.hill.example", "A", "198.51.100.3", ttl=2**31), "is not from 0 to 2147483647 (RFC 2181 section 8)"),
        (set_("a.hill.example", "A", "198.51.100.300"), "'198.51.100.300' is no A record"),
        (set_("a.hill.example", "TXT", *(f'"{i} {"x" * 200}"' for i in range(30))), "they fit into no answer"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(rrset: RRset, reason: str) -> None:
    said = [str(problem) for problem in problems_of((HOST, ALIAS, rrset))]
    assert [line for line in said if reason in line], said
    assert all(line.startswith("here: ") for line in said)


def test_tags_that_dmarc_has_no_more_are_told_and_hold_nothing_up() -> None:
    policy = "v=DMARC1; p=reject; pct=50 ; RI=1; ri=86400; rua=mailto:pct=1@hill.example; t=n; np=none; psd=u; aspf=s"
    assert problems_of((HOST, set_("_dmarc.hill.example", "TXT", f'"{policy.replace("RI=1; ", "")}"'))) == []
    assert list(removed_from_dmarc(policy)) == [
        "DMARC has no pct any more (RFC 9989): remove it, or say t=y for a policy that is only tried",
        "DMARC has no ri any more (RFC 9989): remove it",
    ]


def test_all_reasons_come_at_once() -> None:
    bad = set_("hill.example", "MX", "99999 imap.hill.example", ttl=5)
    said = " ".join(str(problem) for problem in problems_of((HOST, ALIAS, bad)))
    assert all(part in said for part in ("does not end in a dot", "is not a number", "a TTL of 5 s"))


@pytest.mark.parametrize("name", ["lab", "ipng", "example"])
def test_the_records_of_every_committed_stack_are_good(name: str) -> None:
    assert record_problems(load(STACKS / f"Pulumi.{name}.yaml")) == []


def test_a_stack_file_that_would_give_bad_zones_is_refused_with_paths(
    tmp_path: Path, keyed_config: dict[str, Any]
) -> None:
    import yaml

    config = copy.deepcopy(keyed_config)
    config["gateways"][1]["name"] = "nginx0.hill.example"
    config["domains"]["dale.example"]["also_from"] = [f"include:{i}.far.example" for i in range(8)]
    config["dns"]["ttl"] = {"mx": 5}
    document = {"config": {f"posthorn:{key}": value for key, value in config.items()}}
    (tmp_path / "Pulumi.bad.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(StackError) as refused:
        Project(tmp_path, "bad").load()
    said = str(refused.value)
    assert "gateways[1].name: nginx0.hill.example A: service.names.frontend publishes records of this name" in said
    assert "domains.dale.example: dale.example TXT: SPF takes 11 look-ups, 10 are allowed" in said
    assert "domains.dale.example: dale.example MX: a TTL of 5 s is not from 30 s to a week" in said


def test_each_record_tells_where_in_the_stack_file_it_comes_from(keyed_stack: Stack) -> None:
    keys = set(Stack.model_fields) | {"keys"}
    for rrset in rrsets(keyed_stack):
        assert re.split(r"[.\[]", rrset.path)[0] in keys


def test_two_records_that_differ_in_nothing_but_their_place_are_one_problem_each() -> None:
    twice = (HOST, replace(HOST, path="there"))
    assert [problem.path for problem in problems_of(twice)] == ["there"]


# Before a run


def state_with(stack: Stack, *more: tuple[str, str, str]) -> dict[str, Any]:
    """A Pulumi state in which a stack has published all its RRsets, and some more (zone, name, type)."""
    found = [(rrset.zone, rrset.name, rrset.type) for rrset in rrsets(stack)] + list(more)
    outputs = [{"zone": f"{zone}.", "name": f"{name}.", "type": kind} for zone, name, kind in found]
    return {"deployment": {"resources": [{"type": RRSET, "outputs": each} for each in outputs]}}


def test_deleting_a_few_records_of_many_needs_no_word(keyed_stack: Stack) -> None:
    before = state_with(keyed_stack, ("hill.example", "old.hill.example", "A"))
    assert list(too_many_deletions(keyed_stack, seen(before), ())) == []


def test_deleting_a_share_of_a_zone_needs_a_word(keyed_stack: Stack) -> None:
    old = [("moor.example", f"old{index}.moor.example", "A") for index in range(20)]
    before = seen(state_with(keyed_stack, *old))
    (problem,) = too_many_deletions(keyed_stack, before, ())
    assert "zone moor.example: 20 of" in problem and "DELETE=moor.example" in problem
    assert list(too_many_deletions(keyed_stack, before, ("moor.example",))) == []


def test_a_zone_that_is_left_out_of_the_stack_file_is_not_deleted_by_the_way(changed: Changed) -> None:
    stack = changed(lambda c: c["dns"]["zones"].update({"moor.example": None}))
    (problem,) = too_many_deletions(stack, seen(state_with(stack)), ())
    assert "zone moor.example" in problem and "100 %" in problem


def test_records_that_move_to_another_zone_are_not_deleted(keyed_stack: Stack) -> None:
    state = state_with(keyed_stack)
    for resource in state["deployment"]["resources"]:
        # As when net.hill.example becomes a zone of its own.
        if resource["outputs"]["zone"] == "net.hill.example.":
            resource["outputs"]["zone"] = "hill.example."
    assert list(too_many_deletions(keyed_stack, seen(state), ())) == []


def test_a_small_zone_has_no_brake(keyed_stack: Stack) -> None:
    before = seen(state_with(keyed_stack, *(("tiny.example", f"{i}.tiny.example", "A") for i in range(9))))
    assert list(too_many_deletions(keyed_stack, before, ())) == []


def test_a_word_for_what_is_not_there_is_an_error(keyed_stack: Stack) -> None:
    with pytest.raises(OperatorError, match=r"DELETE=hil\.example"):
        list(too_many_deletions(keyed_stack, seen(state_with(keyed_stack)), ("hil.example",)))
    with pytest.raises(OperatorError, match="the stack publishes no such RRset"):
        adopted(keyed_stack, ("hill.example/A",))
    assert adopted(keyed_stack, ("Hill.example./mx",)) == "hill.example/MX"


def test_a_certificate_that_lacks_a_new_name_is_told_with_the_command_that_makes_it(changed: Changed) -> None:
    stack = changed(
        lambda c: (c["domains"].update({"new.example": {}}), c["dns"]["zones"].update({"new.example": None}))
    )
    found = {problem.path: problem.message for problem in certificates_without_names(stack)}
    assert set(found) == {f"keys.public.hosts.frontend-{site}.certificate" for site in ("oak", "elm", "ash")}
    assert all("mta-sts.new.example" in said and "make keys STACK=lab" in said for said in found.values())
