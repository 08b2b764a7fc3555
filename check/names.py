"""What receivers look at before they believe a mail: who an address is, who may send, whose signature it is."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Mapping, Sequence

from check import causes, spf
from check.ask import Answer, View
from check.finding import Finding, Findings, Place
from model.base import IPAddress
from model.network import Role
from model.stack import Stack
from services.zones import removed_from_dmarc

ADDRESSES, POLICIES = "addresses", "policies"


def greetings(stack: Stack) -> Mapping[IPAddress, str]:
    """Every address that speaks SMTP to the world, and the name that it greets with."""
    names = {address: stack.public_name("egress") for gateway in stack.gateways for address in gateway.addresses}
    for host in stack.hosts_with(Role.SMTP_IN):
        names |= dict.fromkeys(host.addresses.public, stack.public_name("smtp_in"))
    return names


def tags(record: str) -> dict[str, str]:
    """The tags of a DKIM, DMARC, MTA-STS or TLS-RPT record (RFC 6376 section 3.2)."""
    parts = (part.partition("=") for part in record.split(";"))
    return {key.strip().lower(): "".join(value.split()) for key, _, value in parts if key.strip()}


# Addresses


def judge_address(
    address: IPAddress, greeting: str, pointer: Answer, back: Mapping[str, Answer], greeted: Answer
) -> Findings:
    """One address: its name leads back to it (RFC 1912 section 2.1), and so does the name that it greets with.

    ``back`` has the addresses of each name that ``pointer`` gives, ``greeted`` those of the greeting.
    """
    place = Place(ADDRESSES, str(address))
    kind = "A" if address.version == 4 else "AAAA"
    advice = "have whoever gave you the address publish a PTR record; many receivers refuse mail without"
    if pointer.error:
        yield place.unknown(f"its name: the resolver {pointer.error}", "ask again later")
    elif not pointer.records:
        yield place.wrong("has no name: no PTR record", advice)
    else:
        for name in sorted(pointer.records):
            short = name.rstrip(".")
            if str(address) in back[name].records:
                yield place.good(f"is {short}, and that is it")
            elif back[name].error:
                yield place.unknown(f"where its name {short} leads: the resolver {back[name].error}", "ask again later")
            else:
                leads = ", ".join(sorted(back[name].records)) or "nothing"
                mend = f"publish {address} for {short}, or have its PTR record say another name"
                yield place.wrong(f"is {short}, and that leads to {leads}", mend, (causes.record(short, kind),))
    if greeted.error:
        yield place.unknown(f"whether {greeting} leads to it: the resolver {greeted.error}", "ask again later")
    elif str(address) in greeted.records:
        yield place.good(f"greets as {greeting}, which leads to it")
    else:
        advice = f"publish {address} for {greeting}: some receivers refuse a greeting that leads elsewhere (RFC 5321)"
        because = (causes.record(greeting, kind),)
        yield place.wrong(f"greets as {greeting}, which does not lead to it", advice, because)


async def check_address(address: IPAddress, greeting: str, view: View) -> Sequence[Finding]:
    kind = "A" if address.version == 4 else "AAAA"
    pointer, greeted = await asyncio.gather(view.ask(address.reverse_pointer, "PTR"), view.ask(greeting, kind))
    names = sorted(pointer.records)
    back = await asyncio.gather(*(view.ask(name.rstrip("."), kind) for name in names))
    return list(judge_address(address, greeting, pointer, dict(zip(names, back, strict=True)), greeted))


# Policies


def judge_mx(domain: str, listed: Answer, leads: Mapping[str, Iterable[str]]) -> Findings:
    """The MX of a domain, each of which has to lead to addresses of its own (RFC 5321 section 5.1)."""
    place = Place(POLICIES, domain)
    if listed.error:
        yield place.unknown(f"its MX: the resolver {listed.error}", "ask again later")
    elif not listed.records:
        yield place.wrong("has no MX record: mail for it goes nowhere", "see the records of its zone")
    for name, addresses in leads.items():
        if list(addresses):
            yield place.good(f"its MX {name} leads to {len(list(addresses))} addresses")
        else:
            advice = "publish its addresses: an MX may not be a CNAME, nor be without A or AAAA"
            because = (causes.record(name, "A"), causes.record(name, "AAAA"))
            yield place.wrong(f"its MX {name} leads to no address", advice, because)


async def check_mx(domain: str, view: View) -> Sequence[Finding]:
    listed = await view.ask(domain, "MX")
    names = [record.split()[1].rstrip(".") for record in sorted(listed.records)]
    answers = await asyncio.gather(*(view.ask(name, kind) for name in names for kind in ("A", "AAAA")))
    leads = {n: [*answers[2 * i].records, *answers[2 * i + 1].records] for i, n in enumerate(names)}
    return list(judge_mx(domain, listed, leads))


def judge_spf(stack: Stack, name: str, policy: spf.Policy) -> Findings:
    """SPF of a name that mail is sent under: sound, and passed by every address that mail can leave from."""
    place, advice = Place(POLICIES, name), f"compare it with the stack: make render STACK={stack.name}"
    for problem in policy.unanswered:
        yield place.unknown(f"SPF: {problem}", "ask again later")
    if policy.unanswered:
        return
    for problem in policy.problems:
        yield place.wrong(f"SPF: {problem}", advice)
    for source in stack.leaves_from():
        if not policy.passes(source):
            yield place.wrong(f"SPF: mail that leaves from {source} does not pass", advice)
    if policy.ends in ("+all", "all", "?all", ""):
        end = f"ends in {policy.ends}" if policy.ends else "has no end"
        yield place.wrong(f"SPF: it {end}: anybody may send as this domain", "end it in ~all or -all")
    if not policy.problems and all(policy.passes(source) for source in stack.leaves_from()):
        yield place.good(f"SPF: all addresses that mail can leave from pass, {policy.lookups} of 10 look-ups")


def judge_dkim(domain: str, selector: str, key: str, answer: Answer, *, signs: bool) -> Findings:
    """A DKIM key in DNS: it has to be the one that signs (RFC 6376 section 3.6.1)."""
    place, name = Place(POLICIES, domain), f"DKIM {selector}"
    record = next((tags(r) for r in sorted(answer.records) if "p=" in r), {})
    bad = place.wrong if signs else place.better
    if answer.error:
        yield place.unknown(f"{name}: the resolver {answer.error}", "ask again later")
    elif not record:
        yield bad(f"{name}: no key is published", "publish it before it signs: see the records of the zone")
    elif len(answer.records) > 1:
        yield bad(f"{name}: {len(answer.records)} records, and receivers take any of them", "leave only the right one")
    elif record["p"] != key:
        advice = "mail that is signed now fails: publish the key of the stack file, which signs"
        yield bad(f"{name}: another key is published than the stack's", advice)
    elif record.get("t", "").find("y") >= 0:
        yield place.better(f"{name}: marked as a test (t=y), which receivers may pass over", "take t=y away")
    else:
        yield place.good(f"{name}: the stack's key, {_bits(key)} bits")


def _bits(key: str) -> int:
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    loaded = load_der_public_key(base64.b64decode(key))
    return int(getattr(loaded, "key_size", 256))


def judge_dmarc(domain: str, answer: Answer) -> Findings:
    """DMARC: there, one, and with a word (RFC 9989 section 4.7)."""
    place = Place(POLICIES, domain)
    records = [tags(record) for record in answer.records if record.lower().startswith("v=dmarc1")]
    if answer.error:
        yield place.unknown(f"DMARC: the resolver {answer.error}", "ask again later")
    elif len(records) != 1:
        found = f"{len(records)} records" if records else "no record"
        yield place.wrong(f"DMARC: {found}, and one is needed", "see the records of the zone")
    elif records[0].get("p") == "none":
        advice = "when the reports show that all your mail passes, say p=quarantine, then p=reject, under dns.dmarc"
        yield place.better("DMARC: p=none, so that anybody may still write as this domain", advice)
    else:
        yield place.good(f"DMARC: p={records[0].get('p', '?')}")
    for remark in removed_from_dmarc("".join(answer.records)):
        yield place.better(remark, "see dns.dmarc")
    if records and "rua" not in records[0]:
        yield place.better("DMARC: nobody gets reports", "name an address with rua= under dns.dmarc")


async def check_domain(stack: Stack, domain: str, view: View) -> Sequence[Finding]:
    """MX, SPF, DKIM and DMARC of a domain."""
    findings = list(await check_mx(domain, view))
    policy = await spf.published(domain, view.ask)
    dmarc = await view.ask(f"_dmarc.{domain}", "TXT")
    if domain not in stack.sending_domains:
        return [*findings, *judge_silent(domain, policy, dmarc)]
    findings += judge_spf(stack, domain, policy)
    keys = stack.keys.public.dkim.get(domain, {})
    selectors = [s for s in dict.fromkeys((stack.dkim.selector, *stack.dkim.published)) if s in keys]
    asked = (view.ask(f"{selector}._domainkey.{domain}", "TXT") for selector in selectors)
    for selector, answer in zip(selectors, await asyncio.gather(*asked), strict=True):
        findings += judge_dkim(domain, selector, keys[selector], answer, signs=selector == stack.dkim.selector)
    return [*findings, *judge_dmarc(domain, dmarc)]


def judge_silent(name: str, policy: spf.Policy, dmarc: Answer) -> Findings:
    """A name that sends no mail says so: whatever claims to be from it is forged."""
    place, record = Place(POLICIES, name), next((tags(r) for r in dmarc.records if "p=" in r), {})
    if policy.unanswered or dmarc.error:
        yield place.unknown("whether it says that it sends no mail: the resolver does not answer", "ask again later")
    elif policy.networks or policy.ends != "-all" or record.get("p") != "reject":
        yield place.wrong("sends no mail, and does not say so: it can be forged", "see the records of its zone")
    else:
        yield place.good("sends no mail, and says so")


async def check_silent(name: str, view: View) -> Sequence[Finding]:
    """SPF and DMARC of a name that sends no mail."""
    policy, dmarc = await asyncio.gather(spf.published(name, view.ask), view.ask(f"_dmarc.{name}", "TXT"))
    return list(judge_silent(name, policy, dmarc))


async def check_sender(stack: Stack, name: str, view: View) -> Sequence[Finding]:
    """SPF of a name that hosts greet with: it is the sender of every bounce (RFC 7208 section 2.4)."""
    return list(judge_spf(stack, name, await spf.published(name, view.ask)))
