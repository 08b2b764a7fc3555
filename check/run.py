"""Asks everything at once, and gathers what it comes to."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from agent import SOURCE as AGENT
from check import blocklists, causes, certificates, hosts, mailboxes, names, ports, records, wire
from check.ask import Asker, Server, View, choose, own_resolvers
from check.finding import Finding, Place
from check.ports import Endpoint
from check.ssh import Seen, look
from check.wire import Talk, Target
from model.network import Role
from model.stack import Host, Stack
from services import learning, replication
from services.bundle import bundle

FOLDER = Path(__file__).parent
LOOK, WIRE = (FOLDER / "look.py").read_text(), (FOLDER / "wire.py").read_text()
NETWORK = "network"
PUBLIC_AT_ONCE = 64
"""Sessions with public ports side by side: they are spread over all hosts."""


@dataclass
class Progress:
    """How far the check is: told to whoever waits for it."""

    asked: int = 0
    answered: int = 0
    waiting: set[str] = field(default_factory=set)
    tell: Callable[[Progress], None] = lambda progress: None

    async def of(self, name: str, work: Awaitable[Sequence[Finding]]) -> Sequence[Finding]:
        """Counts a piece of work, and names it as long as it is not done."""
        self.asked += 1
        self.waiting.add(name)
        self.tell(self)
        try:
            return await work
        finally:
            self.answered += 1
            self.waiting.discard(name)
            self.tell(self)


def reaches(version: int, addresses: Iterable[str]) -> bool:
    """Whether this machine has a way to any of some addresses of an IP version. Sends nothing."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    for address in addresses:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 53))
            except OSError:
                continue
            return True
    return False


