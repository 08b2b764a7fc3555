"""Keys are replaced in steps, each of which waits until what goes by the one before has it."""

from __future__ import annotations

import copy
import datetime as dt
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from check.certificates import by_authority, judge_rolls, of_pem
from check.finding import Severity
from model.keys import Keys, PrivateKeys, PublicKeys
from model.load import parse
from model.stack import Stack
from ops.__main__ import main
from ops.keys import complete
from ops.pulumi import OperatorError, Project
from ops.rolling import roll
from services import identity, postsrsd
from services.bundle import bundle, secrets
from services.zones import rrsets
from tests.unit.conftest import LAB

MX = "_25._tcp.smtp-in.hill.example"
OWN = "_25._tcp.maildrop.elm.net.hill.example"


@dataclass
class Operator:
    """Somebody with a stack, who replaces keys and brings them to where they belong."""

    stack: Stack
    state: dict[str, Any] = field(default_factory=dict)

    def up(self, ago: float = 3600, without: Iterable[str] = ()) -> None:
        """What ``make up`` leaves in the Pulumi state, so many seconds ago."""
        before = {r["urn"]: r for r in self.state.get("deployment", {}).get("resources", [])}
        modified = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=ago)).isoformat()
        made: list[tuple[str, dict[str, Any]]] = []
        for rrset in rrsets(self.stack):
            made.append((f"{rrset.name}-{rrset.type}", {"outputs": {"records": sorted(rrset.records)}}))
        for host in self.stack.all_hosts.values():
            if host.site not in without:
                made.append((f"{host.name}-files", {"inputs": {"stdin": json.dumps(bundle(self.stack, host))}}))
        for name, values in made:
            resource = {"urn": f"urn::{name}", "modified": modified, **values}
            old = before.get(resource["urn"], {})
            if {**resource, "modified": ""} != {**old, "modified": ""}:
                before[resource["urn"]] = resource
        self.state = {"deployment": {"resources": list(before.values())}}

    def roll(self, *words: str) -> list[str]:
        """``make keys ROLL=…``: what was done."""
        keys = self.stack.keys
        assert keys.private
        public, private, steps = roll(self.stack, words, keys.public, keys.private, self.state)
        ring = complete(self.stack, public, private)
        keys = Keys(public=PublicKeys.model_validate(ring.public), private=PrivateKeys.model_validate(ring.private))
        self.stack = self.stack.model_copy(update={"keys": keys})
        return [step.done for step in steps]

    def refused(self, word: str) -> str:
        with pytest.raises(OperatorError) as refusal:
            self.roll(word)
        return str(refusal.value)

    def tlsa(self, name: str) -> set[str]:
        return set(next(r for r in rrsets(self.stack) if (r.name, r.type) == (name, "TLSA")).records)

    def secret(self, host: str, name: str) -> str:
        return secrets(self.stack, self.stack.all_hosts[host])[name]

    def file(self, host: str, path: str) -> str:
        return str(bundle(self.stack, self.stack.all_hosts[host])["files"][path]["content"])


@pytest.fixture
def operator(keyed_stack: Stack) -> Operator:
    operator = Operator(keyed_stack)
    operator.up()
    return operator


# TLS keys of hosts


@pytest.mark.parametrize(("host", "name"), [("smtp-in-oak", MX), ("maildrop-elm", OWN)])
def test_a_tls_key_is_in_tlsa_before_it_serves_and_for_a_while_after(operator: Operator, host: str, name: str) -> None:
    word, old, first = f"tls/{host}", operator.tlsa(name), operator.secret(host, "tls-key")
    operator.roll(word)
    both = operator.tlsa(name)
    assert old < both and len(both) == len(old) + 1
    assert operator.secret(host, "tls-key") == first
    following = operator.secret(host, "next-tls-key")
    operator.up()
    operator.roll(word)
    assert operator.tlsa(name) == both
    assert operator.secret(host, "tls-key") == following
    assert "next-tls-key" not in secrets(operator.stack, operator.stack.all_hosts[host])
    operator.up()
    operator.roll(word)
    new = operator.tlsa(name)
    assert new < both and len(new) == len(old) and new != old
    assert not list(judge_rolls(operator.stack))


def test_a_key_does_not_serve_before_its_tlsa_record_is_known_everywhere(operator: Operator) -> None:
    word = "tls/smtp-in-oak"
    operator.roll(word)
    assert "smtp-in-oak does not have its next key yet: make up STACK=lab first" in operator.refused(word)
    operator.up(ago=80, without=["oak"])
    assert "smtp-in-oak does not have its next key yet" in operator.refused(word)
    operator.up(ago=80)
    left = re.search(rf"others may remember {MX} TLSA without the next key for another (\d+) s", operator.refused(word))
    assert left and 30 < int(left[1]) <= 40
    later = Operator(operator.stack)
    later.up(ago=121)
    assert later.roll(word) == ["TLS key of smtp-in-oak: the next one is the one that serves"]


