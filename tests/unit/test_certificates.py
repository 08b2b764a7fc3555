"""Which certificate is asked for, shown to whom, and what the name server is told about it."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import yaml

from model.base import StackError
from model.checks import missing_secrets
from model.keys import Keys
from model.load import parse
from model.stack import Stack
from ops.keys import complete
from ops.name_server import asking_hosts, told
from services import certificate, identity
from services.bundle import bundle, secrets


def files(stack: Stack, host: str) -> dict[str, str]:
    found = bundle(stack, stack.all_hosts[host])["files"]
    return {path: file["content"] for path, file in found.items()}


@pytest.fixture(scope="module")
def alone(keyed_config: dict[str, Any]) -> Stack:
    """The lab's stack without an ACME authority."""
    config = copy.deepcopy(keyed_config)
    del config["acme"]
    config["dns"]["mta_sts"] = "testing"
    return parse("lab", "Pulumi.lab.yaml", config)


def test_a_host_asks_for_the_names_by_which_the_world_reaches_it_and_for_no_other(keyed_stack: Stack) -> None:
    asked = {
        name: json.loads(files(keyed_stack, name)[certificate.SETTINGS])["names"]
        for name in ("smtp-in-oak", "smtp-out-oak", "maildrop-oak")
    }
    assert asked["smtp-in-oak"] == ["smtp-in.hill.example"]
    assert asked["smtp-out-oak"] == ["smtp-out.hill.example", "nginx0.hill.example"]
    assert asked["maildrop-oak"] == ["imap.hill.example", "nginx0.hill.example"]
    for host in asking_hosts(keyed_stack):
        assert not [name for name in keyed_stack.acme_names(host) if name.endswith(keyed_stack.net)]


