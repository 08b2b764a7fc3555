"""Every port of every service: what the stack says of it, and what a client meets there."""

from __future__ import annotations

import base64
import datetime as dt
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cryptography.x509 import Certificate

from check import causes
from check.certificates import (
    by_authority,
    certificate_advice,
    judge_days,
    matches_tlsa,
    of_der,
    public_key,
    stack_keys,
)
from check.finding import Finding, Findings, Place
from check.wire import Talk, Target
from model.base import IPAddress
from model.network import Role
from model.stack import Host, Stack
from services import discovery, identity, learning, maildrop, mta_sts, replication, rspamd, smtp_out, webmail
from services.roles import services_of
from services.service import Listen, Source
from services.zones import rrsets

Tlsa = Mapping[str, Sequence[str]]
"""The name of a port (RFC 6698 section 3) to its TLSA records."""
Listens = Mapping[str, Sequence[Listen]]
AREA, BETWEEN = "ports", "between hosts"
FOREIGN = "nobody@example.com"
"""Somebody who is not ours, in a domain that is nobody's (RFC 2606 section 3). No mail is ever sent there."""
UNKNOWN_AT_MOST = 5
"""Postfix slows down whoever makes more than ten mistakes in a session (smtpd_soft_error_limit)."""
LOOPBACK = "127.0.0.1"
FULL = "4.3.1"
"""A server has no room for a mail now (RFC 3463 section 3.4)."""
NEVER_OPEN = (53, 110, 111, 143, 6379, 11332, 11334)
"""Ports that are open to the internet on badly kept mail hosts: DNS, POP3, portmapper, IMAP, Redis, rspamd."""

OWN = {"identity": (identity.CERTIFICATE, identity.KEY)}
HOPS: Mapping[int, tuple[str, str, Mapping[str, object]]] = {
    25: ("smtp", "starttls", {}),
    53: ("tcp", "none", {}),
    465: ("smtp", "implicit", {}),
    learning.PORT: ("http", "implicit", {**OWN, "path": "/ping"}),
    maildrop.IMAPS: ("imap", "implicit", {}),
    maildrop.IMAPS_PROXY: ("imap", "implicit", {"proxy": True}),
    maildrop.SIEVE: ("sieve", "starttls", {}),
    maildrop.SIEVE_PROXY: ("sieve", "starttls", {"proxy": True}),
    replication.SYNC_PORT: ("http", "implicit", {**OWN, "path": "/metrics"}),
    rspamd.SCANNER: ("tcp", "none", {}),
    smtp_out.MAILBOXES: ("smtp", "starttls", {}),
    smtp_out.REDIRECTED: ("smtp", "starttls", {}),
    smtp_out.SUBMISSION: ("smtp", "starttls", {}),
    smtp_out.SUBMISSION_PROXY: ("smtp", "starttls", {"proxy": True}),
    smtp_out.SUBMISSIONS_PROXY: ("smtp", "implicit", {"proxy": True}),
    smtp_out.SUBMISSION_WEBMAIL: ("smtp", "starttls", {}),
    webmail.WEB: ("http", "implicit", {}),
}
"""How hosts speak to the ports that they have for one another. Dovecot's own replication port is not asked: it would
note a broken connection."""


@dataclass(frozen=True)
class Endpoint:
    """A port at an address, as a client means it."""

    host: Host
    service: str
    """What it is, for people: mx, submission, imaps, …"""
    target: Target
    area: str = AREA
    seen_from: str = ""
    """The host that asks, when it is not this machine."""
    whose: tuple[Host, ...] = ()
    """The hosts one of whose keys it has to serve with."""
    serves: tuple[str, str] = ("", "")
    """The media type and, where it is known, the text of a document that it has to serve."""

    @property
    def where(self) -> str:
        place = f"{self.host.name} {self.target['address']} port {self.target['port']}"
        return f"{place} from {self.seen_from}" if self.seen_from else place

    @property
    def place(self) -> Place:
        return Place(self.area, self.where)

    @property
    def family(self) -> int:
        return 6 if ":" in self.target["address"] else 4


# ---------------------------------------------------------------------------------------------------------------------
# Which there are


def _target(address: IPAddress | str, port: int, protocol: str, tls: str, name: str, **more: object) -> Target:
    return {"address": str(address), "port": port, "protocol": protocol, "tls": tls, "name": name, **more}


