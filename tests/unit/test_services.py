"""What stands in the files of the hosts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest

from model.checks import roles_can_share_a_host
from model.load import parse
from model.network import Role
from model.stack import Host, Stack
from services import smtp_in
from services.bundle import Conflict, bundle, secrets
from services.roles import services_of
from services.rspamd import elsewhere

TASKS = "/etc/systemd/system/dovecot.service.d/sessions.conf"


@pytest.fixture(scope="module")
def bundles(keyed_stack: Stack) -> dict[str, dict[str, Any]]:
    return {name: bundle(keyed_stack, host) for name, host in keyed_stack.all_hosts.items()}


def file(bundles: Mapping[str, Any], host: str, path: str) -> str:
    content: str = bundles[host]["files"][path]["content"]
    return content


def table(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.splitlines())


def test_no_secret_stands_in_a_bundle(keyed_stack: Stack, bundles: dict[str, dict[str, Any]]) -> None:
    for name, host in keyed_stack.all_hosts.items():
        shown = json.dumps(bundles[name])
        for secret in secrets(keyed_stack, host).values():
            for line in (line for line in secret.splitlines() if len(line) > 16 and not line.startswith("-----")):
                assert line not in shown


def test_a_host_gets_its_own_key_and_no_other(keyed_stack: Stack) -> None:
    assert keyed_stack.keys.private
    keys = {name: pair.tls for name, pair in keyed_stack.keys.private.hosts.items()}
    for name, host in keyed_stack.all_hosts.items():
        held = "".join(secrets(keyed_stack, host).values())
        assert [other for other, key in keys.items() if key in held] == [name]


def with_roles(stack: Stack, host: str, roles: tuple[Role, ...]) -> Stack:
    """The stack with other roles on a host, whatever the checks say."""
    there = stack.hosts[host].model_copy(update={"roles": roles})
    values = {field: getattr(stack, field) for field in Stack.model_fields}
    return Stack.model_construct(**(values | {"hosts": {**stack.hosts, host: there}}))


def clash(stack: Stack, host: Host) -> bool:
    """Whether services of a host want the same file, unit or port in different ways."""
    try:
        bundle(stack, host)
    except Conflict:
        return True
    wanted = {
        ((listen.protocol, listen.port), service.name)
        for service in services_of(stack, host)
        for listen in service.listens
    }
    return len(wanted) != len({port for port, _ in wanted})


@pytest.mark.parametrize("roles", list(combinations(Role, 2)), ids="+".join)
def test_two_roles_are_refused_on_a_host_when_their_services_clash(stack: Stack, roles: tuple[Role, Role]) -> None:
    together = with_roles(stack, "frontend-ash", roles)
    refused = bool(list(roles_can_share_a_host(together)))
    # Debian's packages of Postfix and OpenSMTPD shut one another out, which no file tells.
    packages = Role.RELAY_CLIENT in roles and refused
    assert refused == (packages or clash(together, together.all_hosts["frontend-ash"]))


def test_a_clash_that_no_check_foresaw_is_told_in_a_sentence(stack: Stack) -> None:
    together = with_roles(stack, "frontend-ash", (Role.SMTP_IN, Role.RSPAMD))
    with pytest.raises(Conflict, match=r"^hosts\.frontend-ash\.roles: two of them want unit rspamd\.service to be"):
        bundle(together, together.all_hosts["frontend-ash"])


def test_rendering_twice_gives_the_same(keyed_stack: Stack, bundles: dict[str, dict[str, Any]]) -> None:
    for name, host in keyed_stack.all_hosts.items():
        assert bundle(keyed_stack, host) == bundles[name]


def test_what_is_pushed_does_not_depend_on_the_order_of_the_file(
    keyed_stack: Stack, keyed_config: dict[str, Any]
) -> None:
    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(value)}
        return value

    other = parse("lab", "Pulumi.lab.yaml", backwards(keyed_config))
    for name, host in keyed_stack.all_hosts.items():
        assert bundle(other, other.all_hosts[name]) == bundle(keyed_stack, host)


def test_front_ends_prefer_the_primary_and_know_the_others(bundles: dict[str, dict[str, Any]]) -> None:
    text = file(bundles, "frontend-ash", "/etc/nginx/nginx.conf")
    assert re.findall(r"server (198\.18\S+:10993) .*?(backup)?;", text) == [
        ("198.18.1.13:10993", ""),
        ("198.18.2.13:10993", "backup"),
    ]


def test_aliases_lead_where_the_stack_says(bundles: dict[str, dict[str, Any]]) -> None:
    virtual = table(file(bundles, "smtp-in-elm", "/etc/postfix/virtual"))
    assert virtual["info@hill.example"] == "ann+info@maildrop.net.hill.example"
    assert virtual["team@hill.example"] == "ben@maildrop.net.hill.example, bob@far.example"
    assert virtual["@dale.example"] == "ben@maildrop.net.hill.example"


def test_an_equal_domain_has_each_address_written_out(bundles: dict[str, dict[str, Any]]) -> None:
    virtual = table(file(bundles, "smtp-in-elm", "/etc/postfix/virtual"))
    for address, target in virtual.items():
        if address.endswith("@hill.example") and "noreply" not in address:
            assert virtual[address.replace("hill", "moor")] == target


def test_mail_for_nobody_is_discarded_and_not_bounced(bundles: dict[str, dict[str, Any]]) -> None:
    virtual = table(file(bundles, "smtp-in-elm", "/etc/postfix/virtual"))
    assert virtual["noreply@hill.example"] == "noreply@discard.invalid"
    assert "discard.invalid discard:" in file(bundles, "smtp-in-elm", "/etc/postfix/transport")


def test_postmaster_and_abuse_of_every_domain_are_read(keyed_stack: Stack, bundles: dict[str, dict[str, Any]]) -> None:
    virtual = table(file(bundles, "smtp-in-ash", "/etc/postfix/virtual"))
    for domain in keyed_stack.domains:
        assert virtual[f"postmaster@{domain}"] == virtual[f"abuse@{domain}"] == "ann@maildrop.net.hill.example"


def test_nobody_sends_as_another(bundles: dict[str, dict[str, Any]]) -> None:
    senders = table(file(bundles, "smtp-out-oak", "/etc/postfix/senders"))
    assert senders["ann@hill.example"] == "ann"
    assert senders["sales@hill.example"] == "ann, ben"
    assert senders["helpdesk@dale.example"] == "ben"
    assert "bob@far.example" not in senders


def logins(config: dict[str, Any], host: str = "maildrop-oak") -> dict[str, str]:
    """Who Dovecot takes whom for, by what they type."""
    found = parse("lab", "Pulumi.lab.yaml", config)
    lines = secrets(found, found.all_hosts[host])["logins"].splitlines()
    entries = ((line.split(":")[0], line.rpartition("user=")[2] if "user=" in line else "") for line in lines)
    return {login: account or login for login, account in entries}


def test_users_log_in_by_name_and_by_each_address_that_is_theirs_alone(keyed_config: dict[str, Any]) -> None:
    for host in ("maildrop-elm", "smtp-out-ash"):
        found = logins(keyed_config, host)
        for login in ("ann", "ann@hill.example", "info@hill.example", "info@moor.example", "postmaster@dale.example"):
            assert found[login] == "ann"
    # What several read, what goes on elsewhere, what only a catch-all takes and what is nobody's lets nobody in.
    for login in ("sales@hill.example", "partner@hill.example", "whoever@dale.example", "carl@hill.example", "info"):
        assert login not in found


def test_an_address_of_another_leads_to_that_other_or_to_nobody(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["accounts"]["ann2"] = config["accounts"]["ann"]
    config["domains"]["dale.example"]["aliases"]["ann"] = "ann2"
    config["domains"]["hill.example"]["aliases"]["ben"] = ["ann", "ben"]
    found = logins(config)
    assert found["ann@hill.example"] == "ann" and found["ann@dale.example"] == "ann2"
    assert "ben@hill.example" not in found
    # The catch-all of dale.example is ben's: so is ben@, and ann2@ is not ann2's.
    assert found["ben@dale.example"] == "ben" and "ann2@dale.example" not in found


def test_a_name_in_a_domain_that_gives_the_address_to_nobody_still_lets_its_account_in(
    keyed_config: dict[str, Any],
) -> None:
    config = copy.deepcopy(keyed_config)
    del config["domains"]["hill.example"]["aliases"]["ben"]
    assert logins(config)["ben@hill.example"] == "ben"


def test_the_web_mail_takes_logins_for_the_same_accounts(
    keyed_stack: Stack, keyed_config: dict[str, Any], bundles: dict[str, dict[str, Any]]
) -> None:
    known = json.loads(file(bundles, "frontend-elm", "/etc/posthorn/webmail/logins.json"))
    assert known == logins(keyed_config) == keyed_stack.logins


def test_machines_submit_and_have_no_mailbox(keyed_config: dict[str, Any]) -> None:
    assert "doors" in logins(keyed_config, "smtp-out-oak") and "doors" not in logins(keyed_config)


def test_mailboxes_are_listed_by_the_names_of_accounts_without_passwords(bundles: dict[str, dict[str, Any]]) -> None:
    lines = file(bundles, "maildrop-oak", "/etc/dovecot/users").splitlines()
    assert [line.split(":")[:2] for line in lines] == [["ann", ""], ["ben", ""]]


def test_ports_behind_the_front_ends_are_open_to_them_alone(bundles: dict[str, dict[str, Any]]) -> None:
    rules = file(bundles, "smtp-out-oak", "/etc/nftables.conf")
    for port in (10465, 10587):
        assert f"ip saddr {{ 198.18.1.14, 198.18.2.14, 198.18.3.14 }} tcp dport {port} accept" in rules
    assert not re.search(r"^ *tcp dport", rules.partition("chain output")[0], re.MULTILINE)


def test_submission_is_the_same_whichever_way_its_tls_begins(bundles: dict[str, dict[str, Any]]) -> None:
    master = file(bundles, "smtp-out-oak", "/etc/postfix/master.cf")
    services = {entry.split()[0]: set(entry.splitlines()[1:]) for entry in re.split(r"\n(?=\S)", master)}
    only = services["10465"] - services["10587"]
    assert only == {"    -o syslog_name=postfix/submissions-proxy", "    -o smtpd_tls_wrappermode=yes"}
    assert services["10587"] - services["10465"] == {"    -o syslog_name=postfix/submission-proxy"}


def test_the_world_reaches_smtp_in_by_two_ports(bundles: dict[str, dict[str, Any]]) -> None:
    rules = file(bundles, "smtp-in-oak", "/etc/nftables.conf")
    assert re.findall(r"^ *tcp dport (\d+) accept", rules, re.MULTILINE) == ["25", "465"]


@pytest.mark.parametrize("role", ["smtp-in", "smtp-out"])
def test_a_filter_that_is_down_defers_the_mail(bundles: dict[str, dict[str, Any]], role: str) -> None:
    assert "milter_default_action = tempfail" in file(bundles, f"{role}-oak", "/etc/postfix/main.cf")


def test_only_replies_that_mean_listed_count(bundles: dict[str, dict[str, Any]]) -> None:
    main = file(bundles, "smtp-in-oak", "/etc/postfix/main.cf")
    assert "    reject_rbl_client dnsbl.example=127.0.0.[2..11],\n" in main
    assert "    warn_if_reject reject_rbl_client dnsbl.example=127.255.255.[1..255],\n" in main


def test_who_is_let_in_by_word_passes_the_blocklists_and_no_other_rule(bundles: dict[str, dict[str, Any]]) -> None:
    main = file(bundles, "smtp-in-oak", "/etc/postfix/main.cf")
    told = main.split("smtpd_recipient_restrictions =\n")[1].split("    permit\n")[0]
    rules = [line.strip(" ,") for line in told.splitlines() if not line.strip().startswith("#")]
    by_word = rules.index("check_client_access cidr:/etc/postfix/clients")
    lists = [index for index, rule in enumerate(rules) if "_rbl_" in rule or "_rhsbl_" in rule]
    assert lists == list(range(by_word + 1, len(rules))) and "reject_unlisted_recipient" in rules[:by_word]
    assert "smtpd_relay_restrictions = reject_unauth_destination\n" in main


def test_the_narrowest_network_says_who_is_let_in(config: dict[str, Any]) -> None:
    config["filter"]["allow"] = {"clients": ["192.0.2.0/24", "192.0.2.64/28", "2001:db8::/32"]}
    config["filter"]["deny"] = {"clients": ["192.0.2.0/25", "192.0.2.65"]}
    lines = smtp_in.clients(parse("lab", "Pulumi.lab.yaml", config)).splitlines()
    assert [line.partition(" ")[0] for line in lines] == [
        "192.0.2.65/32",
        "192.0.2.64/28",
        "192.0.2.0/25",
        "192.0.2.0/24",
        "2001:db8::/32",
    ]
    assert [line.split()[1] for line in lines] == ["554", "OK", "554", "OK", "OK"]


def test_what_an_account_sends_is_counted_for_the_account_and_whoever_gets_it(config: dict[str, Any]) -> None:
    config["limits"]["recipients_per_day"] = 500
    stack = parse("lab", "Pulumi.lab.yaml", config)
    text = file({"x": bundle(stack, stack.all_hosts["frontend-oak"])}, "x", "/etc/rspamd/local.d/ratelimit.conf")
    # A user, and the user's filters: each has a limit.
    assert "    user = {\n" in text and "selector = \"id('500');posthorn_counted\";\n" in text
    assert "burst = 500;\n" in text and 'rate = "500 / 1d";\n' in text
    assert 'whitelisted_rcpts = ["nobody@invalid"];\n' in text


@pytest.mark.parametrize("release", [12, 13])
def test_who_takes_a_mail_tells_of_a_mailbox_that_is_nearly_full_and_who_copies_it_does_not(
    config: dict[str, Any], release: int
) -> None:
    config["service"]["release"] = release
    stack = parse("lab", "Pulumi.lab.yaml", config)
    files = bundle(stack, stack.all_hosts["maildrop-oak"])["files"]
    blocks = re.split(r"^}\n", files["/etc/dovecot/dovecot.conf"]["content"], flags=re.MULTILINE)
    telling = [block for block in blocks if re.search("quota-warning 95|args = 95", block)]
    assert [re.findall(r"^protocol \w+", block, re.MULTILINE) for block in telling] == [
        ["protocol lmtp"],
        ["protocol imap"],
    ]
    assert files["/usr/local/lib/posthorn/quota-warning"]["mode"] == "0755"


def postfix(bundles: Mapping[str, Any], host: str) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """What main.cf of a host says, and each service of master.cf beside it."""

    def main(text: str) -> dict[str, str]:
        return dict(re.findall(r"^(\w+) = ?(.*)", text, re.MULTILINE))

    services = {}
    for entry in re.split(r"\n(?=[^\s#])", file(bundles, host, "/etc/postfix/master.cf")):
        name, kind = entry.split()[:2]
        said = re.findall(r"-o (?:{ )?(\w+) ?= ?(.*?)(?: })?$", entry, re.MULTILINE)
        services[f"{name}/{kind}"] = dict(said)
    return main(file(bundles, host, "/etc/postfix/main.cf")), services


def test_what_a_host_of_the_stack_refuses_is_tried_again_and_no_line_of_it_is_cut(bundles: dict[str, Any]) -> None:
    for host, transports in {"smtp-in-oak": ("maildrop", "forward"), "maildrop-oak": ("lmtp", "smtp-out")}.items():
        main, services = postfix(bundles, host)
        for name in transports:
            said = services[f"{name}/unix"]
            assert said["soft_bounce"] == "yes"
            assert said.get("smtp_line_length_limit", said.get("lmtp_line_length_limit")) == "0"
        assert main["smtp_mx_session_limit"] == "0"
    # What strangers refuse is final.
    for host in ("smtp-in-oak", "smtp-out-oak"):
        main, services = postfix(bundles, host)
        assert "soft_bounce" not in main
        assert not [name for name in ("out", "smtp", "relay") if "soft_bounce" in services.get(f"{name}/unix", {})]


def test_each_host_on_the_way_takes_larger_mails_than_the_one_before(
    stack: Stack, bundles: dict[str, Any], config: dict[str, Any]
) -> None:
    outside, (inside, services) = postfix(bundles, "smtp-in-oak")[0], postfix(bundles, "smtp-out-oak")
    submitted, taken = int(inside["message_size_limit"]), int(outside["message_size_limit"])
    later = {int(services[f"{port}/inet"]["message_size_limit"]) for port in (10588, 10589)}
    later |= {int(services["mailboxes-cleanup/unix"]["message_size_limit"])}
    services = postfix(bundles, "smtp-in-oak")[1]
    later |= {int(services[name]["message_size_limit"]) for name in ("127.0.0.1:10024/inet", "forward-cleanup/unix")}
    later |= {int(postfix(bundles, "maildrop-elm")[0]["message_size_limit"])}
    assert submitted == stack.limits.message_size
    assert taken >= submitted + 2**20 and all(size >= taken + 2**20 for size in later)
    for host, path in (("frontend-oak", "local.d/options.inc"), ("smtp-in-oak", "rspamd.conf")):
        (scanned,) = re.findall(r"max_message = (\d+);", file(bundles, host, f"/etc/rspamd/{path}"))
        assert int(scanned) >= taken + 2**20


def test_no_host_offers_what_mailboxes_cannot_take(bundles: dict[str, Any]) -> None:
    for host in ("smtp-in-oak", "smtp-out-oak", "maildrop-oak"):
        assert postfix(bundles, host)[0]["smtputf8_enable"] == "no"


def test_only_the_headers_of_a_mail_itself_are_changed(bundles: dict[str, Any]) -> None:
    for host in ("smtp-in-oak", "smtp-out-oak", "maildrop-oak"):
        for name, said in postfix(bundles, host)[1].items():
            if checks := said.get("header_checks"):
                for kind in ("nested_header_checks", "mime_header_checks"):
                    # The one that changes nothing is for attachments too.
                    assert set(re.findall(r"\w+:\S+/(\w+)", said[kind])) <= {"long", "lines"}, (host, name, checks)


def test_a_header_field_that_would_be_cut_is_refused(bundles: dict[str, Any]) -> None:
    # What users send may grow, as overlong lines are broken.
    for host, size in (("smtp-in-oak", 60000), ("smtp-out-oak", 59000)):
        assert f"\n/^.{{{size}}}/  REJECT 5.3.4 " in file(bundles, host, "/etc/postfix/long")
    assert "header_checks = pcre:/etc/postfix/long\n" in file(bundles, "smtp-in-oak", "/etc/postfix/main.cf")
    assert "MaximumHeaders 0\n" in file(bundles, "smtp-out-oak", "/etc/opendkim.conf")


def test_a_submitted_mail_whose_lines_would_be_broken_is_signed_after_that(bundles: dict[str, Any]) -> None:
    services = postfix(bundles, "smtp-out-oak")[1]
    for kind in ("header_checks", "nested_header_checks", "mime_header_checks", "body_checks"):
        assert "pcre:/etc/postfix/lines" in services["submission-cleanup/unix"][kind]
    # Each such line stands in the journal: there are not more than a hundred in a part.
    assert int(services["submission-cleanup/unix"]["body_checks_size_limit"]) <= 1000 * 103
    # Postfix's default, 998, holds where the lines are broken.
    assert "smtp_line_length_limit" not in services["fold/unix"]
    assert services["127.0.0.1:10590/inet"]["smtpd_milters"] == "inet:127.0.0.1:8891"


def test_no_mail_of_strangers_is_left_to_the_local_delivery(bundles: dict[str, Any]) -> None:
    virtual = table(file(bundles, "smtp-in-elm", "/etc/postfix/virtual"))
    aliases = table(file(bundles, "smtp-in-elm", "/etc/postfix/aliases"))
    for name in ("smtp-in.hill.example", "smtp-in.elm.net.hill.example"):
        assert {local: virtual[f"{local}@{name}"] for local in aliases} == aliases


def test_an_alias_may_lead_to_all_addresses_that_there_are(config: dict[str, Any]) -> None:
    aliases = config["domains"]["hill.example"]["aliases"]
    for part in range(3):
        aliases[f"part{part}"] = [f"p{part}.{n}@much.example" for n in range(700)]
    aliases["all"] = [f"part{part}@hill.example" for part in range(3)]
    stack = parse("lab", "Pulumi.lab.yaml", config)
    main = postfix({"x": bundle(stack, stack.all_hosts["smtp-in-oak"])}, "x")[0]
    for limit in ("virtual_alias_expansion_limit", "virtual_alias_recursion_limit"):
        assert int(main[limit]) > 2100


def test_a_reader_who_is_named_twice_gets_one_mail(bundles: dict[str, Any]) -> None:
    assert postfix(bundles, "maildrop-oak")[0]["enable_original_recipient"] == "no"
    # The mailbox host has to see all readers at once; who was written to is known at smtp-in.
    main = postfix(bundles, "smtp-in-oak")[0]
    assert int(main["maildrop_destination_recipient_limit"]) == 1000 and "enable_original_recipient" not in main


def test_many_full_mailboxes_among_the_readers_of_a_mail_keep_it_from_nobody_else(bundles: dict[str, Any]) -> None:
    most = int(postfix(bundles, "smtp-in-oak")[0]["maildrop_destination_recipient_limit"])
    for host in ("maildrop-oak", "maildrop-elm"):
        main, services = postfix(bundles, host)
        for kind in ("soft", "hard"):
            # A number, which holds under stress too.
            assert int(main[f"smtpd_{kind}_error_limit"]) > most
            assert not [name for name, said in services.items() if f"smtpd_{kind}_error_limit" in said]


def test_submission_hides_where_its_users_sit(bundles: dict[str, dict[str, Any]]) -> None:
    rules = [
        line.rpartition("  ")
        for line in file(bundles, "smtp-out-oak", "/etc/postfix/privacy").splitlines()
        if line.startswith("/^Received: from")
    ]
    header = (
        "Received: from kitchen (unknown [203.0.113.80])\n\t(using TLSv1.3 with cipher X (256/256 bits))\n"
        "\tby smtp-out.hill.example (Postfix) with ESMTPSA id 4F2A\n\tfor <bob@far.example>; Mon, 23 Nov 2026"
    )
    pattern, _, action = rules[0]
    found = re.match(pattern.strip().strip("/"), header, re.IGNORECASE | re.DOTALL)
    assert found and action == "REPLACE Received: $1"
    assert found.group(1).startswith("by smtp-out.hill.example") and "203.0.113.80" not in found.group(1)


def test_what_is_compiled_is_known_by_the_beginning_of_its_source(bundles: dict[str, dict[str, Any]]) -> None:
    # Else the agent would take it for left over, and remove it with the next push.
    for step in bundles["maildrop-oak"]["compile"]:
        program, *_, source = step["run"]
        if program != "sievec":
            continue
        made = source.replace(".sieve", ".svbin") if source.endswith(".sieve") else f"{source}/x.svbin"
        assert made.startswith(step["of"]) and source.startswith(step["of"].rstrip("/"))


def test_a_host_without_an_address_of_a_family_gets_no_route_of_it(keyed_config: dict[str, Any]) -> None:
    config = copy.deepcopy(keyed_config)
    config["hosts"]["smtp-in-oak"]["addresses"] = {"local": ["198.18.1.11"], "public": ["198.51.100.2"]}
    stack = parse("lab", "Pulumi.lab.yaml", config)
    found = bundle(stack, stack.all_hosts["smtp-in-oak"])["files"]
    for name in ("05-local", "05-public"):
        network = found[f"/etc/systemd/network/{name}.network"]["content"]
        assert "Gateway=198." in network and "2001:db8:" not in network


LISTENS = re.compile(
    r"^\s*(?:listen|bind|bind_socket|accept|interface|inet_interfaces|ListenAddress)\b[\s=:]*\"?(?P<address>[^\s\";]+)",
    re.MULTILINE,
)
"""A word of some daemon's configuration by which it listens, and where."""


