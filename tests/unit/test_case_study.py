"""The case study as a stack: files and zones say what its operator's own say."""

from __future__ import annotations

import json
import re

import pytest

from model.keys import PrivateKeys, PublicKeys
from model.load import load, parse, read_file
from model.stack import Stack
from ops.keys import complete
from services.bundle import bundle
from services.zones import RRset, rrsets
from tests.unit.conftest import STACKS
from tests.unit.test_platform import Recorder, build, recorder

__all__ = ["recorder"]


@pytest.fixture(scope="module")
def ipng() -> Stack:
    return load(STACKS / "Pulumi.ipng.yaml")


@pytest.fixture(scope="module")
def zones(ipng: Stack) -> dict[tuple[str, str], RRset]:
    return {(rrset.name, rrset.type): rrset for rrset in rrsets(ipng)}


def file(stack: Stack, host: str, path: str) -> str:
    content: str = bundle(stack, stack.all_hosts[host])["files"][path]["content"]
    return content


@pytest.mark.parametrize(
    ("name", "kind", "ttl", "records"),
    [
        ("ublog.tech", "MX", 86400, {"10 smtp-in.ipng.ch."}),
        ("ipng.nl", "MX", 86400, {"10 smtp-in.ipng.ch."}),
        ("ipng.ch", "MX", 86400, {"10 smtp-in.ipng.ch."}),
        ("smtp-in.ipng.ch", "A", 60, {"46.20.246.125", "94.142.245.85", "194.1.163.141"}),
        (
            "smtp-in.ipng.ch",
            "AAAA",
            60,
            {"2a02:2528:ff00::125", "2a02:898:146:1::5", "2001:678:d78:6::141"},
        ),
        ("smtp-out.net.ipng.ch", "A", 60, {"198.19.6.73", "198.19.4.230", "198.19.6.135"}),
        (
            "smtp-out.net.ipng.ch",
            "AAAA",
            60,
            {"2001:678:d78:50e::9", "2001:678:d78:50a::6", "2001:678:d78:510::7"},
        ),
        ("smtp-out.ipng.ch", "CNAME", 3600, {"nginx0.ipng.ch."}),
        ("imap.ipng.ch", "CNAME", 60, {"nginx0.ipng.ch."}),
        ("nginx0.ipng.ch", "A", 600, {"194.1.163.151", "46.20.246.124", "94.142.241.189"}),
        ("nginx0.ipng.ch", "AAAA", 600, {"2001:678:d78:7::151", "2a02:2528:ff00::124", "2a02:898:146::5"}),
        (
            "maildrop.net.ipng.ch",
            "MX",
            300,
            {"10 maildrop0.chbtl0.net.ipng.ch.", "20 maildrop0.ddln0.net.ipng.ch."},
        ),
        ("_spf.ipng.ch", "TXT", 3600, {'"v=spf1 include:_spf4.ipng.ch include:_spf6.ipng.ch ~all"'}),
        (
            "_spf4.ipng.ch",
            "TXT",
            3600,
            # The operator's own record joins two strings without the space between ip4:94.142.245.80/29 and the next.
            {
                '"v=spf1 ip4:46.20.246.112/28 ip4:46.20.243.176/28 ip4:94.142.245.80/29 '
                'ip4:94.142.241.184/29 ip4:194.1.163.0/24 ~all"'
            },
        ),
        (
            "_spf6.ipng.ch",
            "TXT",
            3600,
            {'"v=spf1 ip6:2a02:2528:ff00::/40 ip6:2a02:898:146::/48 ip6:2001:678:d78::/48 ~all"'},
        ),
    ],
)
def test_a_record_is_published_as_its_operator_has_it(
    zones: dict[tuple[str, str], RRset], name: str, kind: str, ttl: int, records: set[str]
) -> None:
    assert zones[name, kind].ttl == ttl
    assert set(zones[name, kind].records) == records


def test_five_sites_hold_eleven_hosts_of_the_told_size(ipng: Stack) -> None:
    assert len(ipng.sites) == 5 and len(ipng.hosts) == 11
    for host in ipng.all_hosts.values():
        assert host.machine is not None
        size = host.machine
        assert (size.vcpus, size.memory, size.system_disk, size.interfaces) == (4, 8192, 16, 4)


