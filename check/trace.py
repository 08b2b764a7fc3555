"""What became of a mail: the lines of all hosts' journals that belong to it, in one story."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from check import lines
from check.finding import DAY, HOUR
from check.lines import Piece
from check.ssh import Seen, look
from model.base import to_ascii
from model.stack import Host, Stack

SOURCE = (Path(__file__).parent / "lines.py").read_text()
SINCE = "2d"
UNITS = {"m": 60.0, "h": HOUR, "d": DAY, "w": 7 * DAY}
NEAR_SECONDS = 120.0
"""Short queue IDs come again: one that another host names is that of a mail that began there at about that time."""
ROUNDS = 8
"""Hosts are asked again with what the others said, until nothing new is said: a mail passes four of them."""

NOISE = re.compile(r": removed$|: replace: header |^\w+: filter: body |^connect from |TLS connection established")
REFUSED = re.compile(
    r"(?:NOQUEUE|[0-9A-Za-z]+): (?:milter-)?reject: \S+ from (?P<client>\S+): (?P<code>[245])(?P<words>.*?);"
    r" from=<(?P<from>[^>]*)>(?: to=<(?P<to>[^>]*)>)?",
    re.DOTALL,
)
TRIED = re.compile(
    r"to=<(?P<to>[^>]*)>,(?: orig_to=<(?P<orig>[^>]*)>,)? relay=(?P<relay>[^,]+),"
    r".* status=(?P<status>\S+) \((?P<words>.*)\)$",
    re.DOTALL,
)
HANDED = re.compile(
    r'mta delivery .*to=<(?P<to>[^>]*)> .*relay="(?P<relay>[^"]*)".* result="(?P<result>\w+)" stat="(?P<words>.*)"$'
)
FILED = re.compile(
    r"lmtp\((?P<user>[^)]*)\).*\bmsgid=.*(?:stored mail into mailbox|saved mail to) '?(?P<box>[^']*)'?$", re.DOTALL
)
FILTERED = re.compile(r"lmtp\((?P<user>[^)]*)\).*msgid=[^:]*: (?P<words>.*)$", re.DOTALL)
VERDICT = re.compile(r"\(default: \w \((?P<action>[^)]*)\): \[(?P<score>[^\]]*)\] \[(?P<symbols>.*?)\]\)", re.DOTALL)
SYMBOL = re.compile(r"(\w+)\((-?[\d.]+)\)")
ENVELOPE_FROM = re.compile(r"\bfrom=<([^>]*)>")


class TraceError(Exception):
    """What was asked for cannot be: the message says why."""


def wanted(what: str) -> set[str]:
    """What to look for: an address, a Message-ID (in brackets or not) or a queue ID. Raises `TraceError`."""
    what = what.strip()
    if not what.isascii() and "@" in what:
        before, _, domain = what.rpartition("@")
        with contextlib.suppress(ValueError):
            # As it travels: in the form of DNS.
            what = f"{before}@{to_ascii(domain.rstrip('>'))}{'>' * what.endswith('>')}"
    if not re.fullmatch(r"[!-~]{1,512}", what):
        raise TraceError("WHAT: say an address, a Message-ID or a queue ID, as it stands in a header or a journal")
    if "@" in what:
        bare = what.strip("<>").lower()
        return {bare, f"<{bare}>"} if not what.startswith("<") else {f"<{bare}>"}
    if not re.fullmatch(r"[0-9A-Za-z]{6,20}", what):
        raise TraceError(f"WHAT={what}: is no address, no Message-ID and no queue ID")
    return {what}


def seconds(since: str) -> float:
    """How long ago to begin, of ``90m``, ``3h``, ``2d`` or ``1w``. Raises `TraceError`."""
    if not re.fullmatch(r"[0-9]{1,4}[mhdw]", since):
        raise TraceError(f"SINCE={since}: say how long ago, as 90m, 3h, 2d or 1w")
    return int(since[:-1]) * UNITS[since[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Stories


@dataclass(frozen=True, order=True)
class Step:
    """A line of a host's journal."""

    time: float
    host: str
    who: str
    text: str


