"""The records that a stack publishes."""

from __future__ import annotations

import ipaddress
from collections import defaultdict

import dns.reversename
import dns.zone
import pytest

from model.stack import Stack
from services.zones import RRset, rrsets, text, zone_files


@pytest.fixture(scope="module")
def records(keyed_stack: Stack) -> dict[tuple[str, str], RRset]:
    return {(rrset.name, rrset.type): rrset for rrset in rrsets(keyed_stack)}


def strings(record: str) -> str:
    """A TXT record as its readers see it: all strings, joined without a space."""
    return "".join(part for index, part in enumerate(record.split('"')) if index % 2)


def test_an_rrset_is_published_once(keyed_stack: Stack, records: dict[tuple[str, str], RRset]) -> None:
    assert len(records) == len(rrsets(keyed_stack))


def test_nothing_stands_beside_a_cname(records: dict[tuple[str, str], RRset]) -> None:
    types = defaultdict(set)
    for name, kind in records:
        types[name].add(kind)
    assert all(kinds == {"CNAME"} for kinds in types.values() if "CNAME" in kinds)


def test_every_domain_has_an_mx_that_resolves_to_every_smtp_in(
    keyed_stack: Stack, records: dict[tuple[str, str], RRset]
) -> None:
    for domain in keyed_stack.domains:
        assert records[domain, "MX"].records == ("10 smtp-in.hill.example.",)
    assert records["smtp-in.hill.example", "A"].records == ("198.51.100.2", "198.51.100.18", "198.51.100.34")


def test_spf_covers_every_address_that_mail_leaves_from(
    keyed_stack: Stack, records: dict[tuple[str, str], RRset]
) -> None:
    words = " ".join(strings(records[f"_spf{family}.hill.example", "TXT"].records[0]) for family in (4, 6)).split()
    for source in keyed_stack.leaves_from():
        assert f"ip{source.version}:{source}" in words


def test_long_texts_are_split_so_that_joining_them_gives_them_back() -> None:
    long = "v=spf1 " + " ".join(f"ip4:198.51.100.{last}" for last in range(40)) + " -all"
    assert strings(text(long)) == long
    assert max(len(part) for part in text(long).split('"')) <= 255


def test_every_public_address_has_a_name_that_leads_back_to_it(
    keyed_stack: Stack, records: dict[tuple[str, str], RRset]
) -> None:
    public = [a for host in keyed_stack.all_hosts.values() for a in host.addresses.public]
    public += [a for gateway in keyed_stack.gateways for a in gateway.addresses]
    for address in public:
        (name,) = records[address.reverse_pointer, "PTR"].records
        kind = "AAAA" if address.version == 6 else "A"
        assert str(address) in records[name.rstrip("."), kind].records


def test_the_name_that_smtp_out_greets_with_resolves_to_every_gateway(
    keyed_stack: Stack, records: dict[tuple[str, str], RRset]
) -> None:
    seen = {*records["egress.hill.example", "A"].records, *records["egress.hill.example", "AAAA"].records}
    assert {ipaddress.ip_address(a) for a in seen} == {a for g in keyed_stack.gateways for a in g.addresses}


def test_the_first_maildrop_by_preference_is_the_preferred_one(records: dict[tuple[str, str], RRset]) -> None:
    assert records["maildrop.net.hill.example", "MX"].records == (
        "10 maildrop.oak.net.hill.example.",
        "20 maildrop.elm.net.hill.example.",
    )


def test_a_domain_whose_reports_go_elsewhere_is_allowed_to_send_them(records: dict[tuple[str, str], RRset]) -> None:
    assert ("dale.example._report._dmarc.hill.example", "TXT") in records
    assert ("hill.example._report._dmarc.hill.example", "TXT") not in records


def test_zone_files_are_read_by_others(keyed_stack: Stack) -> None:
    for zone, content in zone_files(keyed_stack).items():
        parsed = dns.zone.from_text(content, origin=f"{zone}.", check_origin=False)
        assert len(parsed.nodes) == len({rrset.name for rrset in rrsets(keyed_stack) if rrset.zone == zone})


def test_site_local_names_come_first_and_what_leads_the_world_in_comes_last(keyed_stack: Stack) -> None:
    phases = [rrset.phase for rrset in rrsets(keyed_stack)]
    assert phases == sorted(phases, key=("internal", "hosts", "service").index)
    assert {rrset.phase for rrset in rrsets(keyed_stack) if rrset.type == "MX" and "net." not in rrset.name} == {
        "service"
    }
