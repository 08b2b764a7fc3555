"""What goes wrong in set-ups of this kind (docs/case-study.md has the list): the settings that keep us out of it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from model.load import parse
from model.settings import DnsblRule
from model.stack import Stack
from services.bundle import bundle
from services.postfix import LOCAL, OWN
from services.smtp_in import restriction

ROOT = Path(__file__).parents[2]
POSTFIX = ("smtp-in-oak", "smtp-out-elm", "maildrop-oak")


@pytest.fixture(scope="module", params=[12, 13])
def files(request: pytest.FixtureRequest, keyed_config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Host to path to text, on both releases."""
    config = keyed_config | {"service": keyed_config["service"] | {"release": request.param}}
    stack: Stack = parse("lab", "Pulumi.lab.yaml", config)
    return {
        name: {path: file["content"] for path, file in bundle(stack, host)["files"].items()}
        for name, host in stack.all_hosts.items()
    }


def main_cf(files: dict[str, dict[str, str]], host: str) -> dict[str, str]:
    text = re.sub(r"\n[ \t]+", " ", re.sub(r"^#.*\n", "", files[host]["/etc/postfix/main.cf"], flags=re.MULTILINE))
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


@pytest.mark.parametrize("host", POSTFIX)
def test_nothing_is_smuggled_and_only_loopback_is_trusted(files: dict[str, dict[str, str]], host: str) -> None:
    settings = main_cf(files, host)
    assert settings["smtpd_forbid_bare_newline"] == "normalize"
    assert settings["smtpd_forbid_bare_newline_exclusions"] == ""
    assert settings["smtpd_forbid_unauth_pipelining"] == "yes"
    assert settings["mynetworks"] == "127.0.0.0/8 [::1]/128"


def test_a_recipient_whom_postfix_takes_from_everybody_lets_nobody_in_at_submission(
    files: dict[str, dict[str, str]],
) -> None:
    settings = main_cf(files, "smtp-out-elm")
    assert settings["smtpd_client_restrictions"] == "permit_sasl_authenticated, reject"
    # After the data too: for "postmaster" without a domain, nothing is asked at RCPT.
    assert settings["smtpd_end_of_data_restrictions"] == "$smtpd_client_restrictions"


@pytest.mark.parametrize("host", POSTFIX)
def test_a_moment_without_the_next_host_costs_a_mail_less_than_a_minute(
    files: dict[str, dict[str, str]], host: str
) -> None:
    settings = main_cf(files, host)
    times = [int(settings[key].removesuffix("s")) for key in ("queue_run_delay", "minimal_backoff_time")]
    assert times[0] <= times[1] and sum(times) < 60


@pytest.mark.parametrize("host", POSTFIX)
def test_receivers_without_tls_get_their_mail_and_nothing_deprecated_is_set(
    files: dict[str, dict[str, str]], host: str
) -> None:
    settings = main_cf(files, host)
    assert settings["smtp_tls_security_level"] == "dane" and settings["smtp_dns_support_level"] == "dnssec"
    gone = {"smtpd_use_tls", "smtp_use_tls", "smtpd_enforce_tls", "smtpd_tls_dh1024_param_file", "disable_dns_lookups"}
    assert not gone & set(settings) and not [key for key in settings if key.endswith("_per_site")]


def test_no_map_needs_berkeley_db_and_no_file_of_dh_parameters_is_asked_for(files: dict[str, dict[str, str]]) -> None:
    for host, texts in files.items():
        for path, text in texts.items():
            if path.startswith("/etc/postfix/"):
                assert not re.search(r"(^|[\s=])(hash|btree):", text), f"{host}: {path}"
            if path.startswith("/etc/dovecot/"):
                assert "ssl_dh" not in text


@pytest.mark.parametrize("host", POSTFIX)
def test_a_filter_that_is_away_defers_and_is_asked_on_loopback_alone(
    files: dict[str, dict[str, str]], host: str
) -> None:
    settings = main_cf(files, host)
    assert settings["milter_default_action"] == "tempfail"
    asked = " ".join(settings.get(key, "") for key in ("smtpd_milters", "non_smtpd_milters"))
    assert all(milter.startswith("inet:127.0.0.1:") for milter in asked.replace(",", " ").split())


