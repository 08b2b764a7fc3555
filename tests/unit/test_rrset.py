"""What the provider of RRsets asks a name server for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.query
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from pulumi.dynamic import ConfigureRequest
from pulumi.dynamic.config import Config

from providers.rrset import RRsetProvider, UpdateRefused

MX: dict[str, Any] = {
    "server": "203.0.113.53",
    "port": 53,
    "zone": "hill.example.",
    "name": "hill.example.",
    "type": "MX",
    "ttl": 3600,
    "records": ["10 smtp-in.hill.example."],
    "key_name": "posthorn",
    "algorithm": "hmac-sha256",
    "adopt": False,
}


TXT = dns.rdatatype.TXT


class Server:
    """A name server that holds RRsets, keeps the updates that it was asked for, and follows RFC 2136 section 3."""

    def __init__(self) -> None:
        self.records: list[dns.rrset.RRset] = []
        self.updates: list[dns.message.Message] = []
        self.code = dns.rcode.NOERROR
        self.lost_answers = 0
        self.lock = threading.Lock()

    def at(self, name: dns.name.Name, kind: int) -> dns.rrset.RRset | None:
        return next((r for r in self.records if r.name == name and r.rdtype == kind), None)

    def tcp(self, message: dns.message.Message, _where: str, **_: Any) -> dns.message.Message:
        with self.lock:
            return self.answer(message)

    def answer(self, message: dns.message.Message) -> dns.message.Message:
        if message.opcode() == dns.opcode.UPDATE:
            self.updates.append(message)
            answer = dns.message.Message(id=message.id)
            answer.set_rcode(self.code if self.code != dns.rcode.NOERROR else self.judge(message))
            if answer.rcode() == dns.rcode.NOERROR:
                self.change(message)
                if self.lost_answers:
                    self.lost_answers -= 1
                    raise TimeoutError("timed out")
            return answer
        answer = dns.message.make_response(message)
        question = message.question[0]
        found = self.at(question.name, question.rdtype) or self.at(dns.name.from_text("*.wild.example."), TXT)
        if found and found.rdtype == question.rdtype and question.name.is_subdomain(found.name.parent()):
            answer.answer = [dns.rrset.from_rdata_list(question.name, found.ttl, list(found))]
        # Over the wire, as the client would get it.
        return dns.message.from_wire(answer.to_wire())

    def judge(self, message: dns.message.Message) -> dns.rcode.Rcode:
        """Whether the conditions of an update hold (section 3.2)."""
        for asked in message.sections[1]:
            found = self.at(asked.name, asked.rdtype)
            if asked.rdtype == dns.rdatatype.ANY:
                if any(r.name == asked.name for r in self.records):
                    return dns.rcode.YXDOMAIN
            elif asked.rdclass == dns.rdataclass.NONE:
                if found is not None:
                    return dns.rcode.YXRRSET
            elif found is None or set(found) != set(asked):
                return dns.rcode.NXRRSET
        return dns.rcode.NOERROR

    def change(self, message: dns.message.Message) -> None:
        """Carries an update out (section 3.4): an RRset is deleted, and records are added."""
        for asked in message.sections[2]:
            if asked.deleting is not None:
                self.records = [r for r in self.records if (r.name, r.rdtype) != (asked.name, asked.rdtype)]
            elif found := self.at(asked.name, asked.rdtype):
                found.update(asked)  # type: ignore[no-untyped-call]
            else:
                self.records.append(dns.rrset.from_rdata_list(asked.name, asked.ttl, list(asked)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(dns.query, "tcp", server.tcp)
    return server


@pytest.fixture
def provider() -> RRsetProvider:
    provider = RRsetProvider()
    keys = '{"private": "{\\"tsig\\": {\\"posthorn\\": \\"c2VjcmV0\\"}}"}'
    provider.configure(ConfigureRequest(Config({"posthorn:keys": keys}, "posthorn")))
    return provider


def theirs() -> dns.rrset.RRset:
    return dns.rrset.from_text("hill.example.", 60, "IN", "MX", "5 other.far.example.")


def ours() -> dns.rrset.RRset:
    return dns.rrset.from_text("hill.example.", 3600, "IN", "MX", "10 smtp-in.hill.example.")


def test_a_new_rrset_is_made_only_where_there_is_none(server: Server, provider: RRsetProvider) -> None:
    provider.create(MX)
    (update,) = server.updates
    conditions = {(condition.rdclass, condition.rdtype) for condition in update.sections[1]}
    assert (dns.rdataclass.NONE, dns.rdatatype.MX) in conditions
    assert update.keyring is not None
    assert server.records == [ours()]


def test_an_rrset_of_somebody_else_is_not_taken_over(server: Server, provider: RRsetProvider) -> None:
    server.records = [theirs()]
    with pytest.raises(UpdateRefused, match=r"not made by this stack: 60 5 other\.far.*ADOPT=hill\.example\./MX"):
        provider.create(MX)
    assert server.records == [theirs()]


def test_an_rrset_of_somebody_else_is_taken_over_by_an_explicit_word(server: Server, provider: RRsetProvider) -> None:
    server.records = [theirs()]
    provider.create({**MX, "adopt": True})
    assert server.records == [ours()]


def test_an_rrset_that_is_there_already_as_wanted_is_taken_as_made(server: Server, provider: RRsetProvider) -> None:
    server.records = [ours()]
    provider.create(MX)
    assert server.records == [ours()]


def test_a_record_is_never_put_beside_a_cname(server: Server, provider: RRsetProvider) -> None:
    server.records = [dns.rrset.from_text("hill.example.", 60, "IN", "CNAME", "www.far.example.")]
    with pytest.raises(UpdateRefused, match=r"cannot stand beside what is at this name.*CNAME 60 www\.far"):
        provider.create(MX)
    server.records = [theirs()]
    with pytest.raises(UpdateRefused, match=r"cannot stand beside what is at this name.*MX 60 5 other\.far"):
        provider.create({**MX, "type": "CNAME", "records": ["nginx0.hill.example."]})
    assert server.records == [theirs()]


def test_what_a_wildcard_answers_is_not_taken_for_a_record(server: Server, provider: RRsetProvider) -> None:
    wildcard = dns.rrset.from_text("*.wild.example.", 60, "IN", "TXT", "v=DKIM1")
    server.records = [wildcard]
    own = {**MX, "zone": "wild.example.", "name": "s1.wild.example.", "type": "TXT", "records": ['"v=DKIM1; p=x"']}
    provider.create(own)
    assert len(server.records) == 2
    provider.delete("id", own)
    assert server.records == [wildcard]


def test_four_workers_do_not_meet(server: Server, provider: RRsetProvider) -> None:
    """Pulumi calls one provider from four threads."""

    def made(index: int) -> str:
        name = f"d{index}.hill.example."
        provider.create({**MX, "name": name})
        provider.update("id", {**MX, "name": name}, {**MX, "name": name, "ttl": 60 + index})
        return name

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(made, range(40)))
    assert {r.name.to_text(): r.ttl for r in server.records} == {name: 60 + i for i, name in enumerate(names)}


def test_an_update_whose_answer_was_lost_is_found_done(server: Server, provider: RRsetProvider) -> None:
    server.lost_answers = 1
    provider.create(MX)
    assert server.records == [ours()] and len(server.updates) > 1
    server.lost_answers = 1
    provider.update("id", MX, {**MX, "ttl": 60})
    assert server.records[0].ttl == 60
    server.lost_answers = 1
    provider.delete("id", {**MX, "ttl": 60})
    assert server.records == []


def test_a_change_is_made_on_condition_that_nothing_else_changed(server: Server, provider: RRsetProvider) -> None:
    server.records = [ours()]
    provider.update("id", MX, {**MX, "records": ["20 smtp-in.hill.example."]})
    (update,) = server.updates
    assert [r.to_text() for r in server.records[0]] == ["20 smtp-in.hill.example."]
    (condition,) = update.sections[1]
    assert [r.to_text() for r in condition] == ["10 smtp-in.hill.example."]
    # A server answers FORMERR to any other TTL.
    assert condition.ttl == 0


def test_a_record_that_somebody_changed_is_named_with_what_it_is_now(server: Server, provider: RRsetProvider) -> None:
    server.records = [theirs()]
    with pytest.raises(UpdateRefused, match=r"was changed by somebody else: the server has 60 5 other\.far"):
        provider.update("id", MX, {**MX, "ttl": 60})


def test_a_delete_leaves_what_somebody_else_put_there(server: Server, provider: RRsetProvider) -> None:
    server.records = [theirs()]
    with pytest.raises(UpdateRefused, match="it is left alone"):
        provider.delete("id", MX)
    assert server.records == [theirs()]


def test_deleting_what_is_gone_is_no_error(server: Server, provider: RRsetProvider) -> None:
    provider.delete("id", MX)
    assert server.records == []


@pytest.mark.parametrize("kind", ["NS", "SOA"])
def test_the_apex_of_a_zone_is_left_to_its_operator(provider: RRsetProvider, kind: str) -> None:
    records = {"NS": ["ns.example."], "SOA": ["ns.example. hostmaster.example. 1 2 3 4 5"]}
    found = provider.check({}, {**MX, "type": kind, "records": records[kind]})
    assert [failure.reason for failure in found.failures] == [f"the {kind} of a zone belongs to its operator"]


def test_an_rrset_written_differently_is_the_same(provider: RRsetProvider) -> None:
    other = {**MX, "name": "HILL.example.", "records": ["10 SMTP-IN.hill.example."], "ttl": 3600.0}
    assert not provider.diff("id", MX, other).changes


def test_a_server_with_another_address_is_told_again_and_nothing_is_deleted(provider: RRsetProvider) -> None:
    found = provider.diff("id", MX, {**MX, "server": "203.0.113.99"})
    assert found.changes and not found.replaces
    assert provider.diff("id", MX, {**MX, "name": "dale.example."}).replaces == ["name"]


def test_a_key_that_is_missing_is_asked_for(server: Server) -> None:
    with pytest.raises(UpdateRefused, match="no secret for the TSIG key posthorn: run make tsig"):
        RRsetProvider().create(MX)
