"""What an operator is told about a stack file that is wrong, and what follows from one that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.base import StackError
from model.load import load, parse
from model.network import mac_address
from model.stack import Stack


def problems_of(config: dict[str, Any]) -> list[str]:
    with pytest.raises(StackError) as caught:
        parse("lab", "Pulumi.lab.yaml", config)
    return [str(problem) for problem in caught.value.problems]


def test_a_misspelt_key_is_named_with_its_nearest_neighbour(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["adresses"] = config["hosts"]["smtp-in-oak"].pop("addresses")
    assert problems_of(config) == [
        "hosts.smtp-in-oak.addresses: is missing",
        "hosts.smtp-in-oak.adresses: unknown key, did you mean addresses?",
    ]


def test_an_address_outside_its_prefix_is_refused(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["addresses"]["public"][0] = "198.51.100.77"
    assert problems_of(config) == [
        "hosts.smtp-in-oak.addresses.public[0]: 198.51.100.77 is not in a public prefix of site oak"
        " (198.51.100.0/28, 2001:db8:2:1::/64)"
    ]


def test_two_hosts_with_one_address_are_refused(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-out-oak"]["addresses"]["local"][0] = "198.18.1.11"
    assert problems_of(config) == [
        "hosts.smtp-out-oak.addresses.local[0]: 198.18.1.11 is taken already by hosts.smtp-in-oak.addresses.local[0]"
    ]


def test_an_alias_to_nowhere_is_refused(config: dict[str, Any]) -> None:
    config["domains"]["hill.example"]["aliases"] |= {"a": "carl", "b": "nobody@moor.example"}
    assert problems_of(config) == [
        "domains.hill.example.aliases.a: there is no account carl",
        "domains.hill.example.aliases.b: nobody@moor.example is in a domain of this stack,"
        " but no account, alias or catch-all takes it",
    ]


def test_aliases_that_lead_in_a_circle_are_refused(config: dict[str, Any]) -> None:
    config["domains"]["hill.example"]["aliases"] |= {"a": "b@moor.example", "b": "a@hill.example"}
    assert problems_of(config) == [
        "domains.hill.example.aliases.a: leads in a circle: a@hill.example → b@moor.example → a@hill.example",
        "domains.hill.example.aliases.b: leads in a circle: b@hill.example → a@hill.example → b@moor.example"
        " → a@hill.example",
    ]


def test_all_problems_of_a_file_come_at_once(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["addresses"]["public"][0] = "198.51.100.77"
    config["domains"]["hill.example"]["aliases"]["a"] = "carl"
    config["dns"]["servers"]["lab2"] = config["dns"]["servers"].pop("lab")
    assert len(problems_of(config)) == 2 + len(config["dns"]["zones"])


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "Pulumi.x.yaml"
    file.write_text("config:\n  posthorn:accounts:\n    ann: {}\n    ann: {}\n")
    with pytest.raises(StackError, match="line 4: the key ann stands twice"):
        load(file)


@pytest.mark.parametrize("role", ["smtp-in", "smtp-out", "maildrop"])
def test_a_front_end_shares_no_host_with_those_who_want_its_ports(config: dict[str, Any], role: str) -> None:
    host = config["hosts"][f"{role}-oak"]
    host["roles"].append("frontend")
    host["addresses"].setdefault("public", ["198.51.100.14"])
    assert problems_of(config) == [
        f"hosts.{role}-oak.roles: {role} and frontend cannot share a host: both want the same ports"
    ]


def test_nobody_is_both_let_in_and_kept_out_and_our_own_domains_are_neither(config: dict[str, Any]) -> None:
    both = {"clients": ["192.0.2.0/24"], "senders": ["x@far.example", "Hill.example", "ann@moor.example"]}
    config["filter"] |= {"allow": both, "deny": {"clients": ["192.0.2.0/24"], "senders": ["x@far.example", "example"]}}
    own = "is a domain of this stack: who writes as it logs in, or is looked at as all others"
    assert problems_of(config) == [
        f"filter.allow.senders[1]: hill.example {own}",
        f"filter.allow.senders[2]: moor.example {own}",
        "filter.deny.clients[0]: 192.0.2.0/24 stands under filter.allow too",
        "filter.deny.senders[0]: x@far.example stands under filter.allow too",
        f"filter.deny.senders[1]: dale.example {own}",
    ]


def test_a_secret_is_never_shown_in_a_problem(config: dict[str, Any]) -> None:
    config["accounts"]["ann"]["password"] = ["very-secret"]
    assert "very-secret" not in "\n".join(problems_of(config))


def test_hosts_are_named_after_their_role_and_site(stack: Stack) -> None:
    assert stack.all_hosts["smtp-in-oak"].fqdn == "smtp-in.oak.net.hill.example"


def test_a_domain_that_equals_another_accepts_the_same_addresses(stack: Stack) -> None:
    assert stack.accepts("sales@moor.example")
    assert stack.accepts("ann+shop@moor.example")
    assert not stack.accepts("nobody@moor.example")


def test_every_domain_takes_mail_for_postmaster_and_abuse(stack: Stack) -> None:
    assert all(stack.accepts(f"{name}@{domain}") for domain in stack.domains for name in ("postmaster", "abuse"))


def test_mail_can_leave_from_every_gateway_and_every_mx(stack: Stack) -> None:
    sources = set(map(str, stack.leaves_from()))
    assert {"198.51.100.129", "2001:db8:2:f::3", "198.51.100.34", "2001:db8:2:2::2"} <= sources


def test_a_mac_address_depends_on_the_name_alone(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["addresses"]["local"][0] = "198.18.1.99"
    moved: Stack = parse("lab", "Pulumi.lab.yaml", config)
    assert moved.all_hosts["smtp-in-oak"].mac(0) == mac_address("smtp-in-oak", 0)