def test_bounces_are_signed_where_they_leave(files: dict[str, dict[str, str]]) -> None:
    for host in ("smtp-in-oak", "smtp-out-elm"):
        settings = main_cf(files, host)
        assert "8891" in settings["non_smtpd_milters"] and "bounce" in settings["internal_mail_filter_classes"]
    # The mailbox hosts have no key, and no way but through smtp-out.
    assert main_cf(files, "maildrop-oak")["default_transport"] == "smtp-out:[smtp-out.net.hill.example]:10588"
    assert "/etc/opendkim.conf" not in files["maildrop-oak"]
    assert "2001:db8:1:1::13" in files["smtp-out-elm"]["/etc/opendkim.conf"]


def test_what_filters_send_is_held_to_the_user_and_only_what_they_say_is_signed(
    files: dict[str, dict[str, str]],
) -> None:
    checks = files["maildrop-elm"]["/etc/postfix/sieve"]
    for what, port in (("says", 10591), ("redirects", 10589)):
        assert f"/^X-Posthorn-Filter: [^ ]+ {what}$/  FILTER filters:[smtp-out.net.hill.example]:{port}\n" in checks
    filters = re.split(r"\n(?=\S)", files["maildrop-elm"]["/etc/postfix/master.cf"])
    assert not [text for text in filters if text.startswith("filters ") and "soft_bounce" in text]
    services = re.split(r"\n(?=\S)", files["smtp-out-oak"]["/etc/postfix/master.cf"])
    own, redirected, said = (next(text for text in services if text.startswith(f"105{port}")) for port in (88, 89, 91))
    assert "-o smtpd_milters=inet:127.0.0.1:8891\n" in own
    assert "-o smtpd_milters=inet:127.0.0.1:11332\n" in redirected
    # As what users submit: the scanner, then the signer.
    assert "smtpd_milters" not in said
    assert main_cf(files, "smtp-out-oak")["smtpd_milters"] == "inet:127.0.0.1:11332, inet:127.0.0.1:8891"
    for text in (own, redirected, said):
        assert "check_client_access cidr:/etc/postfix/maildrops, reject" in text
    # The scanner believes a mailbox host, and nobody else, whose filter a mail is of.
    assert files["frontend-ash"]["/etc/rspamd/posthorn-mailbox-hosts"].replace('"', "").split() == [
        *("198.18.1.13", "2001:db8:1:1::13", "198.18.2.13", "2001:db8:1:2::13")
    ]


@pytest.mark.parametrize(
    ("words", "waits"),
    [
        ("<imap.hill.example[198.18.1.13]>: Client host rejected: Access denied", True),
        # Scanners with the addresses and mailbox hosts of before a push.
        ("ann may not write as anna@hill.example", True),
        ("ann may not write as anna@hill.example (Sender)", True),
        ("this mail is not from ann@hill.example (RFC 9989)", True),
        ("this mail is not from ann@hill.example", True),
        ("far.example has mail refused that is not proved to be its own (RFC 9989)", True),
        ("this mail looks like spam, and partner@hill.example leads elsewhere: it is not sent on", True),
        # Rules that filters break.
        ("this mail is not as ann@hill.example sent it: it is not sent on", False),
        ('this mail is not as "x may not write as y"@hill.example sent it: it is not sent on', False),
        ("Spam message rejected", False),
    ],
)
def test_a_filter_s_mail_comes_back_if_it_breaks_a_rule_and_waits_while_hosts_are_not_alike(
    files: dict[str, dict[str, str]], words: str, *, waits: bool
) -> None:
    rules = re.findall(r"^/(.*)/  (.*)$", files["maildrop-elm"]["/etc/postfix/refusals"], re.MULTILINE)
    found = [(re.search(pattern, f"554 5.7.1 {words}"), reply) for pattern, reply in rules]
    said = [(match[1], match[2], reply) for match, reply in found if match]
    assert said == ([("54 ", f".7.1 {words}", "4${1}4$2")] if waits else [])


def test_no_stranger_s_sender_becomes_ours(files: dict[str, dict[str, str]]) -> None:
    for host in POSTFIX:
        assert "sender_canonical_maps" not in main_cf(files, host)
        services = re.split(r"\n(?=\S)", files[host]["/etc/postfix/master.cf"])
        users = [text.split()[0] for text in services if "own-senders" in text]
        assert users == ["own-cleanup"]
        assert [text.split()[0] for text in services if "cleanup_service_name=own-cleanup" in text] == ["pickup"]
    assert "reject_non_fqdn_sender" in main_cf(files, "smtp-in-oak")["smtpd_recipient_restrictions"]


