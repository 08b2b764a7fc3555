"""What the provider of RRsets does on the name servers that take updates, each as Debian 12 has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dns.rcode
import dns.update
import pytest
from pulumi.dynamic import ConfigureRequest
from pulumi.dynamic.config import Config

from lab import image
from providers.rrset import RRsetProvider, UpdateRefused
from tests.lab import name_servers
from tests.lab.name_servers import ADDRESS, CHILD, KINDS, PARENT, SECRET, NameServer

pytestmark = pytest.mark.on_release(12)

LONG = '"v=DKIM1; k=rsa; p=' + "A" * 230 + '" "' + "B" * 200 + '"'
# Of every type that a stack publishes, three records that can stand in its RRset. BIND refuses an MX to a name of the
# zone that has no address.
RECORDS = {
    "A": ("192.0.2.1", "192.0.2.2", "192.0.2.3"),
    "AAAA": ("2001:db8::1", "2001:db8::2", "2001:db8::ffff:0:3"),
    "MX": ("10 ns.example.", "20 mx.far.test.", "0 ."),
    "TXT": ('"v=spf1 -all"', LONG, r'"a \"quoted\" \\ word; and 100% more"'),
    "CAA": ('0 issue "ca.example"', '128 issuewild ";"', '0 iodef "mailto:ca@example"'),
    "TLSA": (f"3 1 1 {'0a' * 32}", f"3 1 1 {'f0' * 32}", f"2 0 1 {'77' * 32}"),
    "SRV": ("0 1 993 imap.example.", "10 5 465 smtp.example.", "0 0 0 ."),
    "PTR": ("host1.example.", "host2.example.", "host3.example."),
    "CNAME": ("target1.example.", "target2.example.", "target3.example."),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image.make(image.OWN, tmp_path_factory.mktemp("image") / "log")


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NameServer]:
    with name_servers.running(request.param, root, tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[NameServer, NameServer]]:
    """A server, and another of its kind with the same zones."""
    folders = [tmp_path_factory.mktemp(request.param) for _ in range(2)]
    with (
        name_servers.running(request.param, root, folders[0]) as one,
        name_servers.running(request.param, root, folders[1]) as other,
    ):
        yield one, other


@pytest.fixture
def provider() -> RRsetProvider:
    provider = RRsetProvider()
    keys = json.dumps({"private": json.dumps({"tsig": {"posthorn": SECRET}})})
    provider.configure(ConfigureRequest(Config({"posthorn:keys": keys}, "posthorn")))
    return provider


def rrset(server: NameServer, name: str, kind: str, *records: str, ttl: int = 300, **more: Any) -> dict[str, Any]:
    """The properties of an RRset at a name of the parent zone."""
    return {
        "server": ADDRESS,
        "port": server.port,
        "zone": PARENT,
        "name": f"{name}.{PARENT}",
        "type": kind,
        "ttl": ttl,
        "records": list(records or RECORDS[kind][:1]),
        "key_name": "posthorn",
        "algorithm": "hmac-sha256",
        "adopt": False,
        **more,
    }


def has(server: NameServer, wanted: dict[str, Any]) -> bool:
    return server.rrset(wanted["name"], wanted["type"]) == (wanted["ttl"], set(wanted["records"]))


def nothing(server: NameServer, wanted: dict[str, Any]) -> bool:
    return server.rrset(wanted["name"], wanted["type"]) is None


@pytest.mark.parametrize("kind", RECORDS)
def test_every_change_of_an_rrset_arrives(server: NameServer, provider: RRsetProvider, kind: str) -> None:
    one, two, three = RECORDS[kind]
    name = f"change-{kind}"
    changes = [
        rrset(server, name, kind, one),
        rrset(server, name, kind, one, ttl=60),
        rrset(server, name, kind, two, ttl=60),
        rrset(server, name, kind, one, ttl=3600),
    ]
    if kind != "CNAME":
        changes += [
            rrset(server, name, kind, one, two, three, ttl=3600),
            rrset(server, name, kind, one, two, three, ttl=60),
            rrset(server, name, kind, one, three, ttl=60),
            rrset(server, name, kind, two, ttl=300),
        ]
    before = changes[0]
    assert provider.create(before).outs == before and has(server, before)
    for after in changes[1:]:
        provider.update("id", before, after)
        assert has(server, after), after
        assert provider.read("id", after).outs == after
        before = after
    provider.delete("id", before)
    assert nothing(server, before)
    assert provider.read("id", before).id is None
    # What is gone stays gone, and can be made again.
    provider.delete("id", before)
    provider.create(before)
    assert has(server, before)


@pytest.mark.parametrize("kind", RECORDS)
def test_an_rrset_of_somebody_else_is_taken_over_by_word_alone(
    server: NameServer, provider: RRsetProvider, kind: str
) -> None:
    one, two, _ = RECORDS[kind]
    theirs = rrset(server, f"adopt-{kind}", kind, one, ttl=600)
    ours = rrset(server, f"adopt-{kind}", kind, two, ttl=60)
    provider.create(theirs)
    with pytest.raises(UpdateRefused, match="not made by this stack"):
        provider.create(ours)
    assert has(server, theirs)
    provider.create({**ours, "adopt": True})
    assert has(server, ours)
    # One that says the same needs no word; its TTL becomes the stack's.
    longer = {**ours, "ttl": 900}
    provider.create(longer)
    assert has(server, longer)


@pytest.mark.parametrize("kind", RECORDS)
def test_what_somebody_changed_is_neither_changed_nor_deleted(
    server: NameServer, provider: RRsetProvider, kind: str
) -> None:
    one, two, three = RECORDS[kind]
    ours = rrset(server, f"between-{kind}", kind, one)
    theirs = rrset(server, f"between-{kind}", kind, two, ttl=120)
    wanted = rrset(server, f"between-{kind}", kind, three)
    provider.create(ours)
    provider.update("id", ours, theirs)
    with pytest.raises(UpdateRefused, match="was changed by somebody else: the server has 120 "):
        provider.update("id", ours, wanted)
    with pytest.raises(UpdateRefused, match="it is left alone"):
        provider.delete("id", ours)
    assert has(server, theirs)
    known = provider.read("id", ours).outs
    assert known and known["ttl"] == 120
    provider.update("id", known, wanted)
    assert has(server, wanted)
    provider.delete("id", wanted)
    with pytest.raises(UpdateRefused, match="was changed by somebody else: the server has nothing"):
        provider.update("id", wanted, ours)
    assert nothing(server, ours)


def test_a_name_becomes_an_alias_and_back_once_it_is_free(server: NameServer, provider: RRsetProvider) -> None:
    address, alias = rrset(server, "swap", "A"), rrset(server, "swap", "CNAME")
    for old, new in ((address, alias), (alias, address)):
        provider.create(old)
        for adopt in (False, True):
            with pytest.raises(UpdateRefused, match="cannot stand beside what is at this name"):
                provider.create({**new, "adopt": adopt})
        assert has(server, old)
        provider.delete("id", old)
        provider.create(new)
        assert has(server, new) and nothing(server, old)
        provider.delete("id", new)


def test_four_workers_do_not_meet(server: NameServer, provider: RRsetProvider) -> None:
    """Pulumi calls one provider from four threads."""

    def made(index: int) -> dict[str, Any]:
        before, after = (rrset(server, f"worker{index}", "CNAME", ttl=ttl) for ttl in (60, 300))
        provider.create(before)
        provider.update("id", before, after)
        return after

    with ThreadPoolExecutor(4) as pool:
        assert all(has(server, after) for after in pool.map(made, range(20)))


def test_what_a_wildcard_answers_is_not_taken_for_a_record(server: NameServer, provider: RRsetProvider) -> None:
    wildcard = rrset(server, "*.wild", "TXT", '"v=DKIM1; p="')
    own = rrset(server, "own.wild", "TXT", '"v=DKIM1; p=x"')
    provider.create(wildcard)
    provider.create(own)
    assert has(server, own)
    provider.delete("id", own)
    assert has(server, wildcard) and has(server, {**wildcard, "name": own["name"]})
    assert provider.read("id", own).id is None


def test_an_rrset_moves_to_a_zone_below_and_is_served_all_the_time(server: NameServer, provider: RRsetProvider) -> None:
    """As Pulumi does it: what replaces an RRset is created first, then the old one is deleted."""
    old = rrset(server, "www.child", "TXT", '"v=1"')
    new = {**old, "zone": CHILD, "ttl": 60}
    found = provider.diff("id", old, new)
    assert found.replaces == ["zone"] and not found.delete_before_replace
    # The zone above had it before there was one below, which hides it now.
    add = dns.update.UpdateMessage(PARENT)
    add.add(old["name"], old["ttl"], "TXT", *old["records"])
    assert server.ask(add).rcode() == dns.rcode.NOERROR
    with pytest.raises(UpdateRefused, match=r"refuses to change|Does it have the zone elsewhere"):
        provider.create({**new, "zone": "elsewhere.example."})
    assert server.stands(PARENT, old["name"], "TXT")
    provider.create(new)
    assert has(server, new)
    provider.delete("id", old)
    assert has(server, new) and not server.stands(PARENT, old["name"], "TXT")
    provider.delete("id", new)
    assert nothing(server, new)


def test_a_stack_moves_to_another_server(pair: tuple[NameServer, NameServer], provider: RRsetProvider) -> None:
    one, other = pair
    for kind, (value, changed, theirs) in RECORDS.items():
        old = rrset(one, f"move-{kind}", kind, value)
        new = rrset(other, f"move-{kind}", kind, changed, ttl=60)
        provider.create(old)
        provider.update("id", old, new)
        assert has(other, new) and has(one, old)
        # Where the zone was copied before, the record is there already.
        provider.update("id", old, {**new, "port": one.port})
        assert has(one, new)
        # Where somebody else has the name on the new server, it stays his until the word is said.
        stranger = rrset(other, f"taken-{kind}", kind, theirs)
        ours = rrset(one, f"taken-{kind}", kind, value)
        provider.create(stranger)
        provider.create(ours)
        moved = {**ours, "port": other.port}
        with pytest.raises(UpdateRefused, match=r"not made by this stack.*ADOPT="):
            provider.update("id", ours, moved)
        assert has(other, stranger)
        provider.update("id", ours, {**moved, "adopt": True})
        assert has(other, moved)
