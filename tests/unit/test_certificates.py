"""Which certificate is asked for, shown to whom, and what the name server is told about it."""

from __future__ import annotations

import copy
import datetime as dt
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from model.base import StackError
from model.checks import missing_secrets
from model.keys import Keys
from model.load import parse
from model.stack import Stack
from ops.keys import complete
from ops.name_server import asking_hosts, told
from services import certificate, identity
from services.bundle import bundle, secrets

ROOT = Path(__file__).parents[2]


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
        name: json.loads(files(keyed_stack, name)[certificate.SETTINGS])["certificates"][""]
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


# A certificate for each domain


def test_a_front_end_asks_for_one_certificate_of_its_services_and_one_of_each_domain(keyed_stack: Stack) -> None:
    found = files(keyed_stack, "frontend-oak")
    asked = json.loads(found[certificate.SETTINGS])["certificates"]
    assert asked[""] == ["nginx0.hill.example", "webmail.hill.example"]
    for domain in keyed_stack.domains:
        assert asked[domain] == [f"{label}.{domain}" for label in ("autoconfig", "autodiscover", "mta-sts")]
        shown = rf"server_name autoconfig\.{domain} \S+ mta-sts\.{domain};\s+ssl_certificate {identity.public(domain)};"
        assert re.search(shown, found["/etc/nginx/discovery.conf"])


def test_however_many_domains_there_are_no_order_has_many_names_and_nginx_has_room(
    keyed_config: dict[str, Any],
) -> None:
    config = copy.deepcopy(keyed_config)
    for number in range(150):
        domain = f"{'very-' * 9}long-name-{number}.example"
        config["domains"][domain], config["dns"]["zones"][domain] = {}, config["dns"]["zones"]["hill.example"]
    stack = parse("lab", "Pulumi.lab.yaml", config)
    found = files(stack, "frontend-oak")
    assert max(map(len, json.loads(found[certificate.SETTINGS])["certificates"].values())) == 3
    size = re.search(r"server_names_hash_max_size (\d+);", found["/etc/nginx/nginx.conf"])
    assert size and int(size[1]) >= 4 * 3 * len(stack.domains)
    assert "server_names_hash_bucket_size 512;" in found["/etc/nginx/nginx.conf"]


