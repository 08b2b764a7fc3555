"""The records of the stack: what its own servers say, and what the world sees through a resolver."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from check import causes
from check.ask import Answer, Asker, Server, View, canonical
from check.finding import Finding, Findings, Place
from model.stack import Stack
from services.zones import RRset, rrsets

AREA = "records"
RECOMMENDED_TYPES = ("SRV", "CAA")
RECOMMENDED_NAMES = ("_mta-sts.", "mta-sts.", "_smtp._tls.", "autoconfig.", "autodiscover.", "*._domainkey.")
OTHER_FAMILY = {"A": "AAAA", "AAAA": "A"}


@dataclass(frozen=True)
class Zone:
    """A zone as it was found: who serves it, and what each of them says of its start of authority."""

    name: str
    servers: tuple[Server, ...] = ()
    starts: Mapping[Server, Answer] = field(default_factory=dict)
    delegated: bool = True
    seen: Answer = field(default_factory=Answer)
    """Its SOA through the resolver."""

    @property
    def serving(self) -> tuple[Server, ...]:
        """The servers that answer for it."""
        return tuple(s for s in self.servers if (a := self.starts[s]).authoritative and a.records and not a.error)


def needed(rrset: RRset) -> bool:
    """Whether mail fails without an RRset; the others are recommended."""
    return rrset.type not in RECOMMENDED_TYPES and not rrset.name.startswith(RECOMMENDED_NAMES)


def wanted(rrset: RRset) -> frozenset[str]:
    """The records that an RRset should have, in canonical form."""
    return frozenset(canonical(rrset.type, record) for record in rrset.records)


def shown(records: Iterable[str]) -> str:
    """Records for a person to read, not too many and not too long."""
    listed = [record if len(record) <= 90 else f"{record[:40]} … {record[-20:]}" for record in sorted(records)]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


# What is concluded


def judge_zone(stack: Stack, zone: Zone, view: View | None) -> Findings:
    """Whether a zone is served, by all of its servers alike, and signed."""
    place = Place(AREA, zone.name)
    if not zone.servers:
        yield place.wrong(
            "nobody serves this zone: no name server is published for it",
            f"have the zone above delegate {zone.name}, or name its server under dns.zones",
        )
        return
    for server in zone.servers:
        start = zone.starts[server]
        if start.error:
            yield place.unknown(
                f"{server} {start.error}", f"see whether it runs, and whether port {server.port} is open from here"
            )
        elif not (start.authoritative and start.records):
            yield place.wrong(
                f"{server} is named as a server of this zone, and does not serve it",
                "have it serve the zone, or take it out of the NS records here and in the zone above",
            )
    serials = {next(iter(zone.starts[server].records)).split()[2] for server in zone.serving}
    if len(serials) > 1:
        listed = ", ".join(f"{s.name} {next(iter(zone.starts[s].records)).split()[2]}" for s in zone.serving)
        yield place.better(f"its servers have different serial numbers: {listed}", "see whether transfers arrive")
    if view is None:
        return
    if not zone.delegated:
        yield place.note("no server is published for it: it is seen only by those who ask its own server")
    elif zone.seen.error:
        yield place.wrong(
            f"the resolver {view.resolver} {zone.seen.error} for it",
            "if its servers answer, its signatures are bad or its DS record is old: look with delv or dnsviz",
        )
    elif not view.validates:
        yield place.unknown(
            f"whether it is signed: the resolver {view.resolver} does not validate",
            "use a validating resolver on this machine",
        )
    elif zone.seen.secure:
        yield place.good("signed, and validated from the root on")
    else:
        yield place.better(
            "not signed: others cannot rely on its records, and TLSA records in it do nothing (RFC 7672)",
            "sign it with DNSSEC, and have the zone above publish its DS record",
        )


def judge(stack: Stack, rrset: RRset, at: Mapping[Server, Answer], seen: Answer | None) -> Findings:
    """One RRset: as its servers have it, and as a resolver sees it (None where that was not asked)."""
    place, label, right = Place(AREA, rrset.zone), f"{rrset.name} {rrset.type}", wanted(rrset)
    published = stack.dns.zones.get(rrset.zone) is not None
    mend = f"make refresh STACK={stack.name}, then make up STACK={stack.name}"
    lines = "; ".join(f"{rrset.name}. {rrset.ttl} IN {rrset.type} {record}" for record in rrset.records)
    mend = mend if published else f"put it into the zone: {lines}"
    bad = place.wrong if needed(rrset) else place.better
    findings: list[Finding] = []
    for answer, servers in _alike(at).items():
        listed = ", ".join(str(server) for server in servers)
        if answer.error:
            findings.append(place.unknown(f"{label}: {listed} {answer.error}", "ask again later"))
        elif not answer.records:
            missing = bad(f"{label} is missing at {listed}", mend)
            findings.append(replace(missing, explains=(causes.record(rrset.name, rrset.type),)))
        elif answer.records != right:
            findings.append(bad(f"{label} is {shown(answer.records)} at {listed}, and not {shown(right)}", mend))
        elif answer.ttl != rrset.ttl:
            findings.append(place.better(f"{label} lives {answer.ttl} s at {listed}, and not {rrset.ttl} s", mend))
    if not findings and at and seen is not None:
        if seen.error:
            findings.append(place.unknown(f"{label}: the resolver {seen.error}", "ask again later"))
        elif seen.records != right:
            old = f"{label} is new: resolvers still have {shown(seen.records) or 'nothing'}"
            findings.append(place.note(f"{old}, for {seen.ttl or stack.dns.ttl.service} s at most"))
    yield from findings or [place.good(label)]


def _alike(at: Mapping[Server, Answer]) -> Mapping[Answer, list[Server]]:
    """Servers by what they say, so that ten that say the same are one line."""
    found: dict[Answer, list[Server]] = {}
    for server, answer in at.items():
        found.setdefault(answer, []).append(server)
    return found


def judge_left_over(stack: Stack, zone: str, name: str, kind: str, answer: Answer) -> Findings:
    """A record that the stack does not have, at a name that is the stack's."""
    if not answer.records:
        return
    place, what = (
        Place(AREA, zone),
        f"{name} {kind} {shown(answer.records)} is published, and the stack does not have it",
    )
    if kind == "TXT":
        yield place.better(f"{what}: an old DKIM key", "remove it when no mail signed by it is under way any more")
    else:
        yield place.wrong(f"{what}: senders and clients try that address", "remove it at the zone's server")


