"""Inside a host: who may connect to what of it, and how each daemon is shut in; and the spool that users fill."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from model.stack import Stack
from services.bundle import bundle
from services.learning import FEEDER, LEARN, MOST, PIPES, SPOOL


@pytest.fixture(scope="module")
def bundles(keyed_stack: Stack) -> dict[str, dict[str, Any]]:
    return {name: bundle(keyed_stack, host) for name, host in keyed_stack.all_hosts.items()}


def text(bundles: dict[str, dict[str, Any]], host: str, path: str) -> str:
    return str(bundles[host]["files"][path]["content"])


def own(bundles: dict[str, dict[str, Any]], host: str) -> list[str]:
    """Who on a host may connect to what of it, as the firewall has it."""
    chain = text(bundles, host, "/etc/nftables.conf").partition("chain own {")[2].partition("}\n}")[0]
    return [line.strip() for line in chain.splitlines() if line.strip()]


def test_each_user_of_a_host_may_connect_to_what_it_has_to_ask_and_to_nothing_else(
    bundles: dict[str, dict[str, Any]],
) -> None:
    assert own(bundles, "smtp-in-oak") == [
        "meta skuid root accept",
        "tcp dport { 25, 53, 465 } accept",
        'meta skuid "_rspamd" tcp dport { 11330 } accept',
        'meta skuid "postfix" tcp dport { 8461, 8891, 10001, 10002, 10024, 11332 } accept',
        "reject with tcp reset",
    ]
    assert own(bundles, "frontend-oak") == [
        "meta skuid root accept",
        "tcp dport { 53, 80, 443, 465, 587, 993 } accept",
        'meta skuid "stunnel4" tcp dport { 11334 } accept',
        'meta skuid "webmail" tcp dport { 20587, 20993, 24190 } accept',
        'meta skuid "www-data" tcp dport { 8443 } accept',
        "reject with tcp reset",
    ]


def test_what_comes_in_again_on_loopback_comes_from_postfix_or_from_the_owner_of_the_mail(
    bundles: dict[str, dict[str, Any]],
) -> None:
    again = {
        host: re.findall(r"^127\.0\.0\.1:(\d+) ", files["files"]["/etc/postfix/master.cf"]["content"], re.MULTILINE)
        for host, files in bundles.items()
        if "/etc/postfix/master.cf" in files["files"]
    }
    assert all(again[host] for host in ("smtp-in-oak", "smtp-out-oak", "maildrop-oak"))
    for host, ports in again.items():
        for port in ports:
            callers = [rule for rule in own(bundles, host) if re.search(rf"[ {{]{port}[ ,]", rule)]
            assert callers and all(re.match('meta skuid "(postfix|vmail)"', rule) for rule in callers), (host, port)


def test_who_has_no_business_outside_gets_nowhere(bundles: dict[str, dict[str, Any]]) -> None:
    for host, users in (("frontend-oak", '"redis", "webmail"'), ("smtp-in-oak", '"opendkim", "postsrsd"')):
        assert f"oif != lo meta skuid {{ {users} }} reject" in text(bundles, host, "/etc/nftables.conf")


def test_a_daemon_is_started_anew_when_it_is_shut_in_otherwise(bundles: dict[str, dict[str, Any]]) -> None:
    for host in bundles.values():
        for path in (path for path in host["files"] if path.endswith("/sandbox.conf")):
            unit = path.split("/")[-2].removesuffix(".d")
            assert path in host["units"][unit]["restart_on"]


def filtered(table: str, line: str) -> str:
    """What a table of pcre makes of a line (pcre_table(5)): the first expression that matches counts."""
    for entry in (entry for entry in table.splitlines() if not entry.startswith("#")):
        negative, expression, result = re.fullmatch(r"(!?)/(.*)/\s+(.*)", entry).groups()  # type: ignore[union-attr]
        found = re.search(expression, line, re.IGNORECASE)
        if negative and not found:
            return str(result)
        if not negative and found:
            return str(result).replace("${1}", found.group(1))
    return line


def test_the_web_mail_names_no_user(bundles: dict[str, dict[str, Any]]) -> None:
    table = text(bundles, "smtp-out-oak", "/etc/postfix/xclient")
    for said in ("XCLIENT LOGIN=ben ADDR=203.0.113.10", "xclient addr=203.0.113.10\tLOGIN=ben"):
        assert re.fullmatch(r"XCLIENT addr=203\.0\.113\.10", filtered(table, said), re.IGNORECASE)
    for said in ("XCLIENT LOGIN=ben", " XCLIENT LOGIN=ben", '"XCLIENT" LOGIN=ben', "XFORWARD NAME=x", "XCLIENTLOGIN"):
        assert filtered(table, said) == "REFUSED"
    for said in ("EHLO webmail.hill.example", "AUTH PLAIN AGFubgB4", "MAIL FROM:<ann@hill.example>", "QUIT"):
        assert filtered(table, said) == said


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    for folder in ("tmp", "new", "frontend-oak"):
        (tmp_path / folder).mkdir()
    return tmp_path


def test_a_lesson_is_in_the_spool_as_it_came_and_no_more_than_its_share(
    bundles: dict[str, dict[str, Any]], spool: Path
) -> None:
    program = spool / "learn"
    program.write_text(text(bundles, "maildrop-oak", f"{PIPES}/learn").replace(SPOOL, str(spool)))
    mail = os.urandom(200_000) + b"\n"

    def teach(kind: str) -> int:
        return subprocess.run(["perl", program, kind], input=mail, env={}).returncode

    assert teach("spam") == 0
    (lesson,) = (spool / "new").iterdir()
    assert lesson.name.startswith("spam.") and lesson.read_bytes() == mail and not lesson.stat().st_mode & 0o077
    for number in range(MOST - 1):
        (spool / "new" / f"ham.{number}").touch()
    assert teach("ham") == 0
    assert len(list((spool / "new").iterdir())) == MOST and not list((spool / "tmp").iterdir())
    assert teach("../x") != 0


def test_what_waits_for_a_scanner_has_an_end(bundles: dict[str, dict[str, Any]], spool: Path) -> None:
    program = text(bundles, "maildrop-oak", FEEDER)
    scope: dict[str, Any] = {}
    exec(program.removesuffix("main()\n"), scope)
    queue, now = spool / "frontend-oak", time.time()
    for number in range(MOST + 3):
        (queue / f"spam.{number}").touch()
        os.utime(queue / f"spam.{number}", (now - number, now - number))
    (queue / "ham.old").touch()
    os.utime(queue / "ham.old", (now - 8 * 86400, now - 8 * 86400))
    scope["trim"](queue, MOST)
    # The first that was taught comes first, and the oldest have gone.
    assert [mail.name for mail in scope["in_order"](queue)] == [f"spam.{n}" for n in reversed(range(MOST))]


@pytest.mark.parametrize("kind", ["spam", "ham"])
def test_a_large_mail_is_no_lesson(bundles: dict[str, dict[str, Any]], kind: str) -> None:
    script = text(bundles, "maildrop-oak", f"{LEARN}/{kind}.sieve")
    assert re.search(r"size :over 512K \{\s*stop;\s*\}\s*pipe", script)