def test_front_ends_prefer_the_told_primaries(ipng: Stack) -> None:
    text = file(ipng, "nginx0-nlams2", "/etc/nginx/nginx.conf")
    servers = re.findall(r"server (\S+):(\d+) max_fails=2 fail_timeout=10s( backup)?;", text)
    assert servers[:3] == [
        ("198.19.6.135", "10587", ""),
        ("198.19.6.73", "10587", " backup"),
        ("198.19.4.230", "10587", " backup"),
    ]


def test_blocklists_are_asked_as_told(ipng: Stack) -> None:
    text = file(ipng, "smtp-in-frggh0", "/etc/postfix/main.cf")
    restrictions = text.partition("smtpd_recipient_restrictions =")[2].partition("permit\n")[0]
    assert [line.strip(" ,") for line in restrictions.splitlines() if "_rbl" in line or "_rhsbl" in line] == [
        "reject_rbl_client zen.spamhaus.org=127.0.0.[2..11]",
        "reject_rhsbl_sender dbl.spamhaus.org=127.0.1.[2..99]",
        "reject_rhsbl_helo dbl.spamhaus.org=127.0.1.[2..99]",
        "reject_rhsbl_reverse_client dbl.spamhaus.org=127.0.1.[2..99]",
        "warn_if_reject reject_rbl_client zen.spamhaus.org=127.255.255.[1..255]",
        # Told without replies: those by which a list tells of an error never count here.
        "reject_rbl_client dnsbl-1.uceprotect.net=127.0.[0..2].[2..254]",
        "reject_rbl_client bl.0spam.org=127.0.0.[7..9]",
    ]


def test_banners_tell_the_public_name_and_the_host(ipng: Stack) -> None:
    text = file(ipng, "smtp-out-chrma0", "/etc/postfix/main.cf")
    assert "myhostname = smtp-out.ipng.ch" in text
    assert "smtpd_banner = $myhostname ESMTP $mail_name (smtp-out.chrma0.net.ipng.ch)" in text


def test_limits_are_the_told_ones(ipng: Stack) -> None:
    text = file(ipng, "smtp-out-chrma0", "/etc/postfix/main.cf")
    for line in (
        "smtpd_client_connection_count_limit = 4",
        "smtpd_client_connection_rate_limit = 10",
        "smtpd_client_message_rate_limit = 60",
        "header_size_limit = 4096000",
        "message_size_limit = 52428800",
    ):
        assert f"{line}\n" in text
    dovecot = file(ipng, "maildrop0-ddln0", "/etc/dovecot/dovecot.conf")
    assert "mail_max_userip_connections = 50\n" in dovecot
    assert "service managesieve {\n  process_limit = 256\n}" in dovecot


def test_aliases_lead_where_they_are_told_to(ipng: Stack) -> None:
    virtual = dict(line.split(" ", 1) for line in file(ipng, "smtp-in-chrma0", "/etc/postfix/virtual").splitlines())
    assert virtual["pim@ipng.ch"] == virtual["pim@ipng.nl"] == "pim+ipng@maildrop.net.ipng.ch"
    assert virtual["noc@frys-ix.net"] == "pim+frysix@maildrop.net.ipng.ch, noc@eritap.com"
    assert virtual["event@frys-ix.net"] == "someplace@example.com"


def test_every_domain_is_signed_for_by_the_told_selector(ipng: Stack) -> None:
    keys = file(ipng, "smtp-out-nlams2", "/etc/opendkim/keytable")
    assert "ipng.ch ipng.ch:DKIM2022:/etc/opendkim/keys/DKIM2022-ipng.ch.private\n" in keys
    signers = file(ipng, "smtp-out-nlams2", "/etc/opendkim/signers").splitlines()
    for domain in ("ipng.nl", "ipng.ch", "ublog.tech"):
        assert f"*@{domain} {domain}" in signers and f"*@*.{domain} {domain}" in signers


def test_addresses_that_nobody_reads_are_thrown_away_and_every_domain_has_its_people(ipng: Stack) -> None:
    virtual = dict(line.split(" ", 1) for line in file(ipng, "smtp-in-chrma0", "/etc/postfix/virtual").splitlines())
    assert virtual["noreply@ipng.ch"] == "noreply@discard.invalid"
    for name in ("postmaster", "hostmaster", "abuse"):
        for domain in ("ipng.ch", "ipng.nl", "frys-ix.net"):
            assert virtual[f"{name}@{domain}"] == f"pim+{name}@maildrop.net.ipng.ch"
    assert virtual["arend@frys-ix.net"] == "arend+frysix@eritap.com"
    domains = file(ipng, "smtp-in-chrma0", "/etc/postfix/virtual-domains").split()[::3]
    assert {"ublog.tech", "frys-ix.net", "ipng.nl", "ipng.ch"} <= set(domains)


