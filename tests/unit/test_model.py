"""What an operator is told about a stack file that is wrong, and what follows from one that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.base import StackError
from model.load import load, parse
from model.network import mac_address
from model.stack import Stack
from ops.keys import new_authority

OPERATOR = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + 43 * "J"


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


def test_hosts_that_no_operator_could_reach_are_named(config: dict[str, Any]) -> None:
    config["access"]["ssh_from"] = ["198.19.0.0/24"]
    config["hosts"]["smtp-in-oak"]["addresses"]["local"].reverse()
    assert problems_of(config) == [
        "access.ssh_from: names no network of IPv6, over which smtp-in-oak would be reached: add yours,"
        " or put their local address of the other family first"
    ]


def test_gateways_are_inside_their_prefixes_and_one_of_each_family(config: dict[str, Any]) -> None:
    config["sites"]["oak"]["public"]["gateways"][0] = "198.51.100.17"
    config["sites"]["elm"]["public"]["gateways"][1] = "fe80::1"
    config["sites"]["elm"]["local"]["gateways"].append("198.18.2.2")
    assert problems_of(config) == [
        "sites.elm.local.gateways: at most one gateway of each family: hosts would get two default routes",
        "sites.oak.public.gateways[0]: 198.51.100.17 is in none of the prefixes beside it"
        " (198.51.100.0/28, 2001:db8:2:1::/64)",
    ]


def test_public_addresses_need_an_interface_and_routes_of_their_own(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["machine"]["interfaces"] = 1
    config["access"]["ssh_from"] += ["::/0"]
    assert [problem.partition(":")[0] for problem in problems_of(config)] == [
        "access.ssh_from[2]",
        "hosts.smtp-in-oak.machine.interfaces",
    ]
    for host in config["hosts"].values():
        host["existing"] = {"host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ"}
        del host["machine"]
    assert parse("lab", "Pulumi.lab.yaml", config)


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


def test_a_postmaster_who_leads_back_to_the_postmaster_is_refused(config: dict[str, Any]) -> None:
    config["service"]["postmaster"] = "postmaster@hill.example"
    circle = "leads in a circle: postmaster@hill.example → postmaster@hill.example"
    assert problems_of(config) == [f"service.postmaster: {circle}"]
    config["service"]["postmaster"] = "abuse@moor.example"
    circle = "leads in a circle: abuse@moor.example → abuse@moor.example"
    assert problems_of(config) == [f"service.postmaster: {circle}"]
    config["domains"]["hill.example"]["aliases"]["abuse"] = "ben"
    assert parse("lab", "Pulumi.lab.yaml", config).accepts("postmaster@dale.example")


def test_a_stack_none_of_whose_domains_sends_is_refused(config: dict[str, Any]) -> None:
    for domain in config["domains"].values():
        domain["sends"] = False
    assert any(problem.startswith("domains: none of them sends") for problem in problems_of(config))


def spoilt(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """The configuration with one value in place of another, or beside the others."""
    *folders, name = path.split(".")
    place = config
    for folder in folders:
        place = place.setdefault(folder, {})
    place[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("filter.scores", {"greylist": 20, "tag": 10}, "filter.scores: greylist 20.0, tag 10.0, reject 15.0: none"),
        ("filter.scores", {"greylist": -2, "tag": -1, "reject": 0}, "filter.scores.reject: must be above 0"),
        ("filter.scores", {"reject": float("inf")}, "filter.scores.reject: "),
        ("limits.message_rate", 0, "limits.message_rate: "),
        ("limits.message_size", 0, "limits.message_size: "),
        ("limits.connections", -5, "limits.connections: "),
        ("limits.sieve_processes", 0, "limits.sieve_processes: "),
        ("dns.servers.lab.port", 0, "dns.servers.lab.port: "),
        ("dns.resolver.bootstrap", [], "dns.resolver.bootstrap: names no resolver, and VMs need one"),
        ("access.operators", ["nonsense"], "access.operators[0]: must be an SSH public key"),
        ("access.operators", [OPERATOR[:-8] + " me"], "access.operators[0]: must be an SSH public key"),
        ("access.operators", [OPERATOR.replace("ed25519", "rsa")], "access.operators[0]: must be an SSH public key"),
        ("access.operators", [f"{OPERATOR}\n{OPERATOR}"], "access.operators[0]: must be an SSH public key"),
        ("service.authorities", ["nonsense"], "service.authorities[0]: must be certificates in PEM"),
        ("machine_users.doors.password", "one\nstack root:x", "machine_users.doors.password: must be one line"),
        ("machine_users.doors.password", "", "machine_users.doors.password: must be one line"),
    ],
)
def test_a_value_that_no_daemon_should_get_is_refused(
    config: dict[str, Any], path: str, value: object, told: str
) -> None:
    problems = problems_of(spoilt(config, path, value))
    assert [problem for problem in problems if problem.startswith(told)] == problems != []


@pytest.mark.parametrize("replies", ["[[", "127.0.0", "127.0.0.[2..]", "127.0.0.[11..2]", "127.0.0.256", "127.0.0.2 x"])
def test_replies_of_a_blocklist_that_postfix_could_not_read_are_refused(config: dict[str, Any], replies: str) -> None:
    config["filter"]["dnsbl"][0]["replies"] = replies
    assert [problem.partition(" tells")[0] for problem in problems_of(config)] == [
        f"filter.dnsbl[0].replies: {replies!r}"
    ]


def test_replies_and_keys_of_every_form_are_taken(config: dict[str, Any]) -> None:
    config["filter"]["dnsbl"][0]["replies"] = "127.0.[0;1].[2..11;14]"
    config["access"]["operators"] = [f" {OPERATOR} me, at home\n"]
    config["service"]["authorities"] = [new_authority("world")[0].rstrip()]
    stack = parse("lab", "Pulumi.lab.yaml", config)
    assert stack.access.operators == (f"{OPERATOR} me, at home",)
    # Texts that follow one another in a file.
    assert stack.service.authorities[0].endswith("-----END CERTIFICATE-----\n")


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
