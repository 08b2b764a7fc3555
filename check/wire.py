"""Talks to ports as their clients do, and writes down what is said. Concludes nothing.

With Python's standard library alone: this file runs on the operator's machine, and is sent to the hosts to talk to
the ports that only they can reach. A target and what came of it are plain values, as JSON has them.

A target has ``address``, ``port``, ``protocol`` (smtp, imap, sieve, http, tls or tcp), ``tls`` (starttls, implicit or
none), ``name`` (which the certificate has to hold), ``believes`` (whose authorities: stack, world), and may have
``proxy`` (the port wants the PROXY protocol), ``versions`` (try TLS versions one by one), ``recipients`` (pairs of
sender and recipient), ``path`` (http) and ``identity`` (files with a certificate and its key, to show).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import functools
import ssl
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

CONNECT_SECONDS, PATIENT_SECONDS = 5.0, 20.0
"""How long a port has to answer at first, and when it is asked again in more quiet."""
TALK_SECONDS = 120.0
AT_ONCE = 12
"""Sessions side by side: one machine that speaks TLS with many at once keeps all of them waiting."""
GREETING = "check.invalid"
"""What the check calls itself: a name that nobody has (RFC 6761 section 6.4)."""
BODY = 65536

Target = dict[str, Any]
Talk = dict[str, Any]
Authorities = Mapping[str, str]
"""Whose authorities (``stack`` or ``world``) to their certificates in PEM; this machine's own are the world's too."""


class Stopped(Exception):
    """The other side did not go on as its protocol says: what it said instead."""


class Line:
    """A connection, line by line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read(self) -> str:
        data = await self.reader.readline()
        if not data:
            raise Stopped("closes the connection")
        return data.decode(errors="replace").rstrip("\r\n")

    async def say(self, line: str) -> None:
        self.writer.write(f"{line}\r\n".encode())
        await self.writer.drain()

    async def reply(self) -> tuple[int, list[str]]:
        """A reply of SMTP, which may have several lines (RFC 5321 section 4.2)."""
        lines = []
        while True:
            line = await self.read()
            lines.append(line[4:])
            if line[3:4] != "-":
                return (int(line[:3]) if line[:3].isdigit() else 0), lines

    async def ask(self, line: str) -> tuple[int, list[str]]:
        await self.say(line)
        return await self.reply()

    async def capabilities(self) -> dict[str, str]:
        """The capabilities of ManageSieve, up to its OK (RFC 5804 section 1.7)."""
        found = {}
        while not (line := await self.read()).startswith(("OK", "NO", "BYE")):
            key, _, value = line.partition(" ")
            found[key.strip('"').upper()] = value.strip('"')
        if not line.startswith("OK"):
            raise Stopped(f"says {line}")
        return found


@functools.cache
def context(authorities: str, *, world: bool, verify: bool = True, identity: tuple[str, ...] = ()) -> ssl.SSLContext:
    """A client that believes some authorities (PEM), and with ``world`` those of this machine. Reading them takes its
    time: once."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if identity:
        made.load_cert_chain(*identity)
    if verify:
        if world:
            made.load_default_certs()
        if authorities:
            made.load_verify_locations(cadata=authorities)
    else:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    return made


@functools.cache
def limited(low: ssl.TLSVersion, high: ssl.TLSVersion) -> ssl.SSLContext:
    """A client that speaks some versions of TLS alone, however old their ciphers are."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        # That they are old is why they are tried.
        warnings.simplefilter("ignore", DeprecationWarning)
        made.minimum_version, made.maximum_version = low, high
    return made


async def _connect(target: Target) -> Line:
    opened = asyncio.open_connection(target["address"], target["port"])
    line = Line(*await asyncio.wait_for(opened, target.get("patience", CONNECT_SECONDS)))
    if target.get("proxy"):
        own = line.writer.get_extra_info("sockname")
        family = "TCP6" if ":" in own[0] else "TCP4"
        await line.say(f"PROXY {family} {own[0]} {target['address']} {own[1]} {target['port']}")
    return line