def test_clients_are_known_behind_the_front_ends_and_nobody_else_may_say_who_they_are(
    files: dict[str, dict[str, str]],
) -> None:
    assert "proxy_protocol on;" in files["frontend-oak"]["/etc/nginx/nginx.conf"]
    for host, ports in (("smtp-out-oak", ("10587",)), ("maildrop-oak", ("10993", "14190"))):
        for port in ports:
            rules = [line for line in files[host]["/etc/nftables.conf"].splitlines() if f"dport {port} " in line]
            assert rules and all("saddr { 198.18.1.14, " in r or "saddr { 2001:db8:1:1::14, " in r for r in rules)
    assert "permit_mynetworks" not in files["smtp-out-oak"]["/etc/postfix/main.cf"]


def test_srs_is_for_what_leaves_and_headers_of_others_stay(files: dict[str, dict[str, str]]) -> None:
    settings = main_cf(files, "smtp-in-ash")
    assert settings["local_header_rewrite_clients"] == ""
    assert settings["recipient_canonical_classes"] == "envelope_recipient"
    assert "sender_canonical_maps" not in settings
    assert "sender_canonical_maps=tcp:127.0.0.1:10001" in files["smtp-in-ash"]["/etc/postfix/master.cf"]


SRS = re.compile(r"^/(.*)/  out:$", re.MULTILINE)


@pytest.mark.parametrize(
    ("sender", "is_rewritten"),
    [
        ("bob@far.example", True),
        ("o'neil+list=a.b@far.example", True),
        ("john doe@far.example", False),
        ("a@b@far.example", False),
        ("a%b@far.example", False),
        ("a!b@far.example", False),
        ("jörg@far.example", False),
        # With 14 octets more the local part is of 64, or of one more.
        (f"{'x' * 39}@far.example", True),
        (f"{'x' * 40}@far.example", False),
        ("SRS0=abcd=JP=a.long.name.of.some.example=who@fwd.example", True),
        ("SRS0=abcd=JP=a.longer.name.of.some.example=whoever@fwd.example", False),
        ("SRS1=abcd=first.example==abcd=JP=a.longer.name.of.example=who@fwd.example", True),
    ],
)
def test_a_sender_is_rewritten_where_its_bounces_come_back(
    files: dict[str, dict[str, str]], sender: str, is_rewritten: bool
) -> None:
    assert main_cf(files, "smtp-in-oak")["sender_dependent_default_transport_maps"] == "pcre:/etc/postfix/unrewritten"
    patterns = SRS.findall(files["smtp-in-oak"]["/etc/postfix/unrewritten"])
    assert len(patterns) == 3
    assert any(re.search(pattern, sender, re.IGNORECASE) for pattern in patterns) != is_rewritten


REPORT = """\
<cid@maildrop.net.hill.example> (expanded from <cid@hill.example>): host maildrop.oak.net.hill.example[::1] said: no
<cid@maildrop.net.hill.example> (expanded from <cid@hill.example>): host
    maildrop.oak.net.hill.example[198.18.1.13] said: 452 4.2.2 The mailbox
<cid@maildrop.net.hill.example>: host smtp-out.net.hill.example[::1] said:
<cid@maildrop.net.hill.example> (expanded from
    <cid@hill.example>): connect to maildrop.oak.net.hill.example[198.18.1.13]:25: refused
Final-Recipient: rfc822; cid@maildrop.net.hill.example
Original-Recipient: rfc822;cid@hill.example
Remote-MTA: dns; maildrop.oak.net.hill.example
Diagnostic-Code: smtp; 452 4.2.2 <cid@maildrop.net.hill.example>: full at maildrop.oak.net.hill.example
Received: from smtp-in-oak.net.hill.example (x [198.18.1.11]) by imap.hill.example
See www.hill.example, and net.hill.example.far.example.
"""
TOLD = """\
<cid@hill.example>: host the mailbox host said: no
<cid@hill.example>: host
    (a host inside) said: 452 4.2.2 The mailbox
An address that you wrote to: host a host inside said:
An address that you wrote to (expanded from
    <cid@hill.example>): connect to (a host inside) refused
Final-Recipient: rfc822;cid@hill.example
Diagnostic-Code: (hosts inside)
See www.hill.example, and net.hill.example.far.example.
"""


