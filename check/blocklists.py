"""Whether the stack's own addresses and domains stand on the blocklists that it asks itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from check.ask import Answer, View
from check.finding import Finding, Findings, Place
from check.names import greetings
from model.base import IPAddress
from model.settings import DnsblRule
from model.stack import Stack

AREA = "blocklists"
TEST4 = "2.0.0.127"
"""Every list of addresses lists 127.0.0.2, so that one can see that it works (RFC 5782 section 5)."""
ERRORS = "127.255."
"""Replies that mean "you may not ask": nobody is listed by them."""


def matches(reply: str, pattern: str) -> bool:
    """Whether a reply is one that counts, in the notation of Postfix (reject_rbl_client in postconf(5)).

    An octet is a number, or a list in brackets of numbers and ranges: ``127.0.0.[2..11;14]``.
    """
    octets = re.findall(r"\[[^\]]*\]|[0-9]+", pattern)
    parts = reply.split(".")
    return len(octets) == len(parts) == 4 and all(_within(int(p), o) for p, o in zip(parts, octets, strict=True))


def _within(number: int, octet: str) -> bool:
    for choice in octet.strip("[]").split(";"):
        low, _, high = choice.partition("..")
        if int(low) <= number <= int(high or low):
            return True
    return False


def lists(stack: Stack, *kinds: str) -> Mapping[str, Sequence[DnsblRule]]:
    """The lists of some kinds, each with its rules that refuse."""
    rules = [rule for rule in stack.filter.dnsbl if rule.what in kinds and not rule.warn_only]
    return {zone: [rule for rule in rules if rule.zone == zone] for zone in dict.fromkeys(r.zone for r in rules)}


def query(address: IPAddress, zone: str) -> str:
    """The name under which a list has an address (RFC 5782 section 2.1)."""
    return f"{address.reverse_pointer.removesuffix('.in-addr.arpa').removesuffix('.ip6.arpa')}.{zone}"


@dataclass(frozen=True)
class Listing:
    """A list, the rules by which its replies count, and the names to ask it for: ours, and one that it must have."""

    zone: str
    rules: Sequence[DnsblRule]
    names: Mapping[str, str]
    """Address or domain of ours to the name under which the list would have it."""
    test: str | None = None


def listings(stack: Stack) -> Iterator[Listing]:
    """Every list that the stack itself refuses by."""
    for zone, rules in lists(stack, "client").items():
        yield Listing(zone, rules, {str(a): query(a, zone) for a in greetings(stack)}, f"{TEST4}.{zone}")
    for zone, rules in lists(stack, "sender").items():
        yield Listing(zone, rules, {domain: f"{domain}.{zone}" for domain in stack.domains})


def judge(listing: Listing, test: Answer | None, answers: Mapping[str, Answer]) -> Findings:
    """One list: whether it answers at all, and whom of us it has. ``answers`` are by address or domain."""
    place = Place(AREA, listing.zone)
    advice = "ask through a resolver of your own: lists refuse public ones, and whoever asks much"
    errors = sorted({r for a in (*answers.values(), test or Answer()) for r in a.records if r.startswith(ERRORS)})
    failed = sorted({a.error for a in answers.values() if a.error})
    if errors or failed:
        yield place.unknown(f"it does not tell us: {', '.join(errors + failed)}", advice)
    elif test is not None and not test.records:
        yield place.unknown("it does not list 127.0.0.2, as every list does: it does not work from here", advice)
    else:
        listed = {
            who: reply
            for who, answer in answers.items()
            for reply in sorted(answer.records)
            if any(matches(reply, rule.replies) for rule in listing.rules)
        }
        for who, reply in listed.items():
            how = "find out why, stop it, then ask the list to take it off; until then its readers refuse your mail"
            yield place.wrong(f"{who} is listed ({reply})", how)
        if len(answers) > len(listed):
            yield place.good(f"{len(answers) - len(listed)} of ours are not on it")


async def check_list(listing: Listing, view: View) -> Sequence[Finding]:
    """Asks a list for all of ours."""
    asked = asyncio.gather(*(view.ask(name, "A") for name in listing.names.values()))
    test = await view.ask(listing.test, "A") if listing.test else None
    return list(judge(listing, test, dict(zip(listing.names, await asked, strict=True))))