async def _secure(line: Line, target: Target, client: ssl.SSLContext) -> None:
    # A name that is not one of a certificate (an address) is not asked for by name.
    await line.writer.start_tls(client, server_hostname=target["name"], ssl_handshake_timeout=TALK_SECONDS)


async def _open(target: Target, client: ssl.SSLContext, talk: Talk) -> Line:
    """Connects, and comes as far as TLS: what is said before it, and what TLS came to, is written into ``talk``."""
    line = await _connect(target)
    try:
        if target["tls"] == "implicit":
            await _secure(line, target, client)
        if target["protocol"] == "smtp":
            await _open_smtp(line, target, client, talk)
        elif target["protocol"] == "imap":
            talk["banner"] = await line.read()
        elif target["protocol"] == "sieve":
            talk["before"] = await line.capabilities()
            await line.say("STARTTLS")
            await line.capabilities()
            await _secure(line, target, client)
            talk["after"] = await line.capabilities()
        secured = line.writer.get_extra_info("ssl_object")
        if secured is not None:
            talk["version"] = secured.version()
            talk["certificate"] = base64.b64encode(secured.getpeercert(True) or b"").decode()
    except BaseException:
        line.writer.transport.abort()
        raise
    return line


async def _open_smtp(line: Line, target: Target, client: ssl.SSLContext, talk: Talk) -> None:
    code, text = await line.reply()
    talk["banner"], talk["code"] = " ".join(text), code
    if code != 220:
        raise Stopped(f"greets with {code} {' '.join(text)}")
    _, words = await line.ask(f"EHLO {GREETING}")
    if target["tls"] != "starttls":
        talk["after"] = words[1:]
        return
    talk["before"] = words[1:]
    code, text = await line.ask("STARTTLS")
    if code != 220:
        raise Stopped(f"answers STARTTLS with {code} {' '.join(text)}")
    await _secure(line, target, client)
    _, words = await line.ask(f"EHLO {GREETING}")
    talk["after"] = words[1:]


async def _go_on(line: Line, target: Target, talk: Talk) -> None:
    """What there is to ask once the connection stands."""
    if target["protocol"] == "smtp":
        replies = talk.setdefault("replies", [])
        for sender, recipient in target.get("recipients", ())[len(replies) :]:
            code, text = await line.ask(f"MAIL FROM:<{sender}>")
            if code == 250:
                code, text = await line.ask(f"RCPT TO:<{recipient}>")
            replies.append([sender, recipient, code, " ".join(text)])
            # Under stress Postfix ends a session at its first refusal (smtpd_hard_error_limit).
            if await _is_over(line):
                return
    elif target["protocol"] == "http":
        await line.say(f"GET {target.get('path', '/')} HTTP/1.1\r\nHost: {target['name']}\r\nConnection: close\r\n")
        first, *rest = (await line.reader.readuntil(b"\r\n\r\n")).decode(errors="replace").split("\r\n")
        talk["status"] = int(first.split()[1]) if first.startswith("HTTP/") else 0
        talk["headers"] = {k.strip().lower(): v.strip() for k, _, v in (header.partition(":") for header in rest)}
        # Some keep the connection open, whatever they are asked (RFC 9112 section 9.6): then the length is told.
        length = int(talk["headers"].get("content-length", BODY))
        body = b""
        while len(body) < min(length, BODY) and (more := await line.reader.read(BODY)):
            body += more
        talk["body"] = body.decode(errors="replace")


async def _is_over(line: Line) -> bool:
    """Whether an SMTP server ends the session: it says so with 421, or says nothing more."""
    try:
        code, _ = await line.ask("RSET")
    except (OSError, Stopped):
        return True
    return code == 421


async def _leave(line: Line, target: Target) -> None:
    """Goes as its protocol says, so that no daemon notes a lost connection."""
    word = {"smtp": "QUIT", "imap": "x LOGOUT", "sieve": "LOGOUT"}.get(target["protocol"])
    with contextlib.suppress(OSError, Stopped, TimeoutError, ssl.SSLError):
        if word:
            await line.say(word)
            await asyncio.wait_for(line.reader.read(BODY), 1)
        line.writer.close()


