"""Keys are made once, kept for ever, and told apart without being told."""

from __future__ import annotations

import json
import runpy
from typing import Any

import pulumi
import pytest
from cryptography import x509

from model.checks import missing_keys, missing_secrets
from model.keys import HostPublicKeys, Keys, PrivateKeys, PublicKeys
from model.load import parse
from model.stack import Stack
from ops.keys import (
    KeyRing,
    certificate_serves,
    certificates_without_names,
    certifies,
    complete,
    rspamd_base32,
    ssh_key,
)
from tests.unit.conftest import STACKS


@pytest.fixture(scope="module")
def ring(stack: Stack) -> KeyRing:
    return complete(stack, PublicKeys(), PrivateKeys())


def halves(ring: KeyRing) -> tuple[PublicKeys, PrivateKeys]:
    return PublicKeys.model_validate(ring.public), PrivateKeys.model_validate(ring.private)


def test_a_second_run_makes_nothing_and_keeps_everything(stack: Stack, ring: KeyRing) -> None:
    again = complete(stack, *halves(ring))
    assert again.made == []
    assert (again.public, again.private) == (ring.public, ring.private)


def test_a_new_name_renews_the_certificate_and_keeps_the_key(stack: Stack, ring: KeyRing) -> None:
    service = stack.service.model_copy(update={"names": stack.service.names.model_copy(update={"imap": "mail"})})
    renamed = complete(stack.model_copy(update={"service": service}), *halves(ring))
    assert renamed.made == ["certificate of maildrop-oak", "certificate of maildrop-elm"]
    assert renamed.private["hosts"] == ring.private["hosts"]


def test_public_halves_that_are_lost_are_made_again_from_the_private_ones(stack: Stack, ring: KeyRing) -> None:
    public, private = halves(ring)
    again = complete(stack, PublicKeys(), private)
    assert again.private == ring.private
    for half in ("dkim", "rspamd"):
        assert again.public[half] == ring.public[half]
    authority = again.public["authority"]
    assert certifies(authority, private.authority)
    for name, host in again.public["hosts"].items():
        assert host["ssh"] == public.hosts[name].ssh
        assert certifies(host["certificate"], private.hosts[name].tls)
        assert certificate_serves(host["certificate"], stack.certificate_names(stack.all_hosts[name]), authority)
    assert complete(stack, *halves(again)).made == []


def test_a_public_half_of_another_key_gives_way_to_the_private_one(stack: Stack, ring: KeyRing) -> None:
    public, private = halves(ring)
    mixed = public.model_copy(update={"hosts": {**public.hosts, "smtp-in-oak": public.hosts["smtp-in-elm"]}})
    again = complete(stack, mixed, private)
    assert again.made == ["public half of the SSH host key of smtp-in-oak", "certificate of smtp-in-oak"]
    assert again.public["hosts"]["smtp-in-oak"]["ssh"] == public.hosts["smtp-in-oak"].ssh


