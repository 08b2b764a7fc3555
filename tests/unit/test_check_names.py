"""What the check concludes from answers of name servers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any

import dns.message
import dns.rrset
import pytest

from check import blocklists, names, records, spf
from check.ask import Answer, Asker, Server, View, canonical
from check.finding import Finding, Severity
from model.settings import DnsblRule
from model.stack import Stack
from services.zones import RRset, rrsets

SERVER = Server("ns1", "192.0.2.1")
OTHER = Server("ns2", "192.0.2.2")
VIEW = View(Asker(), Server("resolver", "192.0.2.3"), True)


def has(*found: str, **more: Any) -> Answer:
    return Answer(records=frozenset(found), **more)


def run(work: Coroutine[Any, Any, spf.Policy]) -> spf.Policy:
    """Like asyncio.run, without taking the loop of this thread from others who have one."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def worst(findings: Iterable[Finding]) -> Finding:
    return min(findings, key=lambda finding: list(Severity).index(finding.severity))


@pytest.fixture(scope="module")
def mx(keyed_stack: Stack) -> RRset:
    return next(r for r in rrsets(keyed_stack) if (r.name, r.type) == ("hill.example", "MX"))


def right(rrset: RRset) -> Answer:
    return Answer(records=records.wanted(rrset), ttl=rrset.ttl, authoritative=True, secure=True)


# Questions and answers