@pytest.mark.parametrize("release", [12, 13])
def test_no_daemon_needs_an_address_to_be_there_when_it_binds(keyed_config: dict[str, Any], release: int) -> None:
    config = keyed_config | {"service": keyed_config["service"] | {"release": release}}
    stack = parse("lab", "Pulumi.lab.yaml", config)
    seen = set()
    for host in stack.all_hosts.values():
        own = {str(address) for address in (*host.addresses.local, *host.addresses.public)}
        for path, file in bundle(stack, host)["files"].items():
            for found in LISTENS.finditer(file["content"]):
                seen.add(path)
                named = [address for address in own if address in found["address"]]
                # Unbound has to answer from the address that was asked, and binds it before it is there.
                assert not named or "\n    ip-freebind: yes\n" in file["content"], f"{host.name}: {path}: {named}"
    wanted = ("nginx.conf", "worker-normal.inc", "stunnel/learning.conf", "stunnel/replication.conf", "posthorn.conf")
    assert all(any(path.endswith(end) for path in seen) for end in (*wanted, "haproxy.cfg", "postfix/main.cf"))


def test_every_port_that_a_service_opens_is_looked_for_on_all_addresses_of_its_host(stack: Stack) -> None:
    for host in stack.all_hosts.values():
        own = [str(address) for address in (*host.addresses.local, *host.addresses.public)]
        looked_for = {
            (probe["protocol"], probe["port"]): probe["addresses"]
            for probe in bundle(stack, host)["health"]
            if probe["kind"] == "listen"
        }
        opened = {(item.protocol, item.port): item for s in services_of(stack, host) for item in s.listens}
        assert set(looked_for) == set(opened) and ("tcp", 22) in opened
        for port, addresses in looked_for.items():
            # The resolver is for the sites, and SSH of an existing host may listen where the host is managed alone.
            some = {53: list(map(str, host.addresses.local)), 22: [str(host.management_address)]}
            assert addresses == some.get(port[1], own)


