"""SPF as a receiver evaluates it (RFC 7208): every published word is followed, and every look-up counted."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from check.ask import Answer
from model.base import IPAddress, IPNetwork

LOOKUPS, VOID_LOOKUPS = 10, 2
"""Most look-ups, and most of those without an answer, that a receiver makes (RFC 7208 section 4.6.4)."""
Ask = Callable[[str, str], Awaitable[Answer]]


@dataclass
class Policy:
    """What a domain's SPF comes to: the networks that pass, the look-ups it costs, and what is wrong with it."""

    networks: list[IPNetwork] = field(default_factory=list)
    lookups: int = 0
    void: int = 0
    ends: str = ""
    """The last word for all others, as ``-all``."""
    problems: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)

    def passes(self, source: IPAddress | IPNetwork) -> bool:
        """Whether mail from an address, or from all of a network, passes."""
        network = ipaddress.ip_network(source)
        # Both are of one version, which the type checker cannot see.
        return any(network.version == n.version and network.subnet_of(n) for n in self.networks)  # type: ignore[arg-type]


async def published(domain: str, ask: Ask) -> Policy:
    """The policy of a domain, as it is published now."""
    policy = Policy()
    await _include(domain, ask, policy, top=True)
    if policy.lookups > LOOKUPS:
        policy.problems.append(f"it takes {policy.lookups} look-ups, and receivers stop at {LOOKUPS}")
    if policy.void > VOID_LOOKUPS:
        policy.problems.append(f"{policy.void} of its look-ups find nothing, and receivers stop at {VOID_LOOKUPS + 1}")
    return policy


async def _include(domain: str, ask: Ask, policy: Policy, *, top: bool = False) -> None:
    if policy.lookups > 2 * LOOKUPS:
        return  # A circle, or as good as one.
    answer = await ask(domain, "TXT")
    if answer.error:
        policy.unanswered.append(f"{domain} TXT: {answer.error}")
        return
    records = [r for r in answer.records if r.lower() == "v=spf1" or r.lower().startswith("v=spf1 ")]
    if len(records) != 1:
        policy.problems.append(f"{domain} has {len(records) or 'no'} SPF record{'s' if records else ''}, and needs one")
        return
    for word in records[0].split()[1:]:
        await _word(domain, word, ask, policy, top=top)


async def _word(domain: str, word: str, ask: Ask, policy: Policy, *, top: bool) -> None:
    passes = word[0] not in "-~?"
    name, _, value = word.lstrip("+-~?").partition("=" if word.lower().startswith(("redirect=", "exp=")) else ":")
    kind, _, length = name.lower().partition("/")
    target = value.partition("/")[0] or domain
    if kind in ("ip4", "ip6"):
        try:
            network = ipaddress.ip_network(value, strict=False)
        except ValueError:
            policy.problems.append(f"{domain}: {word} is no network")
            return
        if passes:
            policy.networks.append(network)
    elif kind == "all":
        policy.ends = word if top else policy.ends
    elif kind in ("include", "redirect"):
        policy.lookups += 1
        await _include(target, ask, policy, top=top and kind == "redirect")
    elif kind in ("a", "mx"):
        policy.lookups += 1
        await _addresses(kind, target, value.partition("/")[2] or length, ask, policy, passes=passes)
    elif kind in ("exists", "ptr"):
        policy.lookups += 1
    elif kind != "exp":
        policy.problems.append(f"{domain}: {word} is no word of SPF")


async def _addresses(kind: str, target: str, lengths: str, ask: Ask, policy: Policy, *, passes: bool) -> None:
    names = [target]
    if kind == "mx":
        names = [record.split()[1].rstrip(".") for record in (await ask(target, "MX")).records]
    four, _, six = lengths.partition("//")
    found = [(r, size) for n in names for k, size in (("A", four), ("AAAA", six)) for r in (await ask(n, k)).records]
    policy.void += not found
    if passes:
        policy.networks += [ipaddress.ip_network(f"{r}/{size}" if size else r, strict=False) for r, size in found]