def _strangers(stack: Stack) -> list[tuple[str, str]]:
    """Senders and recipients that an MX is tried with: to others, to nobody, and to the postmasters."""
    here = [domain for domain in stack.domains if not stack.accepts(f"a.name.that.nobody.has@{domain}")]
    nobody = f"no-such-{secrets.token_hex(6)}"
    relayed = [("", FOREIGN), (stack.postmaster_address, FOREIGN)]
    unknown = [("", f"{nobody}@{domain}") for domain in here[:UNKNOWN_AT_MOST]]
    return [*relayed, *unknown, *(("", f"postmaster@{domain}") for domain in stack.domains)]


def _believing(stack: Stack, endpoints: Iterable[Endpoint]) -> Iterator[Endpoint]:
    """The same, each with whose authorities its client believes: a name has one kind of certificate, no other counts.

    Where no ACME authority is named, the stack's own stands behind public names too, or whoever the operator asked.
    """
    certified = {name for host in stack.all_hosts.values() for name in stack.acme_names(host)}
    for endpoint in endpoints:
        name = endpoint.target["name"]
        inside = name == stack.net or name.endswith(f".{stack.net}")
        whose = ["world"] if name in certified else ["stack"] if inside else ["stack", "world"]
        yield replace(endpoint, target={**endpoint.target, "believes": whose})


def public(stack: Stack, without: Sequence[str] = ()) -> Iterator[Endpoint]:
    """The ports that the world connects to. TLS is tried version by version once a port, at its first address."""
    return _believing(stack, _public(stack, without))


def _public(stack: Stack, without: Sequence[str]) -> Iterator[Endpoint]:
    mx, imap, out = (stack.public_name(name) for name in ("smtp_in", "imap", "smtp_out"))
    strangers = _strangers(stack)
    drops, submits = stack.hosts_with(Role.MAILDROP), stack.hosts_with(Role.SMTP_OUT)
    for host in _at(stack, Role.SMTP_IN, without):
        for first, address in _addresses(host):
            more = {"versions": first, "recipients": strangers}
            yield Endpoint(host, "mx", _target(address, 25, "smtp", "starttls", mx, **more), whose=(host,))
            yield Endpoint(host, "mx", _target(address, 465, "smtp", "implicit", mx, **more), whose=(host,))
    for host in _at(stack, Role.FRONTEND, without):
        for first, address in _addresses(host):
            # One session alone a port: submission counts the connections of each client.
            more = {"recipients": [("", FOREIGN)]}
            yield Endpoint(host, "submission", _target(address, 465, "smtp", "implicit", out, **more), whose=submits)
            yield Endpoint(host, "submission", _target(address, 587, "smtp", "starttls", out, **more), whose=submits)
            more = {"versions": first}
            yield Endpoint(host, "imaps", _target(address, 993, "imap", "implicit", imap, **more), whose=drops)
            web = stack.public_name("webmail")
            yield Endpoint(host, "web", _target(address, 443, "http", "implicit", web, **more), whose=(host,))
            yield Endpoint(host, "redirect", _target(address, 80, "http", "none", web))
            if first:
                yield from _documents(stack, host, address)


def _documents(stack: Stack, host: Host, address: IPAddress) -> Iterator[Endpoint]:
    """What mail programs and other mail hosts fetch under names of their own, for every domain."""
    for label, path, media in discovery.DOCUMENTS:
        text = mta_sts.policy(stack) if label == "mta-sts" else ""
        for domain in stack.domains:
            target = _target(address, 443, "http", "implicit", f"{label}.{domain}", path=path)
            yield Endpoint(host, "document", target, whose=(host,), serves=(media, text))


def _at(stack: Stack, role: Role, without: Sequence[str]) -> Iterator[Host]:
    return (host for host in stack.hosts_with(role) if host.site not in without)


def _addresses(host: Host) -> Iterator[tuple[bool, IPAddress]]:
    return ((index == 0, address) for index, address in enumerate(host.addresses.public))


def listens_of(stack: Stack) -> Listens:
    """The ports that the services of each host open, and to whom."""
    return {
        host.name: tuple(listen for service in services_of(stack, host) for listen in service.listens)
        for host in stack.all_hosts.values()
    }


