"""The web mail: what stands in its files, and what an operator is told."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from model.base import StackError
from model.load import parse
from model.stack import Stack
from services.bundle import bundle, secrets


@pytest.fixture(scope="module")
def bundles(keyed_stack: Stack) -> dict[str, dict[str, Any]]:
    return {name: bundle(keyed_stack, host) for name, host in keyed_stack.all_hosts.items()}


def nginx(bundles: dict[str, dict[str, Any]], site: str) -> str:
    content: str = bundles[f"frontend-{site}"]["files"]["/etc/nginx/nginx.conf"]["content"]
    return content


def problems_of(config: dict[str, Any]) -> list[str]:
    with pytest.raises(StackError) as caught:
        parse("lab", "Pulumi.lab.yaml", config)
    return [str(problem) for problem in caught.value.problems]


def test_every_front_end_prefers_the_primary_and_knows_the_standby(bundles: dict[str, dict[str, Any]]) -> None:
    for site in ("oak", "elm", "ash"):
        ways = re.findall(r"upstream webmail-frontend-(\w+) {.*?}", nginx(bundles, site), re.DOTALL)
        assert ways == ["oak", "elm"]
        assert "default webmail-frontend-oak;" in nginx(bundles, site)
    assert re.findall(r"server (\S+):8443 .*?(backup)?;", nginx(bundles, "ash")) == [
        ("198.18.1.14", ""),
        ("198.18.2.14", "backup"),
        ("198.18.2.14", ""),
        ("198.18.1.14", "backup"),
    ]


def test_whoever_is_logged_in_at_the_standby_stays_there(bundles: dict[str, dict[str, Any]]) -> None:
    found = re.search(r'map "(.*)" \$webmail {.*?"~(.*?)" (\S+);', nginx(bundles, "ash"), re.DOTALL)
    assert found
    cookies, pattern, upstream = found.groups()
    assert (cookies, upstream) == ("$cookie_webmail_frontend_oak/$cookie_webmail_frontend_elm/", "webmail-frontend-elm")
    seen = [bool(re.search(pattern, value)) for value in ("//", "abc//", "/abc/", "abc/def/")]
    assert seen == [False, False, True, False]
    settings = bundles["frontend-elm"]["files"]["/etc/roundcube/config.inc.php"]["content"]
    assert "['session_name'] = 'webmail_frontend_elm'" in settings


def test_only_hosts_with_the_role_have_roundcube(bundles: dict[str, dict[str, Any]]) -> None:
    having = [name for name, wanted in bundles.items() if "roundcube-core" in wanted["packages"]]
    assert having == ["frontend-oak", "frontend-elm"]
    assert "php.sock" not in nginx(bundles, "ash")


def test_the_front_ends_alone_reach_roundcube(bundles: dict[str, dict[str, Any]]) -> None:
    rules = bundles["frontend-oak"]["files"]["/etc/nftables.conf"]["content"]
    assert "ip saddr { 198.18.1.14, 198.18.2.14, 198.18.3.14 } tcp dport 8443 accept" in rules
    for port in (20993, 20587, 24190):
        assert f"dport {port}" not in rules


def test_no_file_of_the_web_mail_with_a_secret_is_for_everybody(
    keyed_stack: Stack, bundles: dict[str, dict[str, Any]]
) -> None:
    wanted = bundles["frontend-oak"]
    key = wanted["secrets"]["/etc/posthorn/webmail/session-key"]
    assert (key["mode"], key["owner"], key["group"]) == ("0640", "root", "webmail")
    assert keyed_stack.keys.private
    standby = secrets(keyed_stack, keyed_stack.all_hosts["frontend-elm"])
    assert standby["session-key"] == keyed_stack.keys.private.session


def test_an_account_writes_as_its_own_name_first(bundles: dict[str, dict[str, Any]]) -> None:
    known = json.loads(bundles["frontend-oak"]["files"]["/etc/posthorn/webmail/addresses.json"]["content"])
    assert known["ann"][0] == "ann@hill.example"
    assert "helpdesk@dale.example" in known["ben"] and "bob@far.example" not in known["ben"]


def test_what_is_uploaded_may_be_as_large_as_a_mail(keyed_stack: Stack, bundles: dict[str, dict[str, Any]]) -> None:
    size = keyed_stack.limits.message_size
    pool = bundles["frontend-oak"]["files"]["/etc/posthorn/webmail/fpm.conf"]["content"]
    assert f"[upload_max_filesize] = {size}" in pool
    assert f"client_max_body_size {size + 1048576};" in nginx(bundles, "ash")


def test_the_web_mail_may_say_where_its_users_are_and_nobody_else(bundles: dict[str, dict[str, Any]]) -> None:
    master = bundles["smtp-out-oak"]["files"]["/etc/postfix/master.cf"]["content"]
    hosts = "198.18.1.14,[2001:db8:1:1::14],198.18.2.14,[2001:db8:1:2::14]"
    assert re.findall(r"smtpd_authorized_xclient_hosts=(\S*)", master) == [hosts]
    rules = bundles["smtp-out-oak"]["files"]["/etc/nftables.conf"]["content"]
    assert "ip saddr { 198.18.1.14, 198.18.2.14 } tcp dport 12587 accept" in rules


def test_the_web_mail_without_a_front_end_is_refused(config: dict[str, Any]) -> None:
    config["hosts"]["maildrop-oak"]["roles"].append("webmail")
    assert problems_of(config) == [
        "hosts.maildrop-oak.roles: webmail is served by the NGINX of a front end: add the role frontend"
    ]


def test_a_web_mail_that_nobody_may_reach_is_refused(config: dict[str, Any]) -> None:
    del config["access"]["users_from"]
    assert problems_of(config) == ["access.users_from: names no network: then nobody gets to the web mail"]


def test_without_the_role_visitors_are_sent_to_the_web_site(keyed_config: dict[str, Any]) -> None:
    hosts = {
        name: {**host, "roles": [role for role in host["roles"] if role != "webmail"]}
        for name, host in keyed_config["hosts"].items()
    }
    stack = parse("lab", "Pulumi.lab.yaml", {**keyed_config, "hosts": hosts})
    text = nginx({name: bundle(stack, host) for name, host in stack.all_hosts.items()}, "oak")
    assert "8443" not in text and "return 302 https://www.hill.example/;" in text