def test_a_port_belongs_to_the_service_whose_daemon_listens(stack: Stack) -> None:
    for host in stack.all_hosts.values():
        for service in services_of(stack, host):
            daemons = [unit.name for unit in service.units if unit.name.endswith(".service") and not unit.once]
            assert daemons or not service.listens, f"{host.name}: {service.name} has nobody to start again"


def test_a_machine_of_ours_is_asked_for_its_addresses_and_a_rented_one_is_not(
    keyed_config: dict[str, Any],
) -> None:
    stack = parse("lab", "Pulumi.lab.yaml", keyed_config)
    for host in stack.all_hosts.values():
        asked = [probe["addresses"] for probe in bundle(stack, host)["health"] if probe["kind"] == "addresses"]
        own = [str(address) for address in (*host.addresses.local, *host.addresses.public)]
        assert asked == ([own] if host.machine else [])


def test_the_scanner_knows_which_addresses_lead_out_of_the_stack(config: dict[str, Any]) -> None:
    config["domains"]["dale.example"]["aliases"] = {"*": "team@hill.example", "ann": "ann", "mine": "info@hill.example"}
    leads = dict(elsewhere(parse("lab", "Pulumi.lab.yaml", config)))
    assert {address for address in leads if address.endswith("@hill.example")} == {
        f"{local}@hill.example" for local in ("partner", "team", "gone", "strict", "misled")
    }
    assert leads["team@moor.example"] == "yes" and "postmaster" not in leads
    # A catch-all leads out, so the others have to be named.
    assert leads["@dale.example"] == "yes" and leads["ann@dale.example"] == leads["mine@dale.example"] == "no"
    # The addresses at an MX's own names go where the postmaster's mail goes.
    config["domains"]["hill.example"]["aliases"]["postmaster"] = ["ann", "admin@far.example"]
    leads = dict(elsewhere(parse("lab", "Pulumi.lab.yaml", config)))
    for address in ("postmaster", "root", "abuse@smtp-in.hill.example", "root@localhost", "postmaster@hill.example"):
        assert leads[address] == "yes"