def words(error: BaseException) -> str:
    """What went wrong, for a person."""
    if isinstance(error, TimeoutError):
        return "does not answer"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection"
    if isinstance(error, ConnectionResetError | BrokenPipeError | asyncio.IncompleteReadError):
        return "closes the connection"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


UNREACHABLE = (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)
"""What a router, or this machine, says in place of a host that says nothing, when one waits for long enough."""
FAILURES = (OSError, Stopped, TimeoutError, ValueError, asyncio.IncompleteReadError)


async def _session(target: Target, authorities: Authorities) -> Talk:
    talk: Talk = {"connected": False, "error": "", "verified": False, "unverified": ""}
    identity, believes = tuple(target.get("identity", ())), target.get("believes", ())
    recipients = target.get("recipients", ())
    text, world = "".join(authorities[whose] for whose in believes), "world" in believes
    client = context(text, world=world, verify=target["tls"] != "none", identity=identity)
    try:
        try:
            line = await _open(target, client, talk)
            talk["verified"] = target["tls"] != "none"
        except ssl.SSLCertVerificationError as error:
            # Once more with closed eyes, to see what is there.
            talk["unverified"] = error.verify_message.lower() or str(error)
            client = context("", world=False, verify=False, identity=identity)
            line = await _open(target, client, talk)
        talk["connected"] = True
        await _go_on(line, target, talk)
        await _leave(line, target)
        # Each session has one reply more.
        while target["protocol"] == "smtp" and len(talk["replies"]) < len(recipients):
            line = await _open(target, client, talk)
            await _go_on(line, target, talk)
            await _leave(line, target)
    except FAILURES as error:
        talk["error"] = words(error)
        talk["refused"] = isinstance(error, ConnectionRefusedError)
        talk["silent"] = isinstance(error, TimeoutError) or getattr(error, "errno", None) in UNREACHABLE
    return talk


async def _version(target: Target, low: ssl.TLSVersion, high: ssl.TLSVersion) -> str | None:
    """What a server makes of some versions of TLS: the one it takes, or an empty text. None when it says nothing."""
    talk: Talk = {}
    try:
        client = limited(low, high)
        line = await asyncio.wait_for(_open(target, client, talk), TALK_SECONDS)
    except TimeoutError:
        return None
    except (*FAILURES, ssl.SSLError):
        return ""
    await _leave(line, target)
    return str(talk.get("version", ""))


async def talk_to(target: Target, authorities: Authorities) -> Talk:
    """One target: a session, and the versions of TLS where they are asked for. Never raises for what others do."""
    try:
        talk = await asyncio.wait_for(_session(target, authorities), TALK_SECONDS)
    except TimeoutError:
        return {"connected": False, "error": "does not go on", "silent": True, "verified": False, "unverified": ""}
    if target.get("versions") and talk["connected"]:
        # It has answered: now it has time.
        target = {**target, "patience": PATIENT_SECONDS}
        old, present = await asyncio.gather(
            _version(target, ssl.TLSVersion(0x0301), ssl.TLSVersion(0x0302)),
            _version(target, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2),
        )
        talk["old"], talk["1.2"] = old, present
    return talk


async def talk_to_all(targets: Sequence[Target], authorities: Authorities, at_once: int = AT_ONCE) -> list[Talk]:
    """All targets, some of them at once. Who said nothing is asked once more at the end, for each address one by one.

    An address that is silent the second time too is not asked for its other ports: it is gone.
    """
    room = asyncio.Semaphore(at_once)

    async def one(target: Target) -> Talk:
        async with room:
            return await talk_to(target, authorities)

    talks = list(await asyncio.gather(*(one(target) for target in targets)))
    silent: dict[str, list[int]] = {}
    for number, (target, talk) in enumerate(zip(targets, talks, strict=True)):
        if talk.get("silent"):
            silent.setdefault(target["address"], []).append(number)

    async def again(numbers: list[int]) -> None:
        for number in numbers:
            talks[number] = await talk_to({**targets[number], "patience": PATIENT_SECONDS}, authorities)
            if talks[number].get("silent"):
                return

    await asyncio.gather(*(again(numbers) for numbers in silent.values()))
    return talks
