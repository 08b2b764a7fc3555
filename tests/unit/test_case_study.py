"""The case study as a stack: files and zones say what its operator's own say."""

from __future__ import annotations

import re

import pytest

from model.load import load
from model.stack import Stack
from services.bundle import bundle
from services.zones import RRset, rrsets
from tests.unit.conftest import STACKS


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
        "reject_rbl_client dnsbl-1.uceprotect.net",
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
    assert "mail_max_userip_connections = 50\n" in file(ipng, "maildrop0-ddln0", "/etc/dovecot/dovecot.conf")


def test_aliases_lead_where_they_are_told_to(ipng: Stack) -> None:
    virtual = dict(line.split(" ", 1) for line in file(ipng, "smtp-in-chrma0", "/etc/postfix/virtual").splitlines())
    assert virtual["pim@ipng.ch"] == virtual["pim@ipng.nl"] == "pim+ipng@maildrop.net.ipng.ch"
    assert virtual["noc@frys-ix.net"] == "pim+frysix@maildrop.net.ipng.ch, noc@eritap.com"
    assert virtual["event@frys-ix.net"] == "someplace@example.com"