def test_an_alias_restarts_nothing_and_a_new_account_no_scanner(keyed_config: dict[str, Any]) -> None:
    """What reads tables that change often reads them again by itself, or is reloaded."""

    def restarted(config: dict[str, Any]) -> set[tuple[str, str]]:
        changed = parse("lab", "Pulumi.lab.yaml", config)
        found = set()
        for name, host in changed.all_hosts.items():
            before = bundle(original, original.all_hosts[name])
            after = bundle(changed, host)
            paths = [
                path
                for path, file in after["files"].items()
                if before["files"].get(path, {}).get("content") != file["content"]
            ]
            assert paths or name not in ("smtp-in-oak", "frontend-oak")
            found |= {
                (name, unit)
                for unit, rules in after["units"].items()
                for path in paths
                if path.startswith(tuple(rules["restart_on"]))
            }
        return found

    original = parse("lab", "Pulumi.lab.yaml", keyed_config)
    config = copy.deepcopy(keyed_config)
    config["domains"]["hill.example"]["aliases"]["novel"] = "ann"
    assert restarted(config) == set()
    config["accounts"]["novel"] = config["accounts"]["ann"]
    assert not {unit for _, unit in restarted(config)} & {"rspamd.service", "stunnel@learning.service"}


@pytest.mark.parametrize("release", [12, 13])
def test_all_limits_of_sessions_follow_from_one_key(config: dict[str, Any], release: int) -> None:
    config["service"]["release"] = release
    config["limits"] = {"imap_sessions": 3001, "sieve_processes": 9, "address_connections": 100}
    for name in ("maildrop-oak", "maildrop-elm"):
        config["hosts"][name]["machine"] = {**config["hosts"][name]["machine"], "memory": 16384}
    stack = parse("lab", "Pulumi.lab.yaml", config)
    files = bundle(stack, stack.all_hosts["maildrop-oak"])["files"]
    text = files["/etc/dovecot/dovecot.conf"]["content"]
    services = dict(re.findall(r"^service ([\w-]+) {\n(.*?)^}$", text, re.MULTILINE | re.DOTALL))

    def number(service: str, name: str) -> int:
        return int(re.findall(rf"^  {name} = (\d+)$", services[service], re.MULTILINE)[0])

    assert number("imap", "process_limit") == 3001
    assert number("managesieve", "process_limit") == 9
    # Beside all sessions there is room for two addresses that say nothing, and not for endlessly many.
    assert 3201 <= number("imap-login", "process_limit") * number("imap-login", "client_limit") < 3210
    assert number("managesieve-login", "process_limit") * number("managesieve-login", "client_limit") == 209
    endless = "service_count = 0" if release == 12 else "restart_request_count = unlimited"
    assert all(f"  {endless}\n" in services[name] for name in ("imap-login", "managesieve-login"))
    # Every process is a client of those that there is one of: stats, anvil, auth.
    (clients,) = re.findall(r"^default_client_limit = (\d+)$", text, re.MULTILINE)
    assert int(clients) >= 3001 + 9 + 200
    assert int(re.findall(r"TasksMax=(\d+)", files[TASKS]["content"])[0]) >= 2 * int(clients)
    nginx = bundle(stack, stack.all_hosts["frontend-oak"])["files"]["/etc/nginx/nginx.conf"]["content"]
    (connections,) = re.findall(r"worker_connections (\d+);", nginx)
    assert int(connections) > 2 * 3010
    assert int(re.findall(r"worker_rlimit_nofile (\d+);", nginx)[0]) > int(connections)


