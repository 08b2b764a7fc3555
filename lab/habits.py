"""Users with the habits of people, in the lab's client namespace: they read, wait for mail, write, and click.

``python -m lab.habits`` reads one request, a line of JSON, from standard input. It says ``ready`` once all sessions are
open, and goes on for the seconds that it was told. Then it reads one more line, a list of the Message-IDs that others
sent meanwhile, waits for all that is still to arrive, and prints what it saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.cookies
import json
import random
import re
import resource
import smtplib
import socket
import ssl
import sys
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any

IMAPS, SUBMISSIONS, HTTPS = 993, 465, 443
FEWEST, MOST = 2, 5
"""Sessions of a user: a phone holds two, a mail program up to five."""
LOG_INS_AT_ONCE = 16
PATIENCE = 30.0
ARRIVES_SECONDS = 90.0
MESSAGE_ID = re.compile(rb"message-id:\s*(<[^>]*>)", re.IGNORECASE)
FETCHED = re.compile(rb"\* (\d+) FETCH")
EXISTS = re.compile(rb"\* (\d+) EXISTS")
TOKEN = re.compile(r'name="_token" value="([^"]+)"')


@dataclass
class Tally:
    """How often something was done, how long each took, and the words of those that were refused."""

    times: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    async def of(self, doing: Awaitable[Any]) -> Any:
        """Waits for something, and notes what became of it. Returns None where it was refused."""
        began = time.monotonic()
        try:
            done = await doing
        except (OSError, EOFError, smtplib.SMTPException, http.client.HTTPException, TimeoutError) as error:
            self.refused.append(f"{type(error).__name__}: {error}")
            return None
        self.times.append(time.monotonic() - began)
        return done


class Session:
    """An IMAP session that has INBOX open, and waits for mail (RFC 2177)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.exists = self.seen = 0
        """How many mails there are, and of how many it was asked for the Message-ID: more come all the while."""

    async def answer(self) -> list[bytes]:
        """The lines up to the end of a command, literals within them. Raises `OSError` where it is not done."""
        lines: list[bytes] = []
        while True:
            line = await self.line()
            if found := EXISTS.match(line):
                self.exists = int(found[1])
            if line.startswith(b"x "):
                if not line.startswith(b"x OK"):
                    raise OSError(line.decode(errors="replace").strip())
                return lines
            lines.append(line)

    async def line(self) -> bytes:
        line = b""
        while True:
            part = await self.reader.readline()
            if not part:
                raise EOFError("the server closed the session")
            line += part
            literal = re.search(rb"\{(\d+)\}\r\n$", part)
            if literal is None:
                return line
            line += await self.reader.readexactly(int(literal[1]))

    async def do(self, command: str) -> list[bytes]:
        self.writer.write(f"x {command}\r\n".encode())
        await self.writer.drain()
        return await self.answer()

    async def wait(self) -> list[bytes]:
        """Waits for new mail, and returns the answer to a request for its Message-IDs."""
        if self.exists <= self.seen:
            await self._idle()
        lines = await self.do(f"FETCH {self.seen + 1}:* (UID FLAGS BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])")
        self.seen = max(int(found[1]) for line in lines if (found := FETCHED.match(line)))
        return lines

    async def _idle(self) -> None:
        self.writer.write(b"x IDLE\r\n")
        while self.exists <= self.seen:
            line = await self.line()
            if line.startswith(b"x "):
                raise OSError(line.decode(errors="replace").strip())
            if found := EXISTS.match(line):
                self.exists = int(found[1])
        self.writer.write(b"DONE\r\n")
        await self.answer()