@dataclass
class Check:
    """One check of a stack, from this machine."""

    stack: Stack
    without: Sequence[str] = ()
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def opened(self) -> ports.Listens:
        return ports.listens_of(self.stack)

    async def run(self) -> list[Finding]:
        """All findings, in no order. Never raises for what others do."""
        asker = Asker()
        try:
            found = await asyncio.gather(self._names(asker), self._ports(), self._hosts())
        finally:
            asker.close()
        findings = [*(finding for part in found for finding in part), *certificates.judge_rolls(self.stack)]
        for site in self.without:
            findings.append(Place(NETWORK, site).note("its hosts were left out"))
        return findings

    @property
    def _hosts_here(self) -> list[Host]:
        return [host for host in self.stack.all_hosts.values() if host.site not in self.without]

    # Names

    async def _names(self, asker: Asker) -> list[Finding]:
        stack = self.stack
        resolvers = [Server(host.name, str(host.addresses.local[0])) for host in stack.hosts_with(Role.RESOLVER)]
        view = await choose(asker, own_resolvers()) or await choose(asker, resolvers)
        if view is not None and not view.validates:
            view = await self._validating(asker, resolvers) or view
        work = [self.progress.of(zone, records.check_zone(stack, zone, asker, view)) for zone in stack.dns.zones]
        findings: list[Finding] = []
        if view is None:
            advice = "have a resolver in /etc/resolv.conf of this machine that answers"
            findings.append(Place(NETWORK, "resolver").unknown("no resolver answers: only servers were asked", advice))
        else:
            work += self._questions(view)
        for found in await asyncio.gather(*work):
            findings += found
        return findings

    async def _validating(self, asker: Asker, resolvers: Sequence[Server]) -> View | None:
        """The stack's own resolvers validate: they are asked where this machine's does not."""
        view = await choose(asker, resolvers)
        return view if view and view.validates else None

    def _questions(self, view: View) -> list[Coroutine[Any, Any, Sequence[Finding]]]:
        stack, of = self.stack, self.progress.of
        work = [of(domain, names.check_domain(stack, domain, view)) for domain in stack.domains]
        work += [
            of(str(address), names.check_address(address, greeting, view))
            for address, greeting in names.greetings(stack).items()
        ]
        work += [of(name, names.check_silent(name, view)) for name in stack.dns.silent]
        senders = dict.fromkeys(names.greetings(stack).values())
        work += [of(name, names.check_sender(stack, name, view)) for name in senders]
        work += [of(listing.zone, blocklists.check_list(listing, view)) for listing in blocklists.listings(stack)]
        return work

    # Ports

    async def _ports(self) -> list[Finding]:
        stack = self.stack
        offered, shut = list(ports.public(stack, self.without)), list(ports.shut(stack, self.opened, self.without))
        findings: list[Finding] = []
        for version in (4, 6):
            addresses = [e.target["address"] for e in offered if e.family == version]
            if addresses and not reaches(version, addresses):
                offered = [e for e in offered if e.family != version]
                shut = [e for e in shut if e.family != version]
                advice = f"run this from a machine with IPv{version}"
                findings.append(Place(NETWORK, f"IPv{version}").unknown("this machine has none", advice))
        # A private internet has a world of its own.
        authorities = {"stack": stack.keys.public.believed, "world": "".join(stack.service.authorities)}

        async def public() -> list[Finding]:
            targets = [endpoint.target for endpoint in offered]
            talks = list(zip(offered, await wire.talk_to_all(targets, authorities, PUBLIC_AT_ONCE), strict=True))
            return [*ports.judge(stack, talks, dt.datetime.now(dt.UTC)), *ports.judge_authority(stack, talks)]

        async def closed() -> list[Finding]:
            talks = await asyncio.gather(*(wire.talk_to(endpoint.target, authorities) for endpoint in shut))
            return [f for endpoint, talk in zip(shut, talks, strict=True) for f in ports.judge_shut(endpoint, talk)]

        for found in await asyncio.gather(
            self.progress.of("public ports", public()), self.progress.of("shut ports", closed())
        ):
            findings += found
        return findings

    # Hosts

    async def _hosts(self) -> list[Finding]:
        stack, between = self.stack, ports.internal(self.stack, self.opened, self.without)
        seen = dict(
            zip(
                (host.name for host in self._hosts_here),
                await asyncio.gather(*(self._look(host, between.get(host.name, [])) for host in self._hosts_here)),
                strict=True,
            )
        )
        findings: list[Finding] = []
        now = dt.datetime.now(dt.UTC)
        reached = any(one.report is not None for one in seen.values())
        talks: list[tuple[Endpoint, Talk]] = []
        for host in self._hosts_here:
            one = seen[host.name]
            if one.report is None:
                findings += hosts.judge_reach(stack, host, one, others=reached)
                continue
            findings += hosts.judge(stack, host, one, now)
            talks += zip(between.get(host.name, []), one.report.get("others", ()), strict=False)
        findings += ports.judge(stack, talks, now)
        reports = {name: one.report for name, one in seen.items() if one.report is not None}
        findings += [*hosts.judge_versions(stack, reports), *hosts.judge_journals(reports)]
        findings += [*hosts.judge_learning(reports), *hosts.judge_guesses(stack, reports)]
        alone = any(host.site in self.without for host in stack.hosts_with(Role.MAILDROP))
        states = {name: report["mailboxes"] for name, report in reports.items() if report.get("mailboxes")}
        findings += mailboxes.judge(stack, states, alone=alone)
        findings += [*mailboxes.judge_former(reports), *mailboxes.judge_addresses(stack)]
        return findings

    async def _look(self, host: Host, endpoints: Sequence[Endpoint]) -> Seen:
        self.progress.asked += 1
        self.progress.waiting.add(host.name)
        wanted = bundle(self.stack, host)
        targets: list[Target] = [endpoint.target for endpoint in endpoints]
        task = {
            "look": LOOK,
            "wire": WIRE,
            "agent": AGENT,
            "bundle": wanted,
            "targets": targets,
            "units": list(wanted["units"]),
            "paths": list(hosts.paths(self.stack, host)),
            "spool": learning.SPOOL if host.has(Role.MAILDROP) else "",
            "homes": replication.HOMES if host.has(Role.MAILDROP) else "",
            "accounts": list(self.stack.accounts),
        }
        try:
            return await look(self.stack, host, task, time.time)
        finally:
            self.progress.answered += 1
            self.progress.waiting.discard(host.name)
            self.progress.tell(self.progress)


def check(stack: Stack, without: Sequence[str] = (), tell: Callable[[Progress], None] | None = None) -> list[Finding]:
    """Checks a stack from this machine: all findings, sorted."""
    progress = Progress(tell=tell or (lambda progress: None))
    return sorted(causes.named(asyncio.run(Check(stack, without, progress).run())))