def internal(stack: Stack, opened: Listens, without: Sequence[str] = ()) -> dict[str, list[Endpoint]]:
    """The ports that hosts have for one another: host that asks to what it asks.

    Who may connect is what the services say of their ports; where that is everybody at the sites, one host a site asks.
    """
    asked: dict[str, list[Endpoint]] = defaultdict(list)
    hosts = [host for host in stack.all_hosts.values() if host.site not in without]
    for host in hosts:
        for endpoint in _own(stack, host):
            asked[host.name].append(endpoint)
        for listen in opened[host.name]:
            target = _hop(stack, host, listen.port)
            if listen.frm is Source.INTERNET or listen.protocol != "tcp" or target is None:
                continue
            for client in _clients(stack, hosts, host, listen):
                asked[client.name].append(Endpoint(host, "hop", target, BETWEEN, client.name, (host,)))
    return {name: list(_believing(stack, endpoints)) for name, endpoints in asked.items()}


def _clients(stack: Stack, hosts: Sequence[Host], host: Host, listen: Listen) -> Iterable[Host]:
    """Hosts that may connect to a port of another one."""
    others = [other for other in hosts if other.name != host.name]
    if listen.frm is Source.SITES:
        # Not by a web mail: Dovecot trusts it more than others.
        preferred = sorted(others, key=lambda other: other.has(Role.WEBMAIL))
        return {other.site: other for other in reversed(preferred)}.values()
    assert not isinstance(listen.frm, Source)
    named = set(listen.frm)
    return [other for other in others if any(address in named for address in other.addresses.local)]


def _hop(stack: Stack, host: Host, port: int) -> Target | None:
    """How the hosts of a stack speak to a port of one of theirs: by the address that they have of it."""
    if port not in HOPS or (port == maildrop.SIEVE and not host.has(Role.MAILDROP)):
        return None
    protocol, tls, more = HOPS[port]
    name = stack.internal_name(Role.WEBMAIL) if port == webmail.WEB else host.fqdn
    return _target(host.addresses.local[0], port, protocol, tls, name, **more)


def _own(stack: Stack, host: Host) -> Iterator[Endpoint]:
    """What a host asks itself, where nothing counts its connections: TLS version by version."""
    if host.has(Role.SMTP_OUT):
        more = {"versions": True, "recipients": [("", FOREIGN)]}
        target = _target(LOOPBACK, smtp_out.SUBMISSION, "smtp", "starttls", host.fqdn, **more)
        yield Endpoint(host, "submission", target, BETWEEN, host.name, (host,))
    if host.has(Role.MAILDROP):
        target = _target(LOOPBACK, 25, "smtp", "starttls", host.fqdn, versions=True)
        yield Endpoint(host, "hop", target, BETWEEN, host.name, (host,))
    if host.has(Role.FRONTEND):
        # ManageSieve is for the networks of the users: the front end itself is in one, and the operator need not be.
        name, whose = stack.public_name("imap"), stack.hosts_with(Role.MAILDROP)
        target = _target(host.addresses.local[0], maildrop.SIEVE, "sieve", "starttls", name, versions=True)
        yield Endpoint(host, "sieve", target, BETWEEN, host.name, whose)


def shut(stack: Stack, opened: Listens, without: Sequence[str] = ()) -> Iterator[Endpoint]:
    """Ports that the internet must not reach on public addresses: all of the stack's, and some that are often open."""
    every = {listen.port for listens in opened.values() for listen in listens} | set(NEVER_OPEN)
    for host in (host for host in stack.all_hosts.values() if host.site not in without):
        # Those that are open to some networks may be open to this machine.
        open_here = {listen.port for listen in opened[host.name] if not _only_hosts(listen)}
        for address in host.addresses.public:
            for port in sorted(every - open_here - {22}):
                yield Endpoint(host, "shut", _target(address, port, "tcp", "none", host.fqdn))


def _only_hosts(listen: Listen) -> bool:
    return not isinstance(listen.frm, Source) and all(not hasattr(source, "prefixlen") for source in listen.frm)


# ---------------------------------------------------------------------------------------------------------------------
# What is concluded


def judge_shut(endpoint: Endpoint, talk: Talk) -> Findings:
    """A port that nobody should reach."""
    if talk["connected"]:
        yield endpoint.place.wrong(
            "is open to the internet, and nobody out there has any business with it",
            f"see what listens (ss -ltnp) and whether the firewall is up (nft list ruleset) on {endpoint.host.name}",
        )
    else:
        yield endpoint.place.good("is shut")


