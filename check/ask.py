"""Asking name servers: many questions at once over one socket a server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.resolver

TRIES = (1.0, 2.0, 3.0)
"""Seconds to wait for an answer, try by try: a packet may be lost, and servers slow down whoever asks much."""
AT_ONCE = 64
"""Questions under way at one server."""
ROOT = "."


@dataclass(frozen=True)
class Server:
    """A name server, by the name that people know it by."""

    name: str
    address: str
    port: int = 53

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.name != self.address else self.address


@dataclass(frozen=True)
class Answer:
    """What a server said of a name and a type. ``records`` are in the form of `canonical`; ``error`` when it said
    nothing that could be used."""

    records: frozenset[str] = frozenset()
    ttl: int = 0
    secure: bool = False
    """Validated, by the word of the resolver (the AD bit, RFC 4035 section 3.2.3)."""
    authoritative: bool = False
    exists: bool = True
    """False for NXDOMAIN."""
    error: str = ""


def canonical(kind: str, record: str | dns.rdata.Rdata) -> str:
    """A record in a form that is equal where DNS takes two for equal: TXT without its division into strings."""
    rdata = dns.rdata.from_text(dns.rdataclass.IN, kind, record) if isinstance(record, str) else record
    if kind in ("TXT", "SPF"):
        return b"".join(getattr(rdata, "strings", ())).decode("latin-1")
    return str(rdata.to_text()).lower()


class _Socket(asyncio.DatagramProtocol):
    """One socket, connected to one server; answers find their question by its id.

    The question in an answer has to be the same too: ids are used again, and an answer may come late, after its try.
    """

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[dns.message.Message, asyncio.Future[bytes]]] = {}

    def datagram_received(self, data: bytes, addr: object) -> None:
        query, future = self.waiting.get(int.from_bytes(data[:2], "big"), (None, None))
        try:
            head = dns.message.from_wire(data, question_only=True)
        except dns.exception.DNSException:
            return
        if query and future and query.is_response(head) and not future.done():
            future.set_result(data)

    def error_received(self, exc: Exception) -> None:
        for _, future in self.waiting.values():
            if not future.done():
                future.set_exception(exc)
        self.waiting.clear()


class Asker:
    """Asks any server, each question once: an answer is remembered for the time of the check."""

    def __init__(self) -> None:
        self._sockets: dict[Server, asyncio.Task[tuple[asyncio.DatagramTransport, _Socket]]] = {}
        self._limits: dict[Server, asyncio.Semaphore] = {}
        self._asked: dict[tuple[Server, str, str, bool], asyncio.Task[Answer]] = {}

    async def ask(self, server: Server, name: str, kind: str, *, recursive: bool = True) -> Answer:
        """An answer, or one with ``error`` set. Never raises for what the network does."""
        key = (server, name.lower(), kind, recursive)
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._ask(server, name, kind, recursive))
        return await asyncio.shield(self._asked[key])

    def close(self) -> None:
        for task in self._sockets.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result()[0].close()

    async def _ask(self, server: Server, name: str, kind: str, recursive: bool) -> Answer:
        query = dns.message.make_query(name, kind, use_edns=0, payload=1232)
        query.flags = dns.flags.Flag(dns.flags.RD | dns.flags.AD) if recursive else dns.flags.Flag(0)
        async with self._limits.setdefault(server, asyncio.Semaphore(AT_ONCE)):
            try:
                reply = await self._exchange(server, query)
                if reply.flags & dns.flags.TC:
                    reply = await dns.asyncquery.tcp(query, server.address, port=server.port, timeout=TRIES[-1])
            except TimeoutError:
                return Answer(error="does not answer")
            except (OSError, dns.exception.DNSException) as error:
                return Answer(error=getattr(error, "strerror", None) or str(error) or type(error).__name__)
        return _read(reply, kind)

    async def _exchange(self, server: Server, query: dns.message.Message) -> dns.message.Message:
        transport, socket = await self._socket(server)
        for seconds in TRIES:
            while query.id in socket.waiting:
                query.id = random.randrange(65536)
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            socket.waiting[query.id] = query, future
            transport.sendto(query.to_wire())
            try:
                return dns.message.from_wire(await asyncio.wait_for(future, seconds), ignore_trailing=True)
            except TimeoutError:
                continue
            finally:
                socket.waiting.pop(query.id, None)
        raise TimeoutError

    async def _socket(self, server: Server) -> tuple[asyncio.DatagramTransport, _Socket]:
        if server not in self._sockets:
            loop = asyncio.get_running_loop()
            opened = loop.create_datagram_endpoint(_Socket, remote_addr=(server.address, server.port))
            self._sockets[server] = asyncio.create_task(opened)
        return await self._sockets[server]


def _read(reply: dns.message.Message, kind: str) -> Answer:
    wanted = dns.rdatatype.from_text(kind)
    code = reply.rcode()
    if code not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return Answer(error=f"answers {dns.rcode.to_text(code)}")
    found = [rrset for rrset in reply.answer if rrset.rdtype == wanted]
    return Answer(
        records=frozenset(canonical(kind, rdata) for rrset in found for rdata in rrset),
        ttl=min((rrset.ttl for rrset in found), default=0),
        secure=bool(reply.flags & dns.flags.AD),
        authoritative=bool(reply.flags & dns.flags.AA),
        exists=code == dns.rcode.NOERROR,
    )


@dataclass(frozen=True)
class View:
    """The resolver through which the check sees the world."""

    asker: Asker
    resolver: Server
    validates: bool

    async def ask(self, name: str, kind: str) -> Answer:
        return await self.asker.ask(self.resolver, name, kind)


def own_resolvers() -> tuple[Server, ...]:
    """The resolvers of this machine (resolv.conf(5))."""
    try:
        return tuple(Server(str(a), str(a)) for a in dns.resolver.Resolver().nameservers)
    except (OSError, dns.exception.DNSException):
        return ()


async def choose(asker: Asker, resolvers: Sequence[Server]) -> View | None:
    """The first resolver that validates, else the first that answers; None when none does."""
    answers = await asyncio.gather(*(asker.ask(resolver, ROOT, "SOA") for resolver in resolvers))
    working = [(resolver, answer) for resolver, answer in zip(resolvers, answers, strict=True) if not answer.error]
    for resolver, answer in working:
        if answer.secure:
            return View(asker, resolver, True)
    return View(asker, working[0][0], False) if working else None