def test_a_report_tells_the_address_that_was_written_to_and_no_host_inside(files: dict[str, dict[str, str]]) -> None:
    for host in ("smtp-in-oak", "maildrop-oak"):
        rules = re.findall(r"^/(.*)/  (IGNORE|REPLACE .*)$", files[host]["/etc/postfix/reports"], re.MULTILINE)
        told = []
        for line in REPORT.splitlines():
            for pattern, action in rules:
                if re.search(pattern, line, re.IGNORECASE):
                    found = re.search(pattern, line, re.IGNORECASE)
                    assert found
                    if action != "IGNORE":
                        text = action.removeprefix("REPLACE ")
                        for number in (1, 2, 3):
                            text = text.replace(
                                f"${number}", (found.group(number) or "") if f"${number}" in text else ""
                            )
                        told.append(text)
                    break
            else:
                told.append(line)
        assert "\n".join(told) + "\n" == TOLD
        assert "body_checks=regexp:/etc/postfix/reports" in files[host]["/etc/postfix/master.cf"]
        assert "bounce" in main_cf(files, host)["internal_mail_filter_classes"]


@pytest.mark.parametrize("release", [12, 13])
@pytest.mark.parametrize("service_domain", ["hill.example", "mail.hill.example"])
def test_bounces_of_forwarded_mail_come_back_to_a_domain_that_sends_and_takes_mail(
    keyed_config: dict[str, Any], service_domain: str, release: int
) -> None:
    config = copy.deepcopy(keyed_config)
    config["service"] |= {"domain": service_domain, "release": release}
    config["domains"]["hill.example"]["sends"] = False
    config["machine_users"]["doors"]["mail_from"] = "dale.example"
    stack = parse("lab", "Pulumi.lab.yaml", config)
    files = bundle(stack, stack.all_hosts["smtp-in-oak"])["files"]
    assert "\nSRS_DOMAIN=dale.example\n" in files["/etc/default/postsrsd"]["content"]


def test_who_answers_a_refusal_by_a_filter_finds_a_postmaster(stack: Stack, files: dict[str, dict[str, str]]) -> None:
    text = files["maildrop-oak"]["/etc/dovecot/dovecot.conf"]
    address = re.findall(r"^ *postmaster_address = (\S+)$", text, re.MULTILINE)
    assert address == ["postmaster@hill.example"] and stack.accepts(address[0])


def test_blocklists_refuse_by_masked_replies_alone(files: dict[str, dict[str, str]]) -> None:
    restrictions = main_cf(files, "smtp-in-oak")["smtpd_recipient_restrictions"]
    asked = re.findall(r"reject_r(?:bl|hsbl)\w+ \S+", restrictions)
    assert asked and all("=" in rule for rule in asked)
    # Where the stack says nothing of replies, those by which lists tell of an error are no listing.
    silent = DnsblRule(what="client", zone="zen.example")
    assert restriction(silent) == "reject_rbl_client zen.example=127.0.[0..2].[2..254]"


def test_every_mx_knows_every_recipient_and_no_user_writes_as_another(files: dict[str, dict[str, str]]) -> None:
    tables = {files[f"smtp-in-{site}"]["/etc/postfix/virtual"] for site in ("oak", "elm", "ash")}
    assert len(tables) == 1
    assert "reject_unlisted_recipient" in main_cf(files, "smtp-in-elm")["smtpd_recipient_restrictions"]
    settings = main_cf(files, "smtp-out-ash")
    assert "reject_sender_login_mismatch" in settings["smtpd_sender_restrictions"]
    assert settings["smtpd_sender_login_maps"] == "texthash:/etc/postfix/senders"


def test_doveadm_listens_on_loopback_and_trash_teaches_no_ham(files: dict[str, dict[str, str]]) -> None:
    text = files["maildrop-oak"]["/etc/dovecot/dovecot.conf"]
    assert re.search(r"service doveadm \{\s+inet_listener( doveadm)? \{\s+(address|listen) = 127\.0\.0\.1", text)
    ham = files["maildrop-oak"]["/etc/dovecot/sieve/learn/ham.sieve"]
    assert 'if environment :is "imap.mailbox" "Trash"' in ham