@dataclass
class Story:
    """All that is known of one mail."""

    pieces: list[tuple[str, Piece]] = field(default_factory=list)
    """With their hosts."""

    @property
    def steps(self) -> list[Step]:
        """What happened, in order, without what says nothing."""
        found = {Step(at, host, who, text) for host, piece in self.pieces for at, who, text in piece}
        return sorted(step for step in found if not NOISE.search(step.text))

    def title(self) -> str:
        texts = [step.text for step in self.steps]
        ids = sorted({name for text in texts for name in lines.message_ids(text)})
        senders = [found.group(1) or "<>" for text in texts if (found := ENVELOPE_FROM.search(text))]
        return f"{', '.join(ids) or 'no Message-ID is known'}{f', from {senders[0]}' if senders else ''}"


def _near(piece: Piece, other: Piece) -> bool:
    """Whether a piece names the queue ID of another that began at that time."""
    name, began = lines.own_id(other[0][2]), other[0][0]
    return any(name in lines.later(text) and abs(at - began) < NEAR_SECONDS for at, _, text in piece)


def _bonds(piece: Piece) -> set[str]:
    """By what pieces are of one mail, for sure. Refusals at RCPT are, when sender, recipient and words are the same."""
    found = set()
    for _, _, text in piece:
        found |= lines.message_ids(text) | lines.sessions(text)
        if text.startswith("NOQUEUE: ") and (refused := REFUSED.search(text)):
            found.add(f"{refused['from']} {refused['to']} {refused['code']}{refused['words']}")
    return found


def stories(found: Mapping[str, Sequence[Piece]], what: set[str]) -> list[Story]:
    """Pieces of all hosts, put together by mail; those that have nothing to do with ``what`` are left out."""
    pieces = [(host, piece) for host, of_host in found.items() for piece in of_host]
    leads = list(range(len(pieces)))

    def leader(number: int) -> int:
        while leads[number] != number:
            number = leads[number]
        return number

    holders: dict[str, int] = {}
    by_id: dict[str, list[int]] = {}
    for number, (_, piece) in enumerate(pieces):
        for bond in _bonds(piece):
            leads[leader(number)] = leader(holders.setdefault(bond, number))
        by_id.setdefault(lines.own_id(piece[0][2]), []).append(number)
    for number, (_, piece) in enumerate(pieces):
        # A bounce is a mail of its own, which its Message-ID tells: it is shown with the mail that it is about.
        for name in set().union(*(lines.later(text) for _, _, text in piece)):
            for other in by_id.get(name, ()):
                if _near(piece, pieces[other][1]):
                    leads[leader(number)] = leader(other)
    together: dict[int, Story] = {}
    for number, place in enumerate(pieces):
        together.setdefault(leader(number), Story()).pieces.append(place)
    asked = (story for story in together.values() if any(lines.names(piece) & what for _, piece in story.pieces))
    return sorted(asked, key=lambda story: min(piece[0][0] for _, piece in story.pieces))


# ---------------------------------------------------------------------------------------------------------------------
# What became of it


def inside(stack: Stack) -> tuple[str, ...]:
    """How a relay is called that is a host of the stack: its end is another host's to tell."""
    addresses = [f"[{address}]" for host in stack.all_hosts.values() for address in host.addresses.local]
    return (f".{stack.service.network_domain}[", "[127.0.0.1]", "[private/", *addresses)