@pytest.mark.parametrize(("release", "memory", "sessions"), [(12, 2048, 1800), (13, 2048, 700), (13, 512, 100)])
def test_a_mailbox_machine_allows_as_many_sessions_as_its_memory_carries(
    config: dict[str, Any], release: int, memory: int, sessions: int
) -> None:
    config["service"]["release"] = release
    machine = config["hosts"]["maildrop-oak"]["machine"]
    config["hosts"]["maildrop-oak"]["machine"] = {**machine, "memory": memory}
    stack = parse("lab", "Pulumi.lab.yaml", config)
    text = bundle(stack, stack.all_hosts["maildrop-oak"])["files"]["/etc/dovecot/dovecot.conf"]["content"]
    assert re.search(rf"^service imap {{\n  process_limit = {sessions}$", text, re.MULTILINE)


def test_connections_of_an_address_are_limited_at_every_door_but_the_web_mail_s_own(bundles: dict[str, Any]) -> None:
    stream = file(bundles, "frontend-oak", "/etc/nginx/nginx.conf").partition("\nhttp {")[0]
    servers = re.findall(r"^    server {\n(.*?)^    }", stream, re.MULTILINE | re.DOTALL)
    limited = {server.split("listen ")[1].split(";")[0]: "limit_conn places 500;" in server for server in servers}
    assert {listen for listen, is_limited in limited.items() if not is_limited} == {
        listen for listen in limited if listen.startswith("127.0.0.1:")
    }
    assert sum(limited.values()) == 4 and len(limited) == 7