def test_smtp_in_takes_25_and_465_without_a_login_and_smtp_out_its_own_ports(ipng: Stack) -> None:
    def services(host: str) -> list[str]:
        lines = file(ipng, host, "/etc/postfix/master.cf").splitlines()
        return [line.split()[0] for line in lines if re.match(r"\S+\s+inet\s", line) and not line.startswith("127.")]

    assert services("smtp-in-nlams2") == services("maildrop0-chbtl0") == ["smtp", "smtps"]
    # Its two twins for the front ends, one for the webmail, and three for the mailbox hosts.
    assert services("smtp-out-frggh0") == ["587", "10587", "10465", "12587", "10588", "10591", "10589"]
    assert "sasl" not in file(ipng, "smtp-in-nlams2", "/etc/postfix/main.cf")


def test_filters_are_kept_as_told(ipng: Stack) -> None:
    text = file(ipng, "maildrop0-chbtl0", "/etc/dovecot/dovecot.conf")
    for line in (
        "mail_location = mdbox:~/mdbox",
        "sieve_before = /etc/dovecot/sieve/before.d",
        "sieve_after = /etc/dovecot/sieve/after.d",
        "sieve_extensions = +editheader",
        "sieve_plugins = sieve_imapsieve sieve_extprograms",
        "sieve_global_extensions = +vnd.dovecot.pipe",
        "imapsieve_mailbox1_name = Junk",
        "imapsieve_mailbox2_from = Junk",
    ):
        assert f"  {line}\n" in text or f"{line}\n" in text


def test_front_ends_send_their_own_mail_by_smtp_out(ipng: Stack) -> None:
    text = file(ipng, "nginx0-chrma0", "/etc/smtpd.conf")
    assert 'relay host "smtp+tls://stack@smtp-out.net.ipng.ch:587" auth <secrets>' in text
    assert 'mail-from "postmaster@ipng.ch"' in text


def test_the_web_mail_is_in_lille_and_has_a_standby(ipng: Stack) -> None:
    assert [host.name for host in ipng.hosts_with("webmail")] == ["nginx0-frggh0", "nginx0-nlams2"]
    assert "webmail.ipng.ch" in file(ipng, "nginx0-chrma0", "/etc/nginx/nginx.conf")


def test_the_case_study_can_be_previewed(recorder: Recorder, ipng: Stack) -> None:
    ring = complete(ipng, PublicKeys(), PrivateKeys())
    config = read_file(STACKS / "Pulumi.ipng.yaml")
    config["keys"] = {"public": ring.public, "private": json.dumps(ring.private)}
    build(parse("ipng", "Pulumi.ipng.yaml", config))
    assert len(recorder.of_type("remote:Command")) == 2 * 11
    machines = recorder.of_type("libvirt:index/domain:Domain")
    assert set(machines) == set(ipng.hosts)
    assert {(m.inputs["vcpu"], m.inputs["memory"]) for m in machines.values()} == {(4, 8192)}
    # Its zones are published elsewhere.
    assert not recorder.of_type("pulumi-python:dynamic")


def test_the_web_mail_is_where_the_text_has_it_and_for_whom(ipng: Stack) -> None:
    text = file(ipng, "nginx0-chrma0", "/etc/nginx/nginx.conf")
    assert "server_name webmail.ipng.ch webmail.net.ipng.ch webmail;" in text
    assert "return 301 https://webmail.ipng.ch$request_uri;" in text
    assert "default webmail-nginx0-frggh0;" in text
    assert re.search(r"geo \$welcome {\s+default 0;\s+198\.19\.0\.0/16 1;", text)
    assert re.search(r"if \(\$welcome = 0\) {\s+return 302 https://ipng.ch/;", text)
    settings = file(ipng, "nginx0-frggh0", "/etc/roundcube/config.inc.php")
    for line in ("['skin'] = 'elastic'", "['default_list_mode'] = 'threads'", "['zipdownload_selection'] = true"):
        assert f"$config{line};" in settings