def judge(stack: Stack, talks: Sequence[tuple[Endpoint, Talk]], now: dt.datetime) -> list[Finding]:
    """Everything about the ports that were talked to; those of a host that is silent as a whole in one finding."""
    findings: list[Finding] = []
    tlsa = {rrset.name: rrset.records for rrset in rrsets(stack) if rrset.type == "TLSA"}
    answered = [endpoint for endpoint, talk in talks if talk["connected"]]
    by_host: dict[tuple[str, str], list[tuple[Endpoint, Talk]]] = defaultdict(list)
    for endpoint, talk in talks:
        by_host[endpoint.host.name, endpoint.seen_from].append((endpoint, talk))
    for (name, seen_from), of_host in by_host.items():
        silent = [(endpoint, talk) for endpoint, talk in of_host if talk.get("silent") or talk.get("refused")]
        if len(silent) == len(of_host) > 1 and all(talk.get("silent") for _, talk in silent):
            findings += _silent_host(of_host[0][0], [e for e, _ in silent], answered, name, seen_from)
            continue
        for endpoint, talk in of_host:
            if not talk["connected"]:
                findings += _no_answer(endpoint, talk, answered)
            else:
                findings += _answer(stack, endpoint, talk, tlsa, now)
    return findings


def _silent_host(
    one: Endpoint, silent: Sequence[Endpoint], answered: Sequence[Endpoint], name: str, seen_from: str
) -> Findings:
    ports = ", ".join(str(port) for port in sorted({endpoint.target["port"] for endpoint in silent}))
    place = Place(one.area, f"{name} from {seen_from}" if seen_from else name)
    lost = f"if its site is lost, leave it out: WITHOUT={one.host.site}"
    if answered or seen_from:
        said = f"answers on none of its ports ({ports}), while others do"
        yield place.wrong(said, f"see whether it runs; {lost}", (causes.unreached(one.host),))
    else:
        yield place.unknown(f"answers on none of its ports ({ports}), and nobody else does", REACH)


REACH = "run this from a machine that reaches the internet on these ports"


def _no_answer(endpoint: Endpoint, talk: Talk, answered: Sequence[Endpoint]) -> Findings:
    place, port, said = endpoint.place, endpoint.target["port"], talk["error"]
    look = f"see whether its daemon runs, and its firewall, on {endpoint.host.name}"
    if "421" in said and "too many" in said:
        yield place.unknown(f"{said}: it counts the connections of each client", "ask again in a minute")
    elif not talk.get("silent"):
        because = (causes.port(endpoint.host, port),) if talk.get("refused") else ()
        yield place.wrong(said, look, because)
    elif any(e.target["port"] == port and e.family == endpoint.family for e in answered) or endpoint.seen_from:
        yield place.wrong(f"{said}, while others do", f"{look}; lost site: WITHOUT={endpoint.host.site}")
    elif any(e.host == endpoint.host and e.family == endpoint.family for e in answered):
        advice = f"many networks let nobody out on port {port}: run this from elsewhere"
        yield place.unknown(f"{said}, and port {port} answers nowhere: is it shut where you are?", advice)
    else:
        yield place.unknown(f"{said}, and nobody does over IPv{endpoint.family}", REACH)


def _answer(stack: Stack, endpoint: Endpoint, talk: Talk, tlsa: Tlsa, now: dt.datetime) -> Findings:
    place, target = endpoint.place, endpoint.target
    if talk["error"]:
        yield place.wrong(talk["error"], f"see the journal of its daemon on {endpoint.host.name}")
        return
    yield place.good("answers")
    if target["tls"] != "none":
        yield from _certificate(stack, endpoint, talk, tlsa, now)
        yield from _versions(endpoint, talk)
    if target["protocol"] == "smtp":
        yield from _smtp(stack, endpoint, talk)
    elif target["protocol"] == "imap":
        yield from _imap(place, talk["banner"])
    elif target["protocol"] == "sieve":
        asks = stack.all_hosts.get(endpoint.seen_from)
        # A front end that asks itself looks to Dovecot 2.4, behind it, like a client on the same machine.
        trusted = asks is not None and (asks.has(Role.WEBMAIL) or asks.name == endpoint.host.name)
        yield from _sieve(place, talk, trusted=trusted)
    elif endpoint.service == "web":
        yield from _web(place, talk)
    elif endpoint.service == "redirect":
        yield from _redirect(place, talk)
    elif endpoint.service == "document":
        yield from _document(endpoint, talk)