def test_what_dovecot_warns_of_is_refused(bundles: dict[str, Any]) -> None:
    for host in ("maildrop-oak", "smtp-out-oak"):
        checks = [check["run"] for check in bundles[host]["checks"] if "doveconf" in str(check)]
        assert len(checks) == 1 and '"$said"; exit 1' in checks[0][-1]


@pytest.mark.parametrize("release", [12, 13])
@pytest.mark.parametrize("host", ["maildrop-oak", "smtp-out-oak"])
def test_passwords_are_checked_in_workers_and_forgotten_when_logins_change(
    config: dict[str, Any], host: str, release: int
) -> None:
    config["service"]["release"] = release
    stack = parse("lab", "Pulumi.lab.yaml", config)
    pushed = bundle(stack, stack.all_hosts[host])
    text = pushed["files"]["/etc/dovecot/dovecot.conf"]["content"]
    assert re.search(r"^passdb {\n  driver = lua\n" if release == 12 else r"^passdb lua {\n", text, re.MULTILINE)
    # By the name as it was typed: what a name was made of may belong to another.
    assert release == 13 or "cache_key=%{orig_user}\n" in text
    assert 'return "%{original_user}"' in pushed["files"]["/etc/dovecot/logins.lua"]["content"]
    assert re.search(r"^service auth-worker {\n(?:  process_\w+ = \d+\n|  #.*\n)*  user = (?!root)", text, re.MULTILINE)
    assert "dovecot-auth-lua" in pushed["packages"]
    # Dovecot is not reloaded for it: sessions would stay with login processes of before, more at each change.
    forgetting = [name for name, unit in pushed["units"].items() if "/etc/dovecot/logins" in unit["restart_on"]]
    assert forgetting == ["posthorn-logins.service"]
    reloads = pushed["units"]["dovecot.service"]["reload_on"]
    assert "/etc/dovecot/logins.lua" in reloads and not {"/etc/dovecot/", "/etc/dovecot/logins"} & set(reloads)