def test_a_host_that_existed_before_has_an_ssh_key_of_its_own_and_gets_none(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"].pop("machine", None)
    config["hosts"]["smtp-in-oak"]["existing"] = {"host_key": ssh_key("smtp-in-oak")[0]}
    stack = parse("lab", "Pulumi.lab.yaml", config)
    made = complete(stack, PublicKeys(), PrivateKeys())
    assert "SSH host key of smtp-in-oak" not in made.made and "SSH host key of smtp-in-elm" in made.made
    stack = stack.model_copy(update={"keys": Keys.model_validate({"public": made.public, "private": made.private})})
    told = {problem.path for problem in (*missing_keys(stack), *missing_secrets(stack))}
    assert not {path for path in told if "smtp-in-oak" in path}


def test_a_key_of_which_a_half_is_missing_counts_as_missing(stack: Stack, ring: KeyRing) -> None:
    public = PublicKeys.model_validate(ring.public)
    domain = stack.sending_domains[0]
    spoilt = public.model_copy(
        update={
            "hosts": {**public.hosts, "smtp-in-oak": HostPublicKeys(ssh="", certificate="")},
            "dkim": {**public.dkim, domain: dict.fromkeys(public.dkim[domain], "")},
            "rspamd": "",
        }
    )
    stack = stack.model_copy(update={"keys": Keys(public=spoilt)})
    said = {problem.path for problem in missing_keys(stack)}
    assert {"keys.public.hosts.smtp-in-oak", "keys.public.rspamd"} <= said
    assert f"keys.public.dkim.{domain}.{stack.dkim.selector}" in said
    assert list(certificates_without_names(stack)) == []


def test_certificates_carry_every_name_that_a_host_serves(stack: Stack, ring: KeyRing) -> None:
    host = stack.all_hosts["maildrop-oak"]
    certificate = ring.public["hosts"][host.name]["certificate"]
    assert certificate_serves(certificate, stack.certificate_names(host), ring.public["authority"])
    names = x509.load_pem_x509_certificate(certificate.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "imap.hill.example" in names.value.get_values_for_type(x509.DNSName)


def test_a_secret_has_the_same_version_only_while_it_is_the_same(ring: KeyRing) -> None:
    keys = Keys(private=PrivateKeys.model_validate(ring.private))
    other = Keys(private=PrivateKeys(version_key="another"))
    assert keys.version("a") == keys.version("a") != keys.version("b")
    assert keys.version("a") != other.version("a")


def test_private_keys_are_not_shown_when_a_stack_is_printed(stack: Stack, ring: KeyRing) -> None:
    public, private = halves(ring)
    assert "PRIVATE KEY" not in repr(stack.model_copy(update={"keys": Keys(public=public, private=private)}))


def test_private_halves_that_were_lost_are_missed_and_no_placeholder_is_pushed(keyed_config: dict[str, Any]) -> None:
    public = {"public": keyed_config["keys"]["public"]}
    lost = parse("lab", "Pulumi.lab.yaml", keyed_config | {"keys": public})
    assert [problem.path for problem in missing_secrets(lost)] == ["keys.private"]
    private = json.loads(keyed_config["keys"]["private"])
    del private["hosts"]["smtp-in-oak"], private["dkim"]["dale.example"], private["srs"]
    private["hosts"]["smtp-in-elm"]["tls"] = private["session"] = ""
    partly = parse("lab", "Pulumi.lab.yaml", keyed_config | {"keys": public | {"private": json.dumps(private)}})
    assert [str(problem) for problem in missing_secrets(partly)] == [
        f"keys.private.{what}: is missing: run make keys STACK=lab"
        for what in ("dkim.dale.example.lab2026", "hosts.smtp-in-elm", "hosts.smtp-in-oak", "session", "srs")
    ]


def test_the_program_that_pushes_refuses_a_stack_without_its_private_halves(
    keyed_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = keyed_config | {"keys": {"public": keyed_config["keys"]["public"]}}
    monkeypatch.setattr(pulumi, "get_stack", lambda: "lab")
    monkeypatch.setattr(pulumi.Config, "get_object", lambda _, key: config.get(key))
    with pytest.raises(pulumi.RunError, match=r"keys\.private: is missing: take it from an earlier commit"):
        runpy.run_path(str(STACKS.parent / "__main__.py"))


def test_a_key_that_is_not_made_any_more_is_read_over(keyed_config: dict[str, Any]) -> None:
    private = json.loads(keyed_config["keys"]["private"]) | {"controller": "x"}
    before = Keys.parse_private(json.dumps(private))
    assert before == Keys.parse_private(keyed_config["keys"]["private"])
    assert "controller" not in before.model_dump()


def test_keys_of_the_scanners_are_in_rspamds_own_base32() -> None:
    assert len(rspamd_base32(bytes(32))) == 52
    assert rspamd_base32(b"\x01") == "by"