def _certificate(stack: Stack, endpoint: Endpoint, talk: Talk, tlsa: Tlsa, now: dt.datetime) -> Findings:
    place, target, name = endpoint.place, endpoint.target, endpoint.target["name"]
    certificate = of_der(base64.b64decode(talk["certificate"]))
    if talk["verified"]:
        yield place.good(f"its certificate is for {name}, by an authority that counts")
    elif target["believes"] == ["world"] and "issuer" in talk["unverified"] and by_authority(certificate, stack):
        when = "the host asks for one within 20 minutes, after failures within 12 hours"
        advice = f"{when}; if none comes, {certificate_advice(stack, *endpoint.whose)}"
        yield place.better(f"still shows the stack's own certificate for {name}: strangers do not believe it", advice)
    else:
        who = "see which certificate the host serves, and make up"
        yield place.wrong(f"its certificate does not prove that it is {name}: {talk['unverified']}", who)
    yield from judge_days(place, stack, certificate, now, "its certificate")
    known = stack_keys(stack, endpoint.whose)
    if known and public_key(certificate) not in known:
        advice = f"the key of the stack file is not on the host: make up STACK={stack.name}"
        yield place.wrong("its key is none that the stack has for it", advice)
    yield from _tlsa(endpoint, certificate, tlsa)


def _tlsa(endpoint: Endpoint, certificate: Certificate, tlsa: Tlsa) -> Findings:
    owner = f"_{endpoint.target['port']}._tcp.{endpoint.target['name']}"
    records = tlsa.get(owner, ())
    if not records:
        return
    if any(matches_tlsa(record, certificate) for record in records):
        yield endpoint.place.good("its key is in TLSA")
    else:
        advice = "senders that demand DANE refuse this host: publish the key that it serves with (make up)"
        yield endpoint.place.wrong(f"its key is in no TLSA record of {owner}", advice)


def _versions(endpoint: Endpoint, talk: Talk) -> Findings:
    place, host = endpoint.place, endpoint.host.name
    if talk.get("version") not in ("TLSv1.3", "TLSv1.2"):
        yield place.wrong(f"speaks {talk.get('version')} with us", f"see its TLS settings on {host}")
    if "1.2" not in talk:
        return
    if talk["old"]:
        yield place.wrong(f"still speaks {talk['old']}, which is broken (RFC 8996)", f"see its TLS settings on {host}")
    elif talk["old"] is not None:
        yield place.good("refuses TLS older than 1.2")
    if talk["1.2"] == "":
        yield place.better("does not speak TLS 1.2, which many senders still have", f"see its TLS settings on {host}")
    if talk["old"] is None or talk["1.2"] is None:
        yield place.unknown("which versions of TLS it speaks: it does not answer any more", "ask again later")
    if talk.get("version") == "TLSv1.2":
        yield place.better("does not speak TLS 1.3", f"see its TLS settings on {host}")
    elif talk["1.2"]:
        yield place.good("speaks TLS 1.2 and 1.3")


def _smtp(stack: Stack, endpoint: Endpoint, talk: Talk) -> Findings:
    place, target, host = endpoint.place, endpoint.target, endpoint.host
    name = host.fqdn if host.has(Role.MAILDROP) else stack.public_name("smtp_out")
    name = stack.public_name("smtp_in") if host.has(Role.SMTP_IN) else name
    if not talk["banner"].startswith(name):
        yield place.wrong(f"greets as {talk['banner']}, and not as {name}", f"see smtpd_banner on {host.name}")
    before, after = (any(w.upper().startswith("AUTH") for w in talk.get(when, ())) for when in ("before", "after"))
    # On 465 of an MX there is no login, on 465 of a front end there is.
    submission = endpoint.service == "submission" or target["port"] in smtp_out.PORTS
    if before:
        yield place.wrong("takes passwords in clear: AUTH is offered before TLS", f"see main.cf on {host.name}")
    elif submission and not after:
        yield place.wrong("offers no AUTH: nobody can submit mail", f"see Dovecot on {host.name}")
    elif after and not submission:
        yield place.wrong("offers AUTH, where passwords are guessed", f"see main.cf on {host.name}")
    else:
        yield place.good(f"offers {'AUTH after TLS alone' if submission else 'no AUTH'}")
    for sender, recipient, code, text in talk["replies"]:
        yield from _reply(place, sender, recipient, code, text, (causes.queue(host),) if FULL in text else ())


