"""The journals of all hosts: a lab that has come up left no warning and no error in them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.lab.conftest import Lab

WARNING = 4
"""Priority from which a line counts (syslog(3))."""
IN_WORDS = re.compile(
    r"\b(WARNING|ERROR|CRITICAL|ALERT|EMERG|FATAL|PANIC)\b|\[(warn|error|crit|alert|emerg)\]|LOG[0-4]\[|Traceback"
)
"""How daemons that write to standard error say how bad it is."""

EXPECTED = {
    r"dbus-daemon: .*Failed to set fd limit": "a container may not",
    r"haproxy: .*(erver scanners/\S+ is (DOWN|UP)|no server available)": "scanners come up after their clients",
    r"stunnel4?: .*(No more addresses to connect|s_connect: |reset by peer|TLS socket closed)": "its peer is not up",
    r"stunnel4?: .*No OCSP stapling response": "5.74 says so of every peer; the stack's authority has no responder",
    r"rspamd: .*FREEMAIL_REPLYTO_NEQ_FROM_DOM": "a private root leads to no lists of free mail providers",
    r"rspamd: .*cannot load controller stats": "there are none at the first start",
    r"rspamd: .*skip obtaining bayes tokens": "a scanner has learnt nothing yet",
    r"dovecot: .*Time (moved|jumped) forwards": "the machine of the lab is busy",
    r"dovecot: .*SIGHUP received": "how Dovecot calls a reload, for a certificate of the authority",
    r"posthorn-sync: taking over the users": "the other mailbox host comes up later",
    r"postfix/\S*smtpd: .*(unsupported protocol|alert unknown ca)": "make check tries old TLS, and who is believed",
}
"""What a lab's first minutes leave there by their nature, and why."""


def serious(lab: Lab, host: str) -> list[str]:
    """The lines of a host's journal that are warnings or worse, by their priority or by their words."""
    fields = "--output-fields=PRIORITY,SYSLOG_IDENTIFIER,MESSAGE"
    began, ready = lab.came_up
    window = (f"--since=@{int(began)}", f"--until=@{int(ready)}")
    lines = lab.run(host, "journalctl", "--no-pager", "-o", "json", fields, *window).stdout.splitlines()
    found = []
    for line in lines:
        entry: dict[str, Any] = json.loads(line)
        message = entry.get("MESSAGE") or ""
        text = bytes(message).decode(errors="replace") if isinstance(message, list) else str(message)
        if int(entry.get("PRIORITY", 6)) <= WARNING or IN_WORDS.search(text):
            found.append(f"{entry.get('SYSLOG_IDENTIFIER')}: {text}")
    return found


def test_a_lab_comes_up_without_a_warning_in_any_journal(lab: Lab) -> None:
    known = re.compile("|".join(EXPECTED))
    found = {host: [line for line in serious(lab, host) if not known.search(line)] for host in lab.stack().all_hosts}
    wrong = [f"{host}: {line}" for host, lines in found.items() for line in lines]
    if wrong:
        pytest.fail(f"{len(wrong)} lines:\n" + "\n".join(wrong[:100]), pytrace=False)