def test_the_key_before_stays_in_tlsa_until_the_host_has_the_new_one(operator: Operator) -> None:
    word = "tls/smtp-in-elm"
    operator.roll(word)
    operator.up()
    operator.roll(word)
    operator.up(without=["elm"])
    assert "smtp-in-elm does not serve its new certificate yet: make up STACK=lab first" in operator.refused(word)
    operator.up()
    assert operator.roll(word) == ["TLS key of smtp-in-elm: the one before stands in TLSA no more"]


def test_a_host_that_no_mx_leads_to_needs_no_wait_and_no_third_step(operator: Operator) -> None:
    operator.roll("tls/frontend-oak")
    operator.up(ago=1)
    operator.roll("tls/frontend-oak")
    public = operator.stack.keys.public.hosts["frontend-oak"]
    assert (public.next, public.previous) == ("", "")


def test_a_new_key_has_a_certificate_at_once_and_nothing_else_changes(operator: Operator, keyed_stack: Stack) -> None:
    word = "tls/smtp-in-ash"
    operator.roll(word)
    operator.up()
    operator.roll(word)
    before, after = keyed_stack.keys, operator.stack.keys
    assert before.private and after.private
    held = after.public.hosts["smtp-in-ash"].certificate
    assert held != before.public.hosts["smtp-in-ash"].certificate and by_authority(of_pem(held), operator.stack)
    others = {"hosts": {name: keys for name, keys in before.public.hosts.items() if name != "smtp-in-ash"}}
    assert others["hosts"].items() < after.public.hosts.items()
    assert after.public.hosts["smtp-in-ash"].ssh == before.public.hosts["smtp-in-ash"].ssh
    assert after.private.model_dump(exclude={"hosts"}) == before.private.model_dump(exclude={"hosts"})


