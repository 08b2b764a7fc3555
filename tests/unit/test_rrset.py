"""What the provider of RRsets asks a name server for."""

from __future__ import annotations

from typing import Any

import dns.flags
import dns.message
import dns.query
import dns.rcode
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


class Server:
    """A name server that holds RRsets, keeps what it is asked, and answers with a code."""

    def __init__(self) -> None:
        self.records: list[dns.rrset.RRset] = []
        self.updates: list[dns.message.Message] = []
        self.code = dns.rcode.NOERROR

    def tcp(self, message: dns.message.Message, _where: str, **_: Any) -> dns.message.Message:
        if message.opcode() == 5:
            self.updates.append(message)
            answer = dns.message.Message(id=message.id)
            answer.set_rcode(self.code)
            return answer
        answer = dns.message.make_response(message)
        answer.answer = [r for r in self.records if r.rdtype == message.question[0].rdtype]
        # Over the wire, as the client would get it.
        return dns.message.from_wire(answer.to_wire())


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


def test_a_new_rrset_is_made_only_where_there_is_none(server: Server, provider: RRsetProvider) -> None:
    provider.create(MX)
    (update,) = server.updates
    (condition,) = update.sections[1]
    assert (condition.rdclass, condition.rdtype) == (dns.rdataclass.NONE, dns.rdatatype.MX)
    assert update.keyring is not None


def test_an_rrset_of_somebody_else_is_not_taken_over(server: Server, provider: RRsetProvider) -> None:
    server.records = [dns.rrset.from_text("hill.example.", 60, "IN", "MX", "5 other.far.example.")]
    with pytest.raises(UpdateRefused, match=r"not made by this stack: 60 5 other\.far"):
        provider.create(MX)
    assert server.updates == []


def test_a_change_is_made_on_condition_that_nothing_else_changed(server: Server, provider: RRsetProvider) -> None:
    provider.update("id", MX, {**MX, "records": ["20 smtp-in.hill.example."]})
    (update,) = server.updates
    (condition,) = update.sections[1]
    assert [r.to_text() for r in condition] == ["10 smtp-in.hill.example."]
    # A server answers FORMERR to any other TTL.
    assert condition.ttl == 0


def test_a_record_that_somebody_changed_is_named_with_what_it_is_now(server: Server, provider: RRsetProvider) -> None:
    server.records = [dns.rrset.from_text("hill.example.", 60, "IN", "MX", "5 other.far.example.")]
    server.code = dns.rcode.NXRRSET
    with pytest.raises(UpdateRefused, match=r"was changed by somebody else: the server has 60 5 other\.far"):
        provider.update("id", MX, {**MX, "ttl": 60})


def test_a_delete_leaves_what_somebody_else_put_there(server: Server, provider: RRsetProvider) -> None:
    server.records = [dns.rrset.from_text("hill.example.", 60, "IN", "MX", "5 other.far.example.")]
    with pytest.raises(UpdateRefused, match="it is left alone"):
        provider.delete("id", MX)
    assert server.updates == []


def test_deleting_what_is_gone_is_no_error(server: Server, provider: RRsetProvider) -> None:
    provider.delete("id", MX)
    assert server.updates == []


@pytest.mark.parametrize("kind", ["NS", "SOA"])
def test_the_apex_of_a_zone_is_left_to_its_operator(provider: RRsetProvider, kind: str) -> None:
    records = {"NS": ["ns.example."], "SOA": ["ns.example. hostmaster.example. 1 2 3 4 5"]}
    found = provider.check({}, {**MX, "type": kind, "records": records[kind]})
    assert [failure.reason for failure in found.failures] == [f"the {kind} of a zone belongs to its operator"]


def test_an_rrset_written_differently_is_the_same(provider: RRsetProvider) -> None:
    other = {**MX, "name": "HILL.example.", "records": ["10 SMTP-IN.hill.example."], "ttl": 3600.0}
    assert not provider.diff("id", MX, other).changes


def test_a_key_that_is_missing_is_asked_for(server: Server) -> None:
    with pytest.raises(UpdateRefused, match="no secret for the TSIG key posthorn: run make tsig"):
        RRsetProvider().create(MX)