@dataclass
class Habits:
    """All users of a request."""

    doors: list[str]
    """Addresses of front ends."""
    imap: str
    smtp: str
    webmail: str
    """Names, as their certificates have them."""
    authority: str
    users: list[tuple[str, str]]
    """Name and password. Everybody's address is his name in `domain`."""
    domain: str
    abroad: str
    """An address elsewhere, that each third mail goes to."""
    sources: list[str]
    at_home: str
    """Where they come from who use the webmail: it is for some networks alone."""
    seconds: float
    submissions: float
    clicks: float
    """Each a second, over all users."""
    sessions: list[Session] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    """What the sessions said that ended by themselves."""
    arrived: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    """Message-ID to whom it came, and when his first session was told."""
    submitted: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Message-ID to who it is for, and when it was taken."""

    def __post_init__(self) -> None:
        self.context = ssl.create_default_context(cafile=self.authority)
        self.logins, self.mails, self.pages = Tally(), Tally(), Tally()
        self.cookies: dict[int, str] = {}
        self.pool = ThreadPoolExecutor(32)

    def place(self, number: int) -> tuple[str, tuple[str, int]]:
        """The front end that a user goes to, and where he comes from."""
        return self.doors[number % len(self.doors)], (self.sources[number % len(self.sources)], 0)

    # Reading

    async def _open(self, number: int) -> Session:
        name, password = self.users[number]
        door, source = self.place(number)
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(
                door, IMAPS, ssl=self.context, server_hostname=self.imap, local_addr=source, limit=2**20
            ),
            PATIENCE,
        )
        session = Session(reader, writer)
        await session.line()
        await asyncio.wait_for(session.do(f'LOGIN "{name}" "{password}"'), PATIENCE)
        await session.do("SELECT INBOX")
        session.seen = session.exists
        return session

    async def open_all(self) -> list[asyncio.Task[None]]:
        """Opens the sessions of all users, some at once. Returns the tasks that keep them."""
        gate = asyncio.Semaphore(LOG_INS_AT_ONCE)
        kept: list[asyncio.Task[None]] = []

        async def one(number: int, *, first: bool) -> None:
            async with gate:
                session = await self.logins.of(self._open(number))
            if session is not None:
                self.sessions.append(session)
                kept.append(asyncio.create_task(self._read(session, self.users[number][0] if first else "")))

        chance = random.Random(1)
        wanted = [
            (number, turn == 0) for number in range(len(self.users)) for turn in range(chance.randint(FEWEST, MOST))
        ]
        # People do not come one after another: neither with all their programs at once.
        chance.shuffle(wanted)
        await asyncio.gather(*(one(number, first=first) for number, first in wanted))
        return kept

    async def _read(self, session: Session, user: str) -> None:
        try:
            while True:
                for line in await session.wait():
                    if user and (found := MESSAGE_ID.search(line)):
                        self.arrived.setdefault(found[1].decode(), []).append((user, time.time()))
        except (OSError, EOFError) as error:
            self.ended.append(str(error))

    # Writing

    def _submit(self, number: int, to: str) -> tuple[str, float]:
        name, password = self.users[number]
        door, source = self.place(number)
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = f"{name}@{self.domain}", to, "A word"
        mail["Date"], mail["Message-ID"] = formatdate(), make_msgid(domain=self.domain)
        mail.set_content("Some words, as people write them.\n" * 20)
        smtp = _Submissions(context=self.context, timeout=PATIENCE)
        smtp.door, smtp.source = door, source
        smtp.connect(self.smtp, SUBMISSIONS)
        with smtp:
            smtp.login(name, password)
            smtp.send_message(mail)
        return str(mail["Message-ID"]), time.time()

    async def write(self, count: int) -> None:
        """A mail of somebody to somebody else, or abroad."""
        number = random.randrange(len(self.users))
        to = self.abroad if count % 3 == 2 else f"{random.choice(self.users)[0]}@{self.domain}"
        loop = asyncio.get_running_loop()
        if taken := await self.mails.of(loop.run_in_executor(self.pool, self._submit, number, to)):
            self.submitted[taken[0]] = (to, taken[1])

    # Clicking

    def _page(self, number: int) -> None:
        """A click in the webmail: the list of mails, after the login where there was none."""
        door, source = self.doors[number % len(self.doors)], (self.at_home, 0)
        if number not in self.cookies:
            text, cookie = self._ask(door, source, "GET", "/", "")
            token = TOKEN.search(text)
            if token is None:
                raise OSError("the webmail shows no form to log in")
            name, password = self.users[number]
            form = {"_token": token[1], "_task": "login", "_action": "login", "_user": name, "_pass": password}
            _, cookie = self._ask(door, source, "POST", "/?_task=login", cookie, urllib.parse.urlencode(form))
            self.cookies[number] = cookie
        text, _ = self._ask(door, source, "GET", "/?_task=mail&_mbox=INBOX", self.cookies[number])
        if '"task":"mail"' not in text:
            del self.cookies[number]
            raise OSError("the webmail shows no mails")

    def _ask(
        self, door: str, source: tuple[str, int], method: str, path: str, cookie: str, form: str = ""
    ) -> tuple[str, str]:
        connection = http.client.HTTPSConnection(self.webmail, timeout=PATIENCE)
        plain = socket.create_connection((door, HTTPS), PATIENCE, source)
        connection.sock = self.context.wrap_socket(plain, server_hostname=self.webmail)
        try:
            headers = {"Cookie": cookie} if cookie else {}
            if form:
                headers["Content-Type"] = "application/x-www-form-urlencoded"
            connection.request(method, path, form or None, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            if answer.status not in (200, 302):
                raise OSError(f"the webmail answers {answer.status}")
        finally:
            connection.close()
        jar = http.cookies.SimpleCookie(cookie)
        for header in answer.headers.get_all("Set-Cookie", []):
            jar.load(header)
        return text, "; ".join(f"{name}={morsel.value}" for name, morsel in jar.items() if morsel.value != "-del-")

    async def click(self, count: int) -> None:
        """One user clicks: each has a session of his own, and a few of them use the webmail."""
        loop = asyncio.get_running_loop()
        number = count % min(len(self.users), 40)
        await self.pages.of(loop.run_in_executor(self.pool, self._page, number))

    # All together

    async def at_a_rate(self, rate: float, one: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """Begins something so many times a second, whether or not the last has ended: people do not wait in line."""
        began, tasks = time.monotonic(), list[asyncio.Task[None]]()
        for count in range(int(rate * self.seconds)):
            await asyncio.sleep(max(0.0, began + count / rate - time.monotonic()))
            tasks.append(asyncio.create_task(one(count)))
        await asyncio.gather(*tasks)

    async def live(self, more: Callable[[], Awaitable[set[str]]]) -> dict[str, Any]:
        """Does it all. ``more`` tells of other mails that have to arrive, once everything is on its way."""
        began = time.monotonic()
        kept = await self.open_all()
        took = time.monotonic() - began
        print("ready", flush=True)
        await asyncio.gather(self.at_a_rate(self.submissions, self.write), self.at_a_rate(self.clicks, self.click))
        inside = {message_id for message_id, (to, _) in self.submitted.items() if to != self.abroad}
        awaited = inside | await more()
        deadline = time.monotonic() + ARRIVES_SECONDS
        while not awaited <= self.arrived.keys() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        for task in kept:
            task.cancel()
        await asyncio.gather(*kept, return_exceptions=True)
        for session in self.sessions:
            with contextlib.suppress(OSError):
                session.writer.transport.abort()
        return {
            "opened_in": took,
            "logins": vars(self.logins),
            "mails": vars(self.mails),
            "pages": vars(self.pages),
            "ended": self.ended,
            "arrived": self.arrived,
            "submitted": self.submitted,
            "missing": sorted(awaited - self.arrived.keys()),
        }


class _Submissions(smtplib.SMTP_SSL):
    """Submission by TLS (RFC 8314) at an address that it is told; the certificate has to hold the name."""

    door = ""
    source: tuple[str, int] = ("", 0)

    def _get_socket(self, host: str, port: int, timeout: float) -> ssl.SSLSocket:
        plain = socket.create_connection((self.door, port), timeout, self.source)
        return self.context.wrap_socket(plain, server_hostname=host)


async def _told() -> set[str]:
    """The Message-IDs of the next line of standard input."""
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return set(json.loads(line or "[]"))


def main() -> None:
    """Lives the habits of the request."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    habits = Habits(**json.loads(sys.stdin.readline()))
    print(json.dumps(asyncio.run(habits.live(_told))), flush=True)


if __name__ == "__main__":
    main()