def ends(story: Story, within: Sequence[str]) -> list[str]:
    """What became of the mail, a sentence for each recipient and each end."""
    said: dict[str, None] = {}
    put_off: dict[str, None] = {}
    for host, piece in story.pieces:
        waits: dict[str, str] = {}
        done = bool(lines.ENDS.search(piece[-1][2]))
        for _, _, text in piece:
            if filed := FILED.search(text):
                said[f"delivered to mailbox {filed['box']} of {filed['user']} at {host}"] = None
            elif filtered := FILTERED.search(text):
                said[f"the filter of {filtered['user']} at {host}: {filtered['words']}"] = None
            elif refused := REFUSED.search(text):
                words = f"{refused['code']}{refused['words']}"
                to = f" for {refused['to']}" if refused["to"] else ""
                if refused["code"] == "4":
                    put_off[f"put off by {host}{to}, the sender is to come again: {words}"] = None
                else:
                    said[f"refused by {host}{to}: {words}"] = None
            elif tried := TRIED.search(text):
                to = tried["orig"] or tried["to"]
                waits.pop(to, None)
                match tried["status"]:
                    case "deferred" | "SOFTBOUNCE":
                        waits[to] = f"waits in the queue of {host} for {to}: {tried['words']}"
                    case "sent" if tried["relay"] == "none":
                        said[f"thrown away for {to}, as the stack says"] = None
                    case "sent" if not any(name in tried["relay"] for name in within):
                        said[f"handed over for {to} to {tried['relay']}: {tried['words']}"] = None
                    case "bounced" | "expired" | "undeliverable":
                        said[f"not delivered to {to}, by {host}: {tried['words']}"] = None
            elif handed := HANDED.search(text):
                waits.pop(handed["to"], None)
                if handed["result"] == "TempFail":
                    waits[handed["to"]] = f"waits in the queue of {host} for {handed['to']}: {handed['words']}"
                elif handed["result"] == "PermFail":
                    said[f"not delivered to {handed['to']}, by {host}: {handed['words']}"] = None
        if waits and done:
            said[f"not in the queue of {host} any more: given up, or deleted there"] = None
        elif waits:
            said |= dict.fromkeys(waits.values())
    return [*(said or put_off)] or ["nothing is told yet of its end: ask again, or with a longer SINCE"]


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _clean(text: str) -> str:
    """Without what would speak to the terminal: strangers write into journals, too."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _words(text: str) -> str:
    """A line as it is shown: as it was logged, a scanner's by what counts."""
    if verdict := VERDICT.search(text):
        symbols = [(name, float(score)) for name, score in SYMBOL.findall(verdict["symbols"]) if float(score)]
        told = ", ".join(f"{name} {score:+g}" for name, score in sorted(symbols, key=lambda one: -abs(one[1])))
        return f"{verdict['action']}, {verdict['score']}{f': {told}' if told else ''}"
    return _clean(text)


def told(story: Story, within: Sequence[str]) -> Iterator[str]:
    """A story, line by line."""
    yield _clean(story.title())
    steps = story.steps
    width = max((len(step.host) for step in steps), default=0)
    for step in steps:
        at = dt.datetime.fromtimestamp(step.time).astimezone().strftime("%m-%d %H:%M:%S")
        yield f"  {at}  {step.host:{width}}  {step.who}: {_words(step.text)}"
    for end in ends(story, within):
        yield f"  → {_clean(end)}"


# ---------------------------------------------------------------------------------------------------------------------
# Asking


async def _ask(stack: Stack, hosts: Iterable[Host], what: set[str], since: float) -> dict[str, Seen]:
    task: dict[str, Any] = {"look": SOURCE, "wanted": sorted(what), "since": since}
    asked = list(hosts)
    seen = await asyncio.gather(*(look(stack, host, task, time.time) for host in asked))
    return {host.name: one for host, one in zip(asked, seen, strict=True)}


async def _gather(stack: Stack, hosts: Sequence[Host], what: set[str], since: float) -> dict[str, Seen]:
    """What all hosts have of some mails, and of those that these lead to on other hosts."""
    seen: dict[str, Seen] = {}
    for _ in range(ROUNDS):
        answering = [host for host in hosts if host.name not in seen or seen[host.name].report is not None]
        seen |= await _ask(stack, answering, what, since)
        pieces = [piece for one in seen.values() if one.report for piece in one.report["pieces"]]
        asked, what = what, what.union(*(lines.links(piece) for piece in pieces))
        if what == asked:
            break
    return seen


def trace(stack: Stack, what: str, since: str, without: Sequence[str] = ()) -> tuple[list[Story], dict[str, str]]:
    """The stories of all mails that something names, and what the hosts said that could not be asked.

    Raises `TraceError` for what cannot be looked for.
    """
    names, began = wanted(what), time.time() - seconds(since)
    hosts = [host for host in stack.all_hosts.values() if host.site not in without]
    seen = asyncio.run(_gather(stack, hosts, names, began))
    found = {name: one.report["pieces"] for name, one in seen.items() if one.report is not None}
    return stories(found, names), {name: one.error for name, one in seen.items() if one.report is None}