# What is asked


def left_over_questions(stack: Stack, mine: Iterable[RRset]) -> tuple[tuple[str, str, str], ...]:
    """Zone, name and type of what might be left of earlier times: an address of the other family, an old DKIM key."""
    known = {(rrset.name, rrset.type): rrset for rrset in mine}
    questions = [
        (rrset.zone, rrset.name, other)
        for (name, kind), rrset in known.items()
        if (other := OTHER_FAMILY.get(kind)) and (name, other) not in known
    ]
    for domain, selectors in stack.keys.public.dkim.items():
        published = next((r.zone for r in known.values() if r.name == domain), None)
        if published is None:
            continue
        names = (f"{selector}._domainkey.{domain}" for selector in selectors)
        questions += [(published, name, "TXT") for name in names if (name, "TXT") not in known]
    return tuple(questions)


async def find_zone(stack: Stack, name: str, asker: Asker, view: View | None) -> Zone:
    """Who serves a zone: the server that the stack updates, and all that are published for it."""
    servers: list[Server] = []
    if own := stack.dns.zones.get(name):
        settings = stack.dns.servers[own]
        servers.append(Server(own, str(settings.address), settings.port))
    listed = (await view.ask(name, "NS")) if view else Answer()
    if view:
        asked = [(ns, kind) for ns in sorted(listed.records) for kind in ("A", "AAAA")]
        answers = await asyncio.gather(*(view.ask(ns.rstrip("."), kind) for ns, kind in asked))
        for (ns, _), answer in zip(asked, answers, strict=True):
            servers += [Server(ns.rstrip("."), address) for address in sorted(answer.records)]
    # The server that takes the updates is often one of those that are published.
    unique = {(server.address, server.port): server for server in reversed(servers)}
    chosen = tuple(reversed(unique.values()))
    starts = await asyncio.gather(*(asker.ask(server, name, "SOA", recursive=False) for server in chosen))
    seen = (await view.ask(name, "SOA")) if view else Answer()
    return Zone(name, chosen, dict(zip(chosen, starts, strict=True)), bool(listed.records), seen)


async def check_zone(stack: Stack, name: str, asker: Asker, view: View | None) -> Sequence[Finding]:
    """All records of one zone."""
    zone = await find_zone(stack, name, asker, view)
    findings = list(judge_zone(stack, zone, view))
    serving = zone.serving

    async def one(rrset: RRset) -> list[Finding]:
        asked = (asker.ask(server, rrset.name, rrset.type, recursive=False) for server in serving)
        seeing = [view.ask(rrset.name, rrset.type)] if view and zone.delegated and not zone.seen.error else []
        answers = await asyncio.gather(*asked, *seeing)
        at = dict(zip(serving, answers[: len(serving)], strict=True))
        return list(judge(stack, rrset, at, answers[-1] if seeing else None))

    async def left_over(name: str, kind: str) -> list[Finding]:
        return list(
            judge_left_over(stack, zone.name, name, kind, await asker.ask(serving[0], name, kind, recursive=False))
        )

    if not serving:
        return findings
    mine = [rrset for rrset in rrsets(stack) if rrset.zone == name]
    old = [(owner, kind) for _, owner, kind in left_over_questions(stack, mine)]
    for found in await asyncio.gather(*(one(rrset) for rrset in mine), *(left_over(*o) for o in old)):
        findings += found
    return findings