def test_a_domain_without_a_public_certificate_shows_what_all_else_shows(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["dns"]["zones"]["moor.example"] = None
    stack = parse("lab", "Pulumi.lab.yaml", config)
    assert identity.public("moor.example") not in "".join(files(stack, "frontend-oak").values())


# The program that asks


class Asker:
    """The program of a host, with an authority that refuses some, and a clock that can be set."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loader = SourceFileLoader("certificate", str(ROOT / f"templates/certificate{certificate.PROGRAM}"))
        spec = importlib.util.spec_from_loader("certificate", loader)
        assert spec
        self.program: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(self.program)
        self.refused: set[str] = set()
        self.orders: list[str] = []
        self.reloads = 0
        self.names = {of: [f"www.{of or 'hill.example'}"] for of in ("", "dale.example", "moor.example")}
        self.zones = {"hill.example": {"server": "192.0.2.1"}}
        self.time = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
        self.breaks = False
        self.elapsed = 0
        for name, path in (("TLS", "tls"), ("STATE", "state")):
            (folder / path).mkdir()
            monkeypatch.setattr(self.program, name, folder / path)
        monkeypatch.setattr(self.program, "STATUS", folder / "state/status.json")
        monkeypatch.setattr(self.program, "UNREAD", folder / "unread")
        for name in ("settings", "ask", "issued", "run", "now", "fitting"):
            monkeypatch.setattr(self.program, name, getattr(self, name))
        monkeypatch.setattr(self.program, "key_of", lambda files: "key")
        monkeypatch.setattr(self.program, "Certificate", self.Issued)
        monkeypatch.setattr(self.program.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
        self.monkeypatch = monkeypatch
        for of in self.names:
            self.program.files_of(of)[0].request.write_text("request")

    class Issued:
        """What was issued."""

        def __init__(self, path: Path) -> None:
            text = json.loads(path.read_text())
            self.names, self.key = set(text["names"]), "key"
            self.begins, self.ends = (dt.datetime.fromisoformat(text[word]) for word in ("begins", "ends"))

    def settings(self) -> dict[str, Any]:
        wanted = {"host": "h", "directory": "https://ca.example", "certificates": self.names, "zones": self.zones}
        return wanted | {"reload": ["nginx.service"]}

    def now(self) -> dt.datetime:
        return self.time

    def issued(self, files: Any) -> Any:
        return self.Issued(files.issued) if files.issued.exists() else None

    def fitting(self, files: Any) -> str | None:
        return str(files.issued.read_text()) if files.issued.exists() else None

    def run(self, *command: str) -> str:
        assert command == ("systemctl", "reload", "nginx.service")
        self.reloads += 1
        if self.breaks:
            raise KeyboardInterrupt
        return ""

    def ask(self, wanted: dict[str, Any], of: str, files: Any) -> None:
        self.orders.append(of)
        if of in self.refused:
            raise self.program.Failed(f"lego: no TXT record found at _acme-challenge.www.{of}")
        ends = self.time + dt.timedelta(days=90)
        text = {"names": self.names[of], "begins": self.time.isoformat(), "ends": ends.isoformat()}
        files.issued.write_text(json.dumps(text))

    def passes(self, by: str = "timer", **time: int) -> list[str]:
        """One run of the unit after some time; for which certificates it asked."""
        self.time += dt.timedelta(**time)
        if by == "timer":
            self.elapsed += 1
        # By hand, the one before is told once more.
        self.monkeypatch.setenv("TRIGGER_TIMER_REALTIME_USEC", str(self.elapsed))
        self.orders = []
        self.program.renew()
        self.program.install()
        return self.orders


@pytest.fixture
def asker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asker:
    return Asker(tmp_path, monkeypatch)


def test_a_domain_that_cannot_be_validated_fails_alone_and_is_named(asker: Asker) -> None:
    asker.refused = {"dale.example"}
    assert asker.passes() == ["", "dale.example", "moor.example"]
    assert [asker.program.public(of).exists() for of in asker.names] == [True, False, True]
    with pytest.raises(asker.program.Failed) as told:
        asker.program.verdict()
    assert re.findall(r"for (the .*?) \(", str(told.value)) == ["the names of dale.example"]
    assert "no TXT record found at _acme-challenge.www.dale.example" in str(told.value)


def test_what_was_refused_is_asked_for_later_and_later_and_at_once_by_hand_or_when_something_changed(
    asker: Asker,
) -> None:
    asker.refused = {"dale.example"}
    asker.passes()
    assert asker.passes(minutes=10) == []
    assert asker.passes(minutes=11) == ["dale.example"]
    assert asker.passes(minutes=21) == []
    assert asker.passes(by="hand") == ["dale.example"]
    asker.zones = {"hill.example": {"server": "192.0.2.2"}}
    assert asker.passes() == ["dale.example"]
    tried = sum(len(asker.passes(minutes=20)) for _ in range(3 * 24 * 7))
    assert 7 * 2 <= tried <= 7 * 2 + 5
    asker.refused = set()
    assert asker.passes(hours=12) == ["dale.example"]
    asker.program.verdict()
    assert asker.passes(minutes=20) == []


def test_those_that_never_failed_come_first_and_no_run_makes_more_orders_than_an_authority_bears(asker: Asker) -> None:
    asker.names |= {f"{number}.example": [f"www.{number}.example"] for number in range(40)}
    for of in asker.names:
        asker.program.files_of(of)[0].request.write_text("request")
    asker.refused = {"0.example"}
    assert len(asker.passes()) == 25
    rest = asker.passes(minutes=20)
    assert rest[-1] == "0.example" and len(rest) == 40 + 3 - 25 + 1


def test_what_was_put_in_place_by_a_run_that_was_killed_is_read_by_the_daemons_after_the_next(asker: Asker) -> None:
    asker.breaks = True
    with pytest.raises(KeyboardInterrupt):
        asker.passes()
    assert asker.program.public("moor.example").exists()
    asker.breaks, asker.reloads = False, 0
    assert asker.passes(minutes=20) == [] and asker.reloads == 1
    assert asker.passes(minutes=20) == [] and asker.reloads == 1


def test_a_status_of_the_program_before_is_read(asker: Asker) -> None:
    asker.passes()
    old = json.loads(asker.program.STATUS.read_text())["certificates"][""]
    asker.program.STATUS.write_text(json.dumps(old))
    assert "" not in asker.passes(minutes=20)


def test_the_certificate_of_a_domain_that_left_stays_for_a_push_that_is_rolled_back_until_it_ends(asker: Asker) -> None:
    asker.passes()
    asker.monkeypatch.setattr(asker.program, "sign", lambda files, names: None)
    del asker.names["moor.example"]
    place, (kept, _) = asker.program.public("moor.example"), asker.program.files_of("moor.example")
    asker.program.prepare()
    assert place.exists() and kept.issued.exists() and not kept.request.exists()
    asker.time += dt.timedelta(days=91)
    asker.program.prepare()
    assert not place.exists() and not kept.issued.exists()
    assert all(asker.program.public(of).exists() for of in asker.names)


# What is shown until a certificate was issued


@pytest.fixture
def first(keyed_stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, str]]:
    """Runs what a push of a front end runs below a folder; which file each public certificate is equal to."""
    tls, state = tmp_path / "tls", tmp_path / "acme"
    script = certificate.first(keyed_stack, keyed_stack.all_hosts["frontend-oak"])
    script = script.replace(identity.FOLDER, f"{tls}/").replace(certificate.STATE, str(state))

    def run() -> dict[str, str]:
        subprocess.run(["sh", "-c", script], check=True, capture_output=True)
        texts = {path.read_text(): path.name for path in (tls / "host.pem", *state.glob("*"))}
        return {path.name: texts[path.read_text()] for path in tls.glob("public*")}

    for folder in (tls, state):
        folder.mkdir()
    return run


def self_signed(key: ec.EllipticCurvePrivateKey, path: Path, *names: str) -> None:
    """A certificate with names, each another one."""
    named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, path.name)])
    begins = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(named, named, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(begins).not_valid_after(begins + dt.timedelta(days=90))
    made = builder.add_extension(x509.SubjectAlternativeName([*map(x509.DNSName, names)]), critical=False)
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def test_a_front_end_of_an_earlier_version_shows_its_one_certificate_for_the_domains_that_it_holds(
    first: Callable[[], dict[str, str]], keyed_stack: Stack, tmp_path: Path
) -> None:
    names = keyed_stack.acme_certificates(keyed_stack.all_hosts["frontend-oak"])
    every = [name for those in names.values() for name in those]
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    self_signed(key, tmp_path / "tls/host.pem", *every)
    self_signed(key, tmp_path / "acme/issued.pem", *(name for name in every if name not in names["moor.example"]))
    shutil.copyfile(tmp_path / "acme/issued.pem", tmp_path / "tls/public.pem")
    self_signed(key, tmp_path / "acme/dale.example.issued.pem", *names["dale.example"])
    shown = first()
    assert set(shown) == {Path(identity.public(of)).name for of in names}
    assert shown["public.pem"] == shown["public-hill.example.pem"] == "issued.pem"
    assert shown["public-dale.example.pem"] == "dale.example.issued.pem"
    assert shown["public-moor.example.pem"] == "host.pem"
    # With another key none of them serves any more.
    self_signed(other, tmp_path / "tls/host.pem", *every)
    assert set(first().values()) == {"host.pem"}