def test_a_full_mailbox_takes_one_more_of_the_largest_mails_in_trash(
    stack: Stack, files: dict[str, dict[str, str]]
) -> None:
    text = files["maildrop-oak"]["/etc/dovecot/dovecot.conf"]
    (more,) = re.findall(
        r"quota_rule2 = Trash:storage=\+(\d+)M|mailbox Trash \{[^}]*quota_storage_extra = (\d+)M", text
    )
    (grace,) = re.findall(r"quota(?:_storage)?_grace = (\d+)M", text)
    assert (int("".join(more)) - int(grace)) * 2**20 >= stack.limits.message_size


def test_whoever_is_away_answers_all_who_write_to_them_and_may_send_on_to_a_few(
    files: dict[str, dict[str, str]],
) -> None:
    text = files["maildrop-oak"]["/etc/dovecot/dovecot.conf"]
    assert re.search(r"^ *sieve_vacation_(dont_check_recipient = yes|check_recipient = no)$", text, re.MULTILINE)
    assert re.search(r"^ *sieve_max_redirects = 8$", text, re.MULTILINE)
    assert "at most 8 addresses" in (ROOT / "docs" / "accounts.md").read_text()


def test_dsync_escapes_folders_by_a_sign_of_its_own_which_users_do_not_see(files: dict[str, dict[str, str]]) -> None:
    text = files["maildrop-oak"]["/etc/dovecot/dovecot.conf"]
    signs = re.findall(r"(?:BROKENCHAR=|mailbox_list_visible_escape_char = )(\S+)", text)
    (inside,) = re.findall(r"^protocol doveadm \{\n(.*)\n\}", text, re.MULTILINE)
    # A sign that stands for itself in a name of IMAP (RFC 3501 section 5.1.3), and is not the separator.
    assert signs == ["^"] and inside.endswith("^")


def test_strangers_file_into_no_folder_of_the_system(files: dict[str, dict[str, str]]) -> None:
    host = files["maildrop-oak"]
    text, script = host["/etc/dovecot/dovecot.conf"], host["/etc/dovecot/sieve/after.d/subaddress.sieve"]
    uses = set(re.findall(r"mailbox (\w+) \{\s+special_use", text))
    (state,) = re.findall(
        r"const FOLDER = '(\w+)'", files["frontend-oak"]["/var/lib/roundcube/plugins/posthorn/state.php"]
    )
    assert len(uses) == 5
    for folder in (*uses, state):
        assert f'"{folder}", "{folder}/*"' in script


def test_what_comes_back_from_where_a_filter_sent_it_is_kept_before_any_filter_and_stops_none(
    files: dict[str, dict[str, str]],
) -> None:
    folder = "/etc/dovecot/sieve/before.d/"
    scripts = {name.removeprefix(folder): text for name, text in files["maildrop-oak"].items() if folder in name}
    # They run in the order of their names: what the scanners took for spam is filed, and ends there.
    assert sorted(scripts) == ["junk.sieve", "returned.sieve"]
    returned = scripts["returned.sieve"]
    assert 'envelope :is "from" ""' in returned and "X-Sieve-Redirected-From:" in returned
    assert 'fileinto :copy "INBOX";' in returned and not re.search(r"^\s*(stop|keep)", returned, re.MULTILINE)


def test_the_page_of_the_case_study_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "case-study.md").read_text()
    named = set(re.findall(r"`((?:templates|services|stacks|tests)/[\w./-]+)`", page))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    # All 29, in their order.
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == [str(number) for number in range(1, 30)]


def test_no_name_of_an_mx_itself_is_left_to_the_local_delivery(stack: Stack) -> None:
    """``root@localhost.localdomain`` and ``postmaster@[ADDRESS]`` too, by the bare name (virtual(5))."""
    virtual = bundle(stack, stack.all_hosts["smtp-in-oak"])["files"]["/etc/postfix/virtual"]["content"]
    keys = {line.split()[0] for line in virtual.splitlines() if line}
    assert set(OWN) <= keys
    assert {f"{local}@{name}" for local in OWN for name in LOCAL} <= keys