def test_a_name_in_a_zone_that_takes_no_updates_is_not_asked_for(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["dns"]["zones"]["moor.example"] = None
    stack = parse("lab", "Pulumi.lab.yaml", config)
    names = stack.acme_names(stack.all_hosts["frontend-oak"])
    assert "mta-sts.dale.example" in names and "mta-sts.moor.example" not in names


def test_daemons_that_show_it_read_it_again(keyed_stack: Stack) -> None:
    read = {
        name: json.loads(files(keyed_stack, name)[certificate.SETTINGS])["reload"]
        for name in ("smtp-in-oak", "maildrop-oak", "frontend-oak")
    }
    assert len(read["smtp-in-oak"]) == 1 and read["smtp-in-oak"][0].startswith("postfix")
    assert read["maildrop-oak"] == ["dovecot.service"]
    assert read["frontend-oak"] == ["nginx.service"]


def test_the_world_gets_one_certificate_and_who_asks_for_an_internal_name_the_other(keyed_stack: Stack) -> None:
    smtp_in = files(keyed_stack, "smtp-in-oak")
    assert f"smtpd_tls_chain_files = {identity.KEY}, {identity.PUBLIC}\n" in smtp_in["/etc/postfix/main.cf"]
    assert f"smtp-in.oak.net.hill.example {identity.KEY}, {identity.CERTIFICATE}\n" in smtp_in["/etc/postfix/sni"]
    smtp_out = files(keyed_stack, "smtp-out-oak")
    assert f"smtpd_tls_chain_files = {identity.KEY}, {identity.CERTIFICATE}\n" in smtp_out["/etc/postfix/main.cf"]
    assert f"-o smtpd_tls_chain_files={identity.KEY},{identity.PUBLIC}\n" in smtp_out["/etc/postfix/master.cf"]
    dovecot = files(keyed_stack, "maildrop-oak")["/etc/dovecot/dovecot.conf"]
    assert dovecot.index(identity.PUBLIC) < dovecot.index("local_name maildrop.oak.net.hill.example {")
    nginx = files(keyed_stack, "frontend-oak")["/etc/nginx/nginx.conf"]
    assert f"ssl_certificate {identity.PUBLIC};" in nginx
    assert re.search(rf"server_name frontend\.oak\.net\S*[^{{}}]*ssl_certificate {identity.CERTIFICATE};", nginx)


def test_without_an_authority_of_the_world_there_is_one_certificate_for_all(alone: Stack) -> None:
    for name in alone.hosts:
        found = files(alone, name)
        assert certificate.SETTINGS not in found and "/etc/postfix/sni" not in found
        assert identity.PUBLIC not in "".join(found.values())


def test_a_policy_that_the_world_could_not_verify_is_refused(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    del config["acme"]
    with pytest.raises(StackError, match=r"dns\.mta_sts: senders verify the MX against public authorities"):
        parse("lab", "Pulumi.lab.yaml", config)


def test_an_authority_whose_challenges_nobody_could_answer_is_refused(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["dns"]["zones"] = dict.fromkeys(config["dns"]["zones"])
    with pytest.raises(StackError, match="acme: no public name is in a zone with a server"):
        parse("lab", "Pulumi.lab.yaml", config)


# Keys for the name server


def test_every_host_that_asks_has_a_key_of_its_own_made_once(keyed_stack: Stack) -> None:
    assert keyed_stack.keys.private
    made = keyed_stack.keys.private.tsig
    assert {host.fqdn for host in asking_hosts(keyed_stack)} <= set(made)
    assert len(set(made.values())) == len(made)
    assert complete(keyed_stack, keyed_stack.keys.public, keyed_stack.keys.private).made == []


def test_a_key_that_is_missing_is_told_with_the_command_that_makes_it(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    private = json.loads(config["keys"]["private"])
    del private["tsig"]["smtp-in.oak.net.hill.example"]
    config["keys"]["private"] = json.dumps(private)
    said = [str(problem) for problem in missing_secrets(parse("lab", "Pulumi.lab.yaml", config))]
    assert said == ["keys.private.tsig.smtp-in.oak.net.hill.example: is missing: run make keys STACK=lab"]


def test_a_host_gets_its_own_key_alone_and_as_a_secret(keyed_stack: Stack) -> None:
    assert keyed_stack.keys.private
    for host in asking_hosts(keyed_stack):
        own = keyed_stack.keys.private.tsig[host.fqdn]
        held = "".join(secrets(keyed_stack, host).values())
        others = [key for name, key in keyed_stack.keys.private.tsig.items() if name != host.fqdn]
        assert own in held and not [key for key in others if key in held]
        assert own not in json.dumps(bundle(keyed_stack, host))


def test_knot_is_told_that_a_host_may_answer_its_own_challenges(keyed_stack: Stack) -> None:
    document = yaml.safe_load(told(keyed_stack, "knot"))
    rules = {rule["id"]: rule for rule in document["acl"]}
    assert set(rules) == {host.fqdn for host in asking_hosts(keyed_stack)} == {key["id"] for key in document["key"]}
    rule = rules["maildrop.elm.net.hill.example"]
    assert (rule["action"], rule["update-type"], rule["update-owner"]) == ("update", ["TXT"], "name")
    assert rule["update-owner-match"] == "equal"
    assert rule["update-owner-name"] == ["_acme-challenge.imap.hill.example.", "_acme-challenge.nginx0.hill.example."]


def test_bind_is_told_the_same(keyed_stack: Stack) -> None:
    text = told(keyed_stack, "bind")
    assert "grant maildrop.elm.net.hill.example name _acme-challenge.imap.hill.example. TXT;" in text
    assert text.count("hmac-sha256") == len(asking_hosts(keyed_stack))
    dale = text.partition("update-policy of the zone dale.example")[2].partition("of the zone")[0]
    assert "_acme-challenge.mta-sts.dale.example." in dale and "hill.example. TXT" not in dale


def test_without_secrets_placeholders_are_told(stack: Stack) -> None:
    assert set(re.findall(r"secret: (\S+)", told(stack, "knot"))) == {"SECRET"}


def test_the_private_halves_are_read_as_they_were_written(keyed_config: dict[str, Any]) -> None:
    assert Keys.parse_private(keyed_config["keys"]["private"]).tsig