def test_what_make_up_does_not_publish_is_left_to_whoever_does(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["dns"]["zones"]["hill.example"] = None
    config["dns"]["mta_sts"] = "testing"
    operator = Operator(parse("lab", "Pulumi.lab.yaml", config))
    keys = operator.stack.keys
    assert keys.private
    _, _, steps = roll(operator.stack, ["tls/smtp-in-oak"], keys.public, keys.private, {})
    assert f"make up does not publish {MX}" in steps[0].after
    operator.roll("tls/smtp-in-oak")
    operator.up(ago=1)
    operator.state["deployment"]["resources"] = [
        r for r in operator.state["deployment"]["resources"] if not r["urn"].endswith("-TLSA")
    ]
    operator.roll("tls/smtp-in-oak")


def test_the_check_tells_of_a_key_that_is_half_replaced(operator: Operator) -> None:
    operator.roll("tls/smtp-in-oak", "authority")
    found = list(judge_rolls(operator.stack))
    assert {finding.severity for finding in found} == {Severity.ADVICE}
    assert [(f.where, f.what) for f in found] == [
        ("authority", "the stack's authority is being replaced"),
        ("smtp-in-oak", "its TLS key is being replaced"),
    ]
    assert "make keys STACK=lab ROLL=tls/smtp-in-oak" in found[1].advice


# Keys of the stack


def test_all_hosts_believe_an_authority_before_it_signs_and_after_it_signed(operator: Operator) -> None:
    old = operator.stack.keys.public
    operator.roll("authority")
    new = operator.stack.keys.public.next_authority
    assert operator.file("smtp-in-oak", identity.AUTHORITY) == old.authority + new
    assert operator.stack.keys.public.hosts == old.hosts
    operator.up(without=["ash"])
    assert "frontend-ash, smtp-in-ash, smtp-out-ash does not believe the next one yet" in operator.refused("authority")
    operator.up()
    operator.roll("authority")
    assert operator.file("smtp-in-oak", identity.AUTHORITY) == new + old.authority
    for host in operator.stack.hosts:
        held = of_pem(operator.file(host, identity.CERTIFICATE))
        held.verify_directly_issued_by(of_pem(new))
        assert operator.secret(host, "tls-key") == secrets_before(operator, host)
        assert by_authority(held, operator.stack) and by_authority(of_pem(old.hosts[host].certificate), operator.stack)
    assert "does not serve its new certificate yet" in operator.refused("authority")
    operator.up()
    operator.roll("authority")
    assert operator.file("smtp-in-oak", identity.AUTHORITY) == new
    assert not by_authority(of_pem(old.hosts["smtp-in-oak"].certificate), operator.stack)


def secrets_before(operator: Operator, host: str) -> str:
    assert operator.stack.keys.private
    return operator.stack.keys.private.hosts[host].tls


def test_bounces_to_what_the_secret_before_signed_are_known(operator: Operator) -> None:
    def lines() -> list[str]:
        return operator.secret("smtp-in-oak", "srs").splitlines()

    (old,) = lines()
    operator.roll("srs")
    assert lines()[0] == old and len(lines()) == 2
    new = lines()[1]
    assert "smtp-in-oak, smtp-in-elm, smtp-in-ash has no next secret yet" in operator.refused("srs")
    operator.up()
    operator.roll("srs")
    assert lines() == [new, old]
    operator.up()
    operator.roll("srs")
    assert lines() == [new]
    assert postsrsd.SECRETS == "/etc/postsrsd.secret"


def test_what_needs_no_steps_is_replaced_at_once(operator: Operator) -> None:
    before = operator.stack.keys.private
    operator.roll("session", "replication", "tsig/smtp-in-oak", "ssh/smtp-in-oak")
    after = operator.stack.keys.private
    assert before and after
    assert len(after.session) == 24
    for name in ("session", "replication"):
        assert getattr(before, name) != getattr(after, name) != ""
    changed = {name for name in before.tsig if before.tsig[name] != after.tsig[name]}
    assert changed == {"smtp-in.oak.net.hill.example"}
    assert before.hosts["smtp-in-oak"].ssh != after.hosts["smtp-in-oak"].ssh
    assert before.hosts["smtp-in-oak"].tls == after.hosts["smtp-in-oak"].tls
    assert before.srs == after.srs and before.version_key == after.version_key


def test_the_host_key_of_a_machine_that_is_not_the_stack_s_is_its_operator_s(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    del config["hosts"]["smtp-in-oak"]["machine"]
    config["hosts"]["smtp-in-oak"]["existing"] = {"host_key": "ssh-ed25519 AAAA"}
    operator = Operator(parse("lab", "Pulumi.lab.yaml", config))
    assert "change its key on it, and existing.host_key here" in operator.refused("ssh/smtp-in-oak")


# What an operator says


def test_what_can_be_replaced_is_told_to_whoever_names_something_else(operator: Operator) -> None:
    known = "what can be replaced is tls/HOST, ssh/HOST, tsig/HOST, authority, srs, session, replication "
    for word in ("dkim", "tls", "tls/smtp-in-oka", "srs/smtp-in-oak"):
        assert known in operator.refused(word)


def test_where_one_step_cannot_be_taken_none_is(operator: Operator) -> None:
    before = operator.stack.keys
    operator.roll("tls/smtp-in-oak")
    half = operator.stack.keys
    assert half != before
    with pytest.raises(OperatorError, match="nothing was changed"):
        operator.roll("session", "tls/smtp-in-oak")
    assert operator.stack.keys == half


class Secrets:
    """Pulumi, as far as it keeps a secret in a stack file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = ""
        self.fails = False
        monkeypatch.setattr(Project, "ensure_exists", lambda project: None)
        monkeypatch.setattr(Project, "run", self.run)

    def run(self, *arguments: str, text: str | None = None) -> str:
        if arguments[:2] == ("config", "get"):
            return self.text
        if arguments[0] == "stack":
            return "{}"
        if self.fails:
            raise OperatorError("no such passphrase")
        file = Path(arguments[arguments.index("--config-file") + 1])
        document = yaml.safe_load(file.read_text())
        self.text = text or ""
        document["config"].setdefault("posthorn:keys", {})["private"] = {"secure": "v1:" + self.text[:8]}
        file.write_text(yaml.dump(document))
        return ""


def test_the_stack_file_is_written_in_one_step_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "Pulumi.x.yaml"
    file.write_text(LAB.read_text())
    monkeypatch.setenv("POSTHORN_PROJECT", str(tmp_path))
    pulumi = Secrets(monkeypatch)
    assert main(["keys", "x"]) == 0
    made = yaml.safe_load(file.read_text())["config"]["posthorn:keys"]
    # What is empty unless a key is being replaced is not written.
    assert set(made["public"]["hosts"]["smtp-in-oak"]) == {"ssh", "certificate"}
    assert main(["keys", "x", "--roll", "tls/smtp-in-oak"]) == 0
    said = capsys.readouterr().out
    assert "TLS key of smtp-in-oak: the next one was made" in said
    assert "next: make up STACK=x, and 120 s later make keys STACK=x ROLL=tls/smtp-in-oak" in said
    rolled = yaml.safe_load(file.read_text())["config"]["posthorn:keys"]
    following = rolled["public"]["hosts"]["smtp-in-oak"].pop("next")
    assert len(following) == 64 and rolled["public"] == made["public"]
    assert json.loads(pulumi.text)["hosts"]["smtp-in-oak"]["next"].startswith("-----BEGIN PRIVATE KEY")
    before, pulumi.fails = file.read_text(), True
    assert main(["keys", "x", "--roll", "session"]) == 1
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["Pulumi.x.yaml"]
