"""Hosts that send their own mail."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from model.base import StackError
from model.load import parse
from model.stack import Stack
from services.bundle import bundle, secrets
from services.senders import authors, owners


def problems_of(config: dict[str, Any]) -> list[str]:
    with pytest.raises(StackError) as caught:
        parse("lab", "Pulumi.lab.yaml", config)
    return [str(problem) for problem in caught.value.problems]


def test_a_host_that_sends_its_own_mail_needs_exactly_one_user(config: dict[str, Any]) -> None:
    users = config["machine_users"]
    users["doors"]["hosts"] = ["frontend-oak", "frontend-elm", "smtp-in-oak"]
    users["more"] = copy.deepcopy(users["doors"]) | {"hosts": ["frontend-elm"]}
    assert problems_of(config) == [
        "hosts.frontend-ash.roles: relay-client needs a user: name frontend-ash in machine_users.<user>.hosts",
        "hosts.frontend-elm.roles: relay-client needs one user, and doors and more name frontend-elm",
        "machine_users.doors.hosts: smtp-in-oak has not the role relay-client",
    ]


def test_opensmtpd_cannot_stand_beside_postfix(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-out-oak"]["roles"].append("relay-client")
    config["machine_users"]["doors"]["hosts"].append("smtp-out-oak")
    assert problems_of(config) == [
        "hosts.smtp-out-oak.roles: smtp-out and relay-client cannot share a host: each needs Debian's one"
        " mail transport agent for itself, so give one of them another"
    ]


def test_what_a_program_writes_as_is_in_a_domain_that_sends(config: dict[str, Any]) -> None:
    config["machine_users"]["doors"]["send_as"] = ["shop@dale.example", "shop@elsewhere.example"]
    assert problems_of(config) == [
        "machine_users.doors.send_as[1]: shop@elsewhere.example is not in a domain that sends mail"
    ]


def test_a_machine_user_writes_as_its_hosts_and_as_no_user(keyed_stack: Stack) -> None:
    addresses = "postmaster@hill.example,@frontend.oak.net.hill.example,@frontend.elm.net.hill.example"
    assert authors(keyed_stack)["doors"] == f"{addresses},@frontend.ash.net.hill.example"
    assert owners(keyed_stack)["ann@hill.example"] == "ann"
    assert owners(keyed_stack)["postmaster@hill.example"] == "ann, doors"


def test_the_password_is_for_its_daemon_alone_and_in_no_bundle(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["machine_users"]["doors"]["password"] = "open-sesame-please"
    stack = parse("lab", "Pulumi.lab.yaml", config)
    for host in stack.all_hosts.values():
        wanted, held = bundle(stack, host), secrets(stack, host)
        assert "open-sesame-please" not in str(wanted)
        assert ("open-sesame-please" in str(held)) == host.has("relay-client")
    secret = bundle(stack, stack.all_hosts["frontend-elm"])["secrets"]["/etc/mail/secrets"]
    assert (secret["mode"], secret["owner"], secret["group"]) == ("0640", "root", "opensmtpd")


def test_only_a_host_that_sends_its_own_mail_gives_up_postfix(keyed_stack: Stack) -> None:
    for host in keyed_stack.all_hosts.values():
        assert ("postfix" in bundle(keyed_stack, host)["replaces"]) == host.has("relay-client")


def test_upgrades_are_reported_where_a_host_can_send_mail(config: dict[str, Any]) -> None:
    def settings(name: str) -> str:
        return str(bundle(stack, stack.all_hosts[name])["files"]["/etc/apt/apt.conf.d/52posthorn"]["content"])

    config["hosts"]["frontend-elm"]["roles"].remove("relay-client")
    config["machine_users"]["doors"]["hosts"].remove("frontend-elm")
    stack = parse("lab", "Pulumi.lab.yaml", config)
    for name in ("smtp-in-oak", "smtp-out-oak", "maildrop-oak", "frontend-oak"):
        assert 'Unattended-Upgrade::Mail "root";' in settings(name)
    assert "Mail" not in settings("frontend-elm")