class Confused(asyncio.DatagramProtocol):
    """A name server that sends what nobody asked before each answer: an old answer with the same id, and garbage."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = dns.message.from_wire(data)
        for name, record in (("other.example.", "198.51.100.66"), (query.question[0].name.to_text(), "198.51.100.1")):
            answer = dns.message.make_response(dns.message.make_query(name, "A", id=query.id))
            answer.answer = [dns.rrset.from_text(name, 60, "IN", "A", record)]
            self.transport.sendto(answer.to_wire(), addr)
            self.transport.sendto(data[:2] + b"\xff" * 20, addr)


def test_an_answer_is_taken_for_no_other_name_whatever_its_id() -> None:
    async def asked() -> list[Answer]:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(Confused, local_addr=("127.0.0.1", 0))
        asker = Asker()
        try:
            server = Server("confused", *transport.get_extra_info("sockname"))
            return await asyncio.gather(*(asker.ask(server, f"host{i}.example.", "A") for i in range(20)))
        finally:
            asker.close()
            transport.close()

    loop = asyncio.new_event_loop()
    try:
        answers = loop.run_until_complete(asked())
    finally:
        loop.close()
    assert {answer.error or ",".join(answer.records) for answer in answers} == {"198.51.100.1"}


# Records


def test_texts_are_equal_however_they_are_cut() -> None:
    assert canonical("TXT", '"v=DKIM1; p=AB" "CD"') == canonical("TXT", '"v=DKIM1; p=ABCD"')
    assert canonical("MX", "10 SMTP-in.Hill.example.") == canonical("MX", "10 smtp-in.hill.example.")


def test_a_record_as_the_stack_has_it_is_good(keyed_stack: Stack, mx: RRset) -> None:
    found = list(records.judge(keyed_stack, mx, {SERVER: right(mx), OTHER: right(mx)}, right(mx)))
    assert [finding.severity for finding in found] == [Severity.GOOD]


def test_a_record_that_is_missing_is_named_with_its_server_and_what_to_do(keyed_stack: Stack, mx: RRset) -> None:
    found = worst(records.judge(keyed_stack, mx, {SERVER: right(mx), OTHER: has()}, right(mx)))
    assert found.severity is Severity.WRONG and found.where == "hill.example"
    assert found.what == "hill.example MX is missing at ns2 (192.0.2.2)"
    assert "make up STACK=lab" in found.advice


def test_a_record_that_differs_is_shown_beside_what_it_should_be(keyed_stack: Stack, mx: RRset) -> None:
    answer = has("10 mx.elsewhere.example.", ttl=mx.ttl)
    found = worst(records.judge(keyed_stack, mx, {SERVER: answer, OTHER: answer}, right(mx)))
    assert found.severity is Severity.WRONG
    said = "hill.example MX is 10 mx.elsewhere.example. at ns1 (192.0.2.1), ns2 (192.0.2.2),"
    assert found.what == f"{said} and not 10 smtp-in.hill.example."


def test_a_record_in_a_zone_of_somebody_else_comes_with_its_line(keyed_stack: Stack, mx: RRset) -> None:
    dns = keyed_stack.dns.model_copy(update={"zones": {"hill.example": None}})
    stack = keyed_stack.model_copy(update={"dns": dns})
    found = worst(records.judge(stack, mx, {SERVER: has()}, None))
    assert found.advice == "put it into the zone: hill.example. 86400 IN MX 10 smtp-in.hill.example."


def test_what_is_only_recommended_is_advice(keyed_stack: Stack, mx: RRset) -> None:
    srv = replace(mx, name="_imaps._tcp.hill.example", type="SRV", records=("0 1 993 imap.hill.example.",))
    assert worst(records.judge(keyed_stack, srv, {SERVER: has()}, None)).severity is Severity.ADVICE


def test_a_resolver_with_an_old_answer_is_no_fault(keyed_stack: Stack, mx: RRset) -> None:
    seen = has("10 old.hill.example.", ttl=40)
    found = worst(records.judge(keyed_stack, mx, {SERVER: right(mx)}, seen))
    assert found.severity is Severity.NOTE and "for 40 s at most" in found.what


def test_a_server_that_is_silent_is_no_wrong_record(keyed_stack: Stack, mx: RRset) -> None:
    found = worst(records.judge(keyed_stack, mx, {SERVER: Answer(error="does not answer")}, right(mx)))
    assert found.severity is Severity.UNKNOWN


def test_an_address_of_earlier_times_is_left_over(keyed_stack: Stack) -> None:
    only4 = [r for r in rrsets(keyed_stack) if (r.name, r.type) == ("smtp-in.hill.example", "A")]
    assert ("hill.example", "smtp-in.hill.example", "AAAA") in records.left_over_questions(keyed_stack, only4)
    found = worst(
        records.judge_left_over(keyed_stack, "hill.example", "smtp-in.hill.example", "AAAA", has("2001:db8::9"))
    )
    assert found.severity is Severity.WRONG and "the stack does not have it" in found.what


START = "ns1.hill.example. hostmaster.hill.example. 7 3600 600 604800 60"


@pytest.mark.parametrize(
    ("start", "seen", "severity", "said"),
    [
        (has(START, authoritative=True), has(START, secure=True), Severity.GOOD, "validated from the root on"),
        (has(START, authoritative=True), has(START), Severity.ADVICE, "not signed"),
        (has(START, authoritative=True), Answer(error="answers SERVFAIL"), Severity.WRONG, "answers SERVFAIL"),
        (has(START), has(START, secure=True), Severity.WRONG, "does not serve it"),
        (Answer(error="does not answer"), has(START, secure=True), Severity.UNKNOWN, "does not answer"),
    ],
)
def test_a_zone_is_served_and_signed(
    keyed_stack: Stack, start: Answer, seen: Answer, severity: Severity, said: str
) -> None:
    zone = records.Zone("hill.example", (SERVER,), {SERVER: start}, True, seen)
    found = worst(records.judge_zone(keyed_stack, zone, VIEW))
    assert found.severity is severity and said in found.what


def test_a_zone_that_nobody_serves_is_said_so(keyed_stack: Stack) -> None:
    found = worst(records.judge_zone(keyed_stack, records.Zone("hill.example"), VIEW))
    assert found.severity is Severity.WRONG and "nobody serves this zone" in found.what


# Addresses


def test_an_address_has_a_name_that_leads_back(keyed_stack: Stack) -> None:
    address, greeting = next(iter(names.greetings(keyed_stack).items()))
    good = has(str(address))
    found = list(names.judge_address(address, greeting, has("gw.hill.example."), {"gw.hill.example.": good}, good))
    assert {finding.severity for finding in found} == {Severity.GOOD}
    lost = worst(names.judge_address(address, greeting, has("gw.hill.example."), {"gw.hill.example.": has()}, good))
    assert lost.severity is Severity.WRONG and "that leads to nothing" in lost.what
    silent = worst(names.judge_address(address, greeting, has("g."), {"g.": Answer(error="does not answer")}, good))
    assert silent.severity is Severity.UNKNOWN and "where its name g leads: the resolver does not answer" in silent.what
    nameless = worst(names.judge_address(address, greeting, has(), {}, good))
    assert nameless.severity is Severity.WRONG and "no PTR record" in nameless.what
    elsewhere = worst(names.judge_address(address, greeting, has("g."), {"g.": good}, has("192.0.2.77")))
    assert "does not lead to it" in elsewhere.what


def test_gateways_and_mx_hosts_are_all_asked_for(keyed_stack: Stack) -> None:
    greetings = names.greetings(keyed_stack)
    assert len(greetings) == 12 and set(greetings.values()) == {"egress.hill.example", "smtp-in.hill.example"}


# SPF


def policy(zone: Mapping[str, str], domain: str = "a.example") -> spf.Policy:
    async def ask(name: str, kind: str) -> Answer:
        return has(zone[f"{name} {kind}"]) if f"{name} {kind}" in zone else Answer(exists=False)

    return run(spf.published(domain, ask))


def test_spf_follows_every_word_and_counts_it() -> None:
    found = policy(
        {
            "a.example TXT": "v=spf1 include:b.example a:host.example ip6:2001:db8::/32 -all",
            "b.example TXT": "v=spf1 ip4:192.0.2.0/28 mx ~all",
            "b.example MX": "10 mx.example.",
            "mx.example A": "198.51.100.1",
            "host.example A": "198.51.100.2",
        }
    )
    assert found.lookups == 3 and not found.problems and found.ends == "-all"
    assert [str(network) for network in found.networks] == [
        "192.0.2.0/28",
        "198.51.100.1/32",
        "198.51.100.2/32",
        "2001:db8::/32",
    ]


def test_spf_with_eleven_look_ups_fails() -> None:
    zone = {f"{n}.example TXT": f"v=spf1 include:{n + 1}.example -all" for n in range(11)}
    found = policy({**zone, "11.example TXT": "v=spf1 -all"}, "0.example")
    assert "it takes 11 look-ups, and receivers stop at 10" in found.problems


def test_spf_in_a_circle_comes_to_an_end() -> None:
    assert policy({"a.example TXT": "v=spf1 include:a.example -all"}).problems


def test_mail_from_an_address_that_spf_lacks_is_named(keyed_stack: Stack) -> None:
    gateway = str(keyed_stack.gateways[0].addresses[0])
    words = " ".join(f"ip{source.version}:{source}" for source in keyed_stack.leaves_from() if str(source) != gateway)
    found = worst(names.judge_spf(keyed_stack, "a.example", policy({"a.example TXT": f"v=spf1 {words} -all"})))
    assert found.what == f"SPF: mail that leaves from {gateway} does not pass"


@pytest.mark.parametrize("end", ["+all", "?all"])
def test_spf_that_lets_everybody_pass_is_wrong(keyed_stack: Stack, end: str) -> None:
    found = list(names.judge_spf(keyed_stack, "a.example", policy({"a.example TXT": f"v=spf1 {end}"})))
    assert any("anybody may send as this domain" in finding.what for finding in found)


def test_two_spf_records_are_one_too_many() -> None:
    async def ask(name: str, kind: str) -> Answer:
        return has("v=spf1 -all", "v=spf1 ~all")

    assert run(spf.published("a.example", ask)).problems == ["a.example has 2 SPF records, and needs one"]


# DKIM and DMARC


def test_a_dkim_key_that_is_not_the_one_that_signs_is_wrong(keyed_stack: Stack) -> None:
    key = keyed_stack.keys.public.dkim["hill.example"]["lab2026"]
    other = keyed_stack.keys.public.dkim["dale.example"]["lab2026"]

    def judged(answer: Answer) -> Finding:
        return worst(names.judge_dkim("hill.example", "lab2026", key, answer, signs=True))

    assert judged(has(f"v=DKIM1; k=rsa; p={key}")).severity is Severity.GOOD
    assert "another key is published" in judged(has(f"v=DKIM1; k=rsa; p={other}")).what
    assert judged(has()).severity is Severity.WRONG
    assert judged(has(f"v=DKIM1; t=y; p={key}")).severity is Severity.ADVICE


@pytest.mark.parametrize(
    ("answer", "severity"),
    [
        (has("v=DMARC1; p=reject; rua=mailto:p@hill.example"), Severity.GOOD),
        (has("v=DMARC1; p=none; rua=mailto:p@hill.example"), Severity.ADVICE),
        (has("v=DMARC1; p=reject"), Severity.ADVICE),
        (has("v=DMARC1; p=reject; pct=100; rua=mailto:p@hill.example"), Severity.ADVICE),
        (has(), Severity.WRONG),
        (has("v=DMARC1; p=reject", "v=DMARC1; p=none"), Severity.WRONG),
        (Answer(error="answers SERVFAIL"), Severity.UNKNOWN),
    ],
)
def test_dmarc_is_there_once_and_has_a_word(answer: Answer, severity: Severity) -> None:
    assert worst(names.judge_dmarc("hill.example", answer)).severity is severity


# Blocklists


LISTED = DnsblRule(what="client", zone="dnsbl.example").replies
"""What counts where nothing is said."""


@pytest.mark.parametrize(
    ("reply", "pattern", "counts"),
    [
        ("127.0.0.4", "127.0.0.[2..11]", True),
        ("127.0.0.12", "127.0.0.[2..11]", False),
        ("127.255.255.254", "127.0.0.[2..11]", False),
        ("127.0.1.14", "127.0.[0;1].[2..11;14]", True),
        ("127.0.0.2", "127.0.0.2", True),
        ("127.0.0.9", LISTED, True),
        ("127.0.1.2", LISTED, True),
        # You may not ask, by several lists; and what is no reply of a list at all.
        ("127.255.255.254", LISTED, False),
        ("127.0.0.1", LISTED, False),
        ("127.0.0.255", LISTED, False),
        ("127.0.1.255", LISTED, False),
        ("192.0.2.2", LISTED, False),
    ],
)
def test_replies_count_as_postfix_counts_them(reply: str, pattern: str, counts: bool) -> None:
    assert blocklists.matches(reply, pattern) is counts


LIST = blocklists.Listing(
    "dnsbl.example",
    (DnsblRule(what="client", zone="dnsbl.example", replies="127.0.0.[2..11]"),),
    {"198.51.100.2": "2.100.51.198.dnsbl.example"},
    "2.0.0.127.dnsbl.example",
)


@pytest.mark.parametrize(
    ("test", "answer", "severity"),
    [
        (has("127.0.0.2"), has(), Severity.GOOD),
        (has("127.0.0.2"), has("127.0.0.4"), Severity.WRONG),
        (has("127.0.0.2"), has("127.0.0.20"), Severity.GOOD),
        (has("127.0.0.2"), has("127.255.255.254"), Severity.UNKNOWN),
        (has("127.255.255.252"), has(), Severity.UNKNOWN),
        (has(), has(), Severity.UNKNOWN),
        (has("127.0.0.2"), Answer(error="does not answer"), Severity.UNKNOWN),
    ],
)
def test_a_list_is_believed_only_where_it_answers(test: Answer, answer: Answer, severity: Severity) -> None:
    assert worst(blocklists.judge(LIST, test, {"198.51.100.2": answer})).severity is severity


def test_every_address_that_speaks_to_the_world_is_looked_for(keyed_stack: Stack) -> None:
    listings = list(blocklists.listings(keyed_stack))
    assert [listing.zone for listing in listings] == ["dnsbl.example", "dbl.dnsbl.example"]
    assert listings[0].names["198.51.100.2"] == "2.100.51.198.dnsbl.example"
    assert len(listings[0].names) == 12 and "moor.example" in listings[1].names
