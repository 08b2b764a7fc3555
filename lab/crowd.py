"""Many mail clients at once, in the lab's client namespace: they log in and stay, or log out again, or say nothing.

``python -m lab.crowd`` reads one request, a line of JSON, from standard input, with steps that are done one after
another, and prints what became of each. What a step leaves open stays so until standard input ends.
"""

from __future__ import annotations

import contextlib
import imaplib
import json
import resource
import select
import smtplib
import socket
import ssl
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

IMAPS, SUBMISSION = 993, 587
OVER_ONE = 4
SOME_MAIL = "From: <{}@hill.example>\r\nTo: <bob@far.example>\r\nSubject: A word\r\n\r\nSome words.\r\n"
PATIENCE = 30


class Client(imaplib.IMAP4_SSL):
    """One mail client: it comes from an address that it is told, and believes the authority of the lab."""

    def __init__(self, server: str, name: str, source: str, context: ssl.SSLContext) -> None:
        self.name, self.source, self.trusted = name, source, context
        super().__init__(server, IMAPS, ssl_context=context, timeout=PATIENCE)

    def _create_socket(self, timeout: float | None) -> ssl.SSLSocket:
        made = socket.create_connection((self.host, self.port), timeout, (self.source, 0))
        return self.trusted.wrap_socket(made, server_hostname=self.name)


@dataclass
class Crowd:
    """All clients of a request."""

    server: str
    """An address of a front end."""
    name: str
    authority: str
    side_by_side: int = 16
    inside: list[Client] = field(default_factory=list)
    silent: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = ssl.create_default_context(cafile=self.authority)
        # Submission is asked for by an address, and shows its own name.
        self.lenient = ssl.create_default_context(cafile=self.authority)
        self.lenient.check_hostname = False

    def stay(self, count: int, users: list[list[str]], source: str) -> dict[str, Any]:
        """Clients that log in, and stay. ``refused`` has the words to those who were not let in."""
        return self._log_in(count, users, source, self.inside.append)

    def visit(self, count: int, users: list[list[str]], source: str, at_once: int = 0) -> dict[str, Any]:
        """Clients that log in, and out again; ``at_once`` says how many at the same time."""
        return self._log_in(count, users, source, lambda client: client.logout(), at_once)

    def submit(self, count: int, user: list[str], sources: list[str]) -> dict[str, Any]:
        """Mails to outside, four over each connection. Each address submits some of them, since all are limited."""

        def one(number: int) -> tuple[float, str]:
            began = time.monotonic()
            try:
                source = (sources[number % len(sources)], 0)
                with smtplib.SMTP(self.server, SUBMISSION, self.name, PATIENCE, source) as smtp:
                    smtp.starttls(context=self.lenient)
                    smtp.login(*user)
                    for _ in range(OVER_ONE):
                        smtp.sendmail(f"{user[0]}@hill.example", "bob@far.example", SOME_MAIL.format(user[0]))
            except (OSError, smtplib.SMTPException) as refused:
                return time.monotonic() - began, f"{type(refused).__name__}: {refused}"
            return time.monotonic() - began, ""

        done = self._all(one, count // OVER_ONE)
        return done | {"in": done["in"] * OVER_ONE}

    def say_nothing(self, count: int, source: str, closed: int) -> dict[str, Any]:
        """Clients that connect and say nothing; how many were turned away, once as many were as ``closed``."""
        for _ in range(count):
            self.silent.append(socket.create_connection((self.server, IMAPS), PATIENCE, (source, 0)))
        poll = select.poll()
        for one in self.silent:
            poll.register(one, select.POLLIN)
        deadline = time.monotonic() + PATIENCE
        while (away := len(poll.poll(0))) < closed and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"closed": away}

    def look_around(self) -> dict[str, Any]:
        """How many of those who stayed are still there."""
        there = 0
        for client in self.inside:
            with contextlib.suppress(OSError, imaplib.IMAP4.error):
                there += client.noop()[0] == "OK"
        return {"there": there}

    def _log_in(
        self, count: int, users: list[list[str]], source: str, then: Callable[[Client], Any], at_once: int = 0
    ) -> dict[str, Any]:
        def one(number: int) -> tuple[float, str]:
            user, password = users[number % len(users)]
            began = time.monotonic()
            try:
                client = Client(self.server, self.name, source, self.context)
                client.login(user, password)
            except (OSError, imaplib.IMAP4.error) as refused:
                return time.monotonic() - began, f"{type(refused).__name__}: {refused}"
            took = time.monotonic() - began
            then(client)
            return took, ""

        return self._all(one, count, at_once)

    def _all(self, one: Callable[[int], tuple[float, str]], count: int, at_once: int = 0) -> dict[str, Any]:
        began = time.monotonic()
        with ThreadPoolExecutor(at_once or self.side_by_side) as pool:
            done = list(pool.map(one, range(count)))
        return {
            "in": sum(not words for _, words in done),
            "refused": [words for _, words in done if words],
            "median": sorted(took for took, _ in done)[len(done) // 2],
            "slowest": max(took for took, _ in done),
            "seconds": time.monotonic() - began,
        }


def main() -> None:
    """Does the steps of the request."""
    request = json.loads(sys.stdin.readline())
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    steps = request.pop("steps")
    crowd = Crowd(**request)
    print(json.dumps([getattr(crowd, step.pop("do"))(**step) for step in steps]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