def _reply(place: Place, sender: str, recipient: str, code: int, text: str, because: tuple[str, ...]) -> Findings:
    said = f"{code} {text}"
    accepted, refused = code == 250, 500 <= code < 600
    if recipient == FOREIGN:
        who = f"for {sender} " if sender else ""
        if accepted:
            advice = "an open relay: stop Postfix there at once, then see smtpd_relay_restrictions and mynetworks"
            yield place.wrong(f"takes mail {who}to others from anybody ({said})", advice)
        elif refused:
            yield place.good(f"relays {who}for no one")
        else:
            yield place.unknown(f"whether it relays: {said}", "ask again later", because)
    elif recipient.startswith("no-such-"):
        domain = recipient.partition("@")[2]
        if accepted:
            advice = "it will bounce to senders that may be forged: see virtual on the host, and make up"
            yield place.wrong(f"takes mail for an address that {domain} does not have", advice)
        elif refused:
            yield place.good(f"refuses an address that {domain} does not have")
        else:
            told = f"whether it refuses what {domain} does not have: {said}"
            yield place.unknown(told, "ask again later", because)
    elif accepted:
        yield place.good(f"takes mail for {recipient}")
    elif "blocked using" in text or "listed" in text.lower():
        advice = "this machine stands on a blocklist: run this from elsewhere"
        yield place.unknown(f"whether it takes mail for {recipient}: {said}", advice)
    else:
        yield place.wrong(f"does not take mail for {recipient}: {said}", "see the journal of Postfix there", because)


def _imap(place: Place, banner: str) -> Findings:
    if not banner.startswith("* OK"):
        yield place.wrong(f"greets with {banner}", "see the journal of Dovecot")
    elif "LOGINDISABLED" in banner:
        yield place.wrong("lets nobody log in (LOGINDISABLED)", "see the settings of Dovecot")
    else:
        yield place.good("greets as IMAP does")


def _sieve(place: Place, talk: Talk, *, trusted: bool) -> Findings:
    # Dovecot lets whom it trusts (login_trusted_networks, and its own machine) say passwords as they like.
    if talk["before"].get("SASL") and not trusted:
        yield place.wrong(
            f"takes passwords in clear: {talk['before']['SASL']} before TLS", "see the settings of Dovecot"
        )
    elif not talk["after"].get("SASL"):
        yield place.wrong("lets nobody log in after TLS", "see the settings of Dovecot")
    else:
        yield place.good("STARTTLS, and a login after it alone")


def _web(place: Place, talk: Talk) -> Findings:
    if talk["status"] >= 500:
        yield place.wrong(f"answers with {talk['status']}", "see the journal of nginx, and what is behind it")
    elif "strict-transport-security" not in talk["headers"]:
        yield place.better("does not say that it is to be reached by HTTPS alone (RFC 6797)", "see nginx.conf")
    else:
        yield place.good(f"serves HTTPS ({talk['status']})")


def _redirect(place: Place, talk: Talk) -> Findings:
    if talk["status"] in (301, 308) and talk["headers"].get("location", "").startswith("https://"):
        yield place.good("leads to HTTPS")
    else:
        yield place.wrong(f"does not lead to HTTPS ({talk['status']})", "see nginx.conf")


def _document(endpoint: Endpoint, talk: Talk) -> Findings:
    (media, text), url = endpoint.serves, f"https://{endpoint.target['name']}{endpoint.target['path']}"
    kind = talk["headers"].get("content-type", "").partition(";")[0]
    if talk["status"] != 200:
        yield endpoint.place.wrong(f"answers {url} with {talk['status']}", "see the journal of nginx")
    elif kind != media:
        yield endpoint.place.wrong(f"serves {url} as {kind or 'nothing'}, and not as {media}", "see nginx.conf")
    elif text and talk["body"].split() != text.split():
        advice = "senders hold our MX to what it says: bring the present one there (make up)"
        yield endpoint.place.wrong(f"serves another policy at {url}: {' '.join(talk['body'].split())[:120]}", advice)
    else:
        yield endpoint.place.good(f"serves {url}")


def judge_authority(stack: Stack, talks: Sequence[tuple[Endpoint, Talk]]) -> Findings:
    """Whether strangers can verify what the public ports show."""
    if stack.acme is not None:
        return
    own: Mapping[str, set[str]] = defaultdict(set)
    for endpoint, talk in talks:
        if talk.get("certificate") and by_authority(of_der(base64.b64decode(talk["certificate"])), stack):
            own[endpoint.target["name"]].add(endpoint.host.name)
    if own:
        yield Place(AREA, "authority").note(
            f"{', '.join(sorted(own))}: signed by the stack's own authority, which mail programs of users do not know"
        )
