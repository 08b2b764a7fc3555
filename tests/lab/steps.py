"""What several lab tests do: write, talk to a server, look into mailboxes, stop a service."""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from lab import foreign, internet, pair
from tests.lab.conftest import Lab

MX = {"oak": "198.51.100.2", "elm": "198.51.100.18", "ash": "198.51.100.34"}
NAME = "smtp-in.hill.example"
# Each session from another address, since no client may have more than ten in a minute.
PLACES = cycle(f"203.0.113.{last}" for last in range(81, 100))
INSIDE = ("net.hill.example", "198.18.", "2001:db8:1:", "maildrop-", "localdomain")
"""Words that nobody outside is to read: names and addresses of the hosts behind the MX."""


FIRST = "frontend-oak"
"""The scanner that all mail hosts prefer."""
STATES = """
import socket
said = b""
with socket.socket(socket.AF_UNIX) as haproxy:
    haproxy.settimeout(10)
    haproxy.connect("/run/haproxy-master.sock")
    haproxy.sendall(b"@1 show servers state scanners\\n")
    # An empty line ends the answer.
    while b"\\n\\n" not in said:
        said += haproxy.recv(4096)
print(said.decode())
"""


def eventually(true: Callable[[], Any], seconds: float = 40) -> Any:
    """What a call returns once it is true: a mail has several hosts to pass."""
    return pair.eventually(true, seconds)


def mail(*, sender: str = "bob@far.example", to: str = "ann@hill.example", body: str = "") -> str:
    """A mail with a Message-ID of its own, ended as SMTP ends it."""
    token = secrets.token_hex(8)
    text = (
        f"From: <{sender}>\nTo: <{to}>\nSubject: A word\nMessage-ID: <{token}@far.example>\n"
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S +0000', time.gmtime())}\n\n"
        f"{body or f'Words that nobody wrote before: {token}.'}\n.\n"
    )
    return text.replace("\n", "\r\n")


def id_of(text: str) -> str:
    found = re.search(r"Message-ID: (<[^>]+>)", text)
    assert found
    return found.group(1)


def talk(lab: Lab, **request: Any) -> dict[str, tuple[int, str]]:
    """One SMTP session: the last reply to each kind of command."""
    request = {"server": MX["oak"], "name": NAME, "tls": "starttls", **request}
    answer = lab.client("talk", **request)
    assert "replies" in answer, answer
    return {what: (code, text) for what, code, text in answer["replies"]}


def submission(lab: Lab, **request: Any) -> dict[str, tuple[int, str]]:
    request.setdefault("source", next(PLACES))
    return talk(lab, **{"server": "smtp-out.hill.example", "name": "smtp-out.hill.example", "port": 587, **request})


def greeting(lab: Lab, door: dict[str, Any]) -> list[str]:
    """What a client says before its mail."""
    hello = "EHLO mx.far.example\r\n"
    said = [hello, "STARTTLS\r\n", hello] if door.get("starttls") else [hello]
    if user := door.get("user"):
        login = base64.b64encode(f"\0{user}\0{lab.state.passwords[user]}".encode()).decode()
        said.append(f"AUTH PLAIN {login}\r\n")
    return said


def session(lab: Lab, *sends: str, **request: Any) -> list[str]:
    """A session byte by byte (see `lab.client.raw`)."""
    request = {"server": MX["oak"], "name": NAME, "source": "203.0.113.68", "sends": sends, **request}
    replies: list[str] = lab.client("raw", **request)["replies"]
    return replies


def in_mailbox(lab: Lab, user: str, message_id: str, **more: Any) -> str:
    answer = lab.client("fetch", server="imap.hill.example", user=user, message_id=message_id, **more)
    assert "mail" in answer, answer
    return str(answer["mail"])


def on(lab: Lab, host: str, user: str, message_id: str) -> bool:
    done = lab.run(host, "doveadm", "search", "-u", user, "mailbox", "*", "header", "Message-ID", message_id)
    return bool(done.stdout.strip())


def abroad(lab: Lab, *words: str) -> str:
    """The mail in the foreign mailbox that holds all these words."""
    found = eventually(lambda: [m for m in foreign.mails(lab.state) if all(word in m for word in words)])
    return str(found[0])


def log(lab: Lab, host: str, pattern: str) -> str:
    """The newest lines of Postfix that match."""
    return str(lab.run(host, "journalctl", "-u", lab.postfix(host), "-o", "cat", "-n", "20", "-g", pattern).stdout)


def waiting(lab: Lab, host: str, address: str) -> list[str]:
    """The queue IDs of the mails to an address that wait at a host."""
    mails = [json.loads(line) for line in lab.run(host, "postqueue", "-j").stdout.splitlines()]
    return [m["queue_id"] for m in mails if any(to["address"] == address for to in m["recipients"])]


def forget(lab: Lab, host: str, address: str) -> None:
    """Takes mail to an address out of a host's queue."""
    for queue_id in waiting(lab, host, address):
        assert lab.run(host, "postsuper", "-d", queue_id).returncode == 0


def tried_again(lab: Lab, hosts: Sequence[str], true: Callable[[], Any]) -> Any:
    """What a call returns once it is true, while hosts try what waits in their queues again and again.

    What was tried a moment too early would wait for minutes.
    """

    def tried() -> Any:
        for host in hosts:
            lab.run(host, "postqueue", "-f")
        return true()

    return eventually(tried, 60)


@contextmanager
def stopped(lab: Lab, unit: str, *hosts: str) -> Iterator[None]:
    for host in hosts:
        lab.run(host, "systemctl", "stop", unit)
    try:
        yield
    finally:
        for host in hosts:
            lab.run(host, "systemctl", "start", unit)


def knot(lab: Lab, zone: str, *commands: str) -> None:
    """Changes a zone behind the stack's back."""
    lines = "; ".join(f"knotc {c} >/dev/null" for c in (f"zone-begin {zone}", *commands, f"zone-commit {zone}"))
    done = lab.run(internet.NAME, "sh", "-ec", lines)
    assert done.returncode == 0, done.stderr


def is_asked(lab: Lab, host: str) -> bool:
    """Whether a mail host knows the first scanner to be well: "Management Guide" of HAProxy, show servers state."""
    said = str(lab.run(host, "python3", "-c", STATES).stdout)
    return any(line.split()[3] == FIRST and line.split()[5] == "2" for line in said.splitlines() if " 198." in line)


def first_scanner_is_asked(lab: Lab, kind: str) -> None:
    """Waits until all hosts of a kind ask the first scanner: after a push it was away for a moment."""
    for site in MX:
        eventually(lambda site=site: is_asked(lab, f"{kind}-{site}"))  # type: ignore[misc]
