"""What the provider of RRsets asks a name server for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dns.exception
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
        self.lock = threading.Lock()
        self.records: list[dns.rrset.RRset] = []
        self.updates: list[dns.message.Message] = []
        self.code = dns.rcode.NOERROR
        self.lost_answers = 0
        self.busy = 0
        """How many updates it answers with SERVFAIL."""
        self.knows_zone = True
        self.deaf = False
        """Agrees to everything and does nothing."""
        self.longest = 2**31 - 1
        """The TTL that it cuts others down to."""
        self.forwarded: list[dns.message.Message] = []
        self.looks_late = 0
        """How many looks an update takes to arrive, as where a secondary forwards it to its primary."""
        self.keys_of_queries: list[Any] = []
        self.seconds = 0.0
        """What the provider has slept."""

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def at(self, name: dns.name.Name, kind: int) -> dns.rrset.RRset | None:
        return next((r for r in self.records if r.name == name and r.rdtype == kind), None)

    def tcp(self, message: dns.message.Message, _where: str, **_: Any) -> dns.message.Message:
        with self.lock:
            if not self.knows_zone:
                raise dns.exception.FormError  # dnspython: "response requires a TSIG but does not have one"
            return self.answer(message)

    def answer(self, message: dns.message.Message) -> dns.message.Message:
        if message.opcode() == dns.opcode.UPDATE:
            self.updates.append(message)
            answer = dns.message.Message(id=message.id)
            if self.busy:
                self.busy -= 1
                answer.set_rcode(dns.rcode.SERVFAIL)
                return answer
            answer.set_rcode(self.code if self.code != dns.rcode.NOERROR else self.judge(message))
            if answer.rcode() == dns.rcode.NOERROR and self.looks_late:
                self.forwarded.append(message)
            elif answer.rcode() == dns.rcode.NOERROR and not self.deaf:
                self.change(message)
                if self.lost_answers:
                    self.lost_answers -= 1
                    raise TimeoutError("timed out")
            return answer
        self.keys_of_queries.append(message.keyring)
        if self.forwarded:
            self.looks_late -= 1
            if not self.looks_late:
                self.change(self.forwarded.pop())
        answer = dns.message.QueryMessage(id=message.id)
        answer.flags = dns.flags.QR
        answer.question = list(message.question)
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
        """Carries an update out (section 3.4): an RRset is deleted, and records are added.

        A CNAME replaces the one that is there; one that is deleted in the same update is not added, as with Knot.
        """
        gone = {(asked.name, asked.rdtype) for asked in message.sections[2] if asked.deleting is not None}
        for asked in message.sections[2]:
            which = (asked.name, asked.rdtype)
            if asked.deleting is not None or asked.rdtype == dns.rdatatype.CNAME:
                self.records = [r for r in self.records if (r.name, r.rdtype) != which]
            asked.ttl = min(asked.ttl, self.longest)
            if asked.deleting is not None or (which in gone and asked.rdtype == dns.rdatatype.CNAME):
                continue
            elif found := self.at(asked.name, asked.rdtype):
                found.update(asked)  # type: ignore[no-untyped-call]
            else:
                self.records.append(dns.rrset.from_rdata_list(asked.name, asked.ttl, list(asked)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(dns.query, "tcp", server.tcp)
    monkeypatch.setattr("providers.rrset.time", server)
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
    assert provider.read("id", own).id is None


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


# What a server says and what it does


ALIAS = {**MX, "name": "www.hill.example.", "type": "CNAME", "ttl": 60, "records": ["nginx0.hill.example."]}


@pytest.mark.parametrize("change", [{"ttl": 300}, {"records": ["nginx1.hill.example."]}])
def test_a_changed_alias_is_never_deleted_on_the_way(
    server: Server, provider: RRsetProvider, change: dict[str, Any]
) -> None:
    provider.create(ALIAS)
    provider.update("id", ALIAS, {**ALIAS, **change})
    assert provider.read("id", {**ALIAS, **change}).outs == {**ALIAS, **change}
    provider.create({**ALIAS, "adopt": True})
    assert provider.read("id", ALIAS).outs == ALIAS


def test_a_server_that_agrees_and_does_nothing_is_no_success(server: Server, provider: RRsetProvider) -> None:
    server.deaf = True
    with pytest.raises(UpdateRefused, match=r"agreed to change hill\.example\. MX to 3600 10 smtp-in.*has nothing"):
        provider.create(MX)
    server.records = [ours()]
    with pytest.raises(UpdateRefused, match=r"agreed to change .* to 60 10 smtp-in.*, but has 3600 10 smtp-in"):
        provider.update("id", MX, {**MX, "ttl": 60})
    with pytest.raises(UpdateRefused, match="is still there, though the server agreed to delete it"):
        provider.delete("id", MX)


def test_a_server_that_cuts_a_ttl_down_is_no_success(server: Server, provider: RRsetProvider) -> None:
    server.longest = 600
    with pytest.raises(UpdateRefused, match=r"but has 600 10 smtp-in.*limits of TTLs"):
        provider.create(MX)


def test_a_server_that_forwards_updates_has_a_moment(server: Server, provider: RRsetProvider) -> None:
    server.looks_late = 3
    provider.create(MX)
    assert server.records == [ours()] and server.seconds > 0
    # Nobody waits for a server that refused.
    server.seconds, server.records = 0, [theirs()]
    with pytest.raises(UpdateRefused):
        provider.update("id", MX, {**MX, "ttl": 60})
    assert server.seconds == 0


def test_a_server_that_is_busy_with_the_zone_is_asked_again(server: Server, provider: RRsetProvider) -> None:
    server.busy = 3
    provider.create(MX)
    assert server.records == [ours()]
    server.busy = 4
    with pytest.raises(UpdateRefused, match="SERVFAIL"):
        provider.update("id", MX, {**MX, "ttl": 60})


def test_a_server_without_the_zone_is_not_told_to_be_away(server: Server, provider: RRsetProvider) -> None:
    server.knows_zone = False
    with pytest.raises(UpdateRefused, match=r"not signed with the key posthorn.*Does it have the zone hill\.example\."):
        provider.create(MX)


def test_the_server_is_asked_with_the_key_where_the_stack_has_it(server: Server, provider: RRsetProvider) -> None:
    """Another view, or a refusal, may be for whoever shows no key."""
    provider.create(MX)
    assert server.keys_of_queries and all(server.keys_of_queries)
    # A refresh does without one that was replaced.
    assert provider.read("id", {**MX, "key_name": "older"}).id == "id"
    assert server.keys_of_queries[-1] is None


@pytest.mark.parametrize(
    "there",
    [
        ("60", "10 smtp-in.hill.example."),
        ("3600", "20 smtp-in.hill.example."),
        ("3600", "10 smtp-in.hill.example.", "20 mx.far.example."),
    ],
)
def test_a_refresh_finds_what_somebody_changed(server: Server, provider: RRsetProvider, there: tuple[str, ...]) -> None:
    ttl, *records = there
    server.records = [dns.rrset.from_text("hill.example.", int(ttl), "IN", "MX", *records)]
    found = provider.read("id", MX)
    assert (found.id, found.outs) == ("id", {**MX, "ttl": int(ttl), "records": records})


def test_a_refresh_finds_what_is_gone_and_what_is_as_it_was(server: Server, provider: RRsetProvider) -> None:
    assert provider.read("id", MX).id is None
    server.records = [ours()]
    found = provider.read("id", MX)
    assert (found.id, found.outs) == ("id", MX)


# Another server, another zone


def test_a_stack_moves_to_a_server_that_has_nothing_yet(server: Server, provider: RRsetProvider) -> None:
    provider.update("id", MX, {**MX, "server": "203.0.113.99", "ttl": 60})
    assert [r.ttl for r in server.records] == [60]


def test_a_stack_moves_to_a_server_with_a_copy_of_the_zone(server: Server, provider: RRsetProvider) -> None:
    server.records = [ours()]
    provider.update("id", MX, {**MX, "server": "203.0.113.99", "ttl": 60})
    assert [r.ttl for r in server.records] == [60]


def test_what_stands_on_another_server_is_taken_over_by_word_alone(server: Server, provider: RRsetProvider) -> None:
    server.records = [theirs()]
    for moved in ({"server": "203.0.113.99"}, {"port": 5353}):
        with pytest.raises(UpdateRefused, match=r"not made by this stack: 60 5 other.*ADOPT=hill\.example\./MX"):
            provider.update("id", MX, {**MX, **moved})
        assert server.records == [theirs()]
    provider.update("id", MX, {**MX, "server": "203.0.113.99", "adopt": True})
    assert server.records == [ours()]


def test_the_word_also_counts_for_a_record_that_the_stack_changes(server: Server, provider: RRsetProvider) -> None:
    server.records = [theirs()]
    provider.update("id", {**MX, "ttl": 60}, {**MX, "adopt": True})
    assert server.records == [ours()]


def test_what_is_gone_from_the_same_server_is_not_put_back_in_silence(server: Server, provider: RRsetProvider) -> None:
    with pytest.raises(UpdateRefused, match=r"the server has nothing\. Run refresh"):
        provider.update("id", MX, {**MX, "ttl": 60})
    assert server.records == []


def test_an_rrset_is_created_before_the_one_that_it_replaces_is_deleted(provider: RRsetProvider) -> None:
    found = provider.diff("id", MX, {**MX, "zone": "example."})
    assert found.replaces == ["zone"] and found.delete_before_replace is False
    # Nothing stands beside a CNAME: that name has to be free first.
    found = provider.diff("id", MX, {**ALIAS, "name": MX["name"]})
    assert found.replaces == ["type"] and found.delete_before_replace is True


@pytest.mark.parametrize("kind", ["NS", "SOA"])
def test_the_apex_of_a_zone_is_left_to_its_operator(provider: RRsetProvider, kind: str) -> None:
    records = {"NS": ["ns.example."], "SOA": ["ns.example. hostmaster.example. 1 2 3 4 5"]}
    found = provider.check({}, {**MX, "type": kind, "records": records[kind]})
    assert [failure.reason for failure in found.failures] == [f"the {kind} of a zone belongs to its operator"]


def test_an_rrset_written_differently_is_the_same(provider: RRsetProvider) -> None:
    other = {**MX, "name": "HILL.example.", "records": ["10 SMTP-IN.hill.example."], "ttl": 3600.0}
    assert not provider.diff("id", MX, other).changes
    assert provider.diff("id", MX, {**other, "ttl": 60}).changes
    assert provider.diff("id", MX, {**other, "records": ["20 smtp-in.hill.example."]}).changes


def test_a_server_with_another_address_is_told_again_and_nothing_is_deleted(provider: RRsetProvider) -> None:
    found = provider.diff("id", MX, {**MX, "server": "203.0.113.99"})
    assert found.changes and not found.replaces
    assert provider.diff("id", MX, {**MX, "name": "dale.example."}).replaces == ["name"]


def test_a_key_that_is_missing_is_asked_for(server: Server) -> None:
    with pytest.raises(UpdateRefused, match="no secret for the TSIG key posthorn: run make tsig"):
        RRsetProvider().create(MX)
