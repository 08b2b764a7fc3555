"""Records of mail: where it goes, who may send it, by which keys, and where a mail program finds its servers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from model.base import IPAddress, IPNetwork
from model.network import Role
from model.stack import WEB_LABELS, Host, Stack
from services import mta_sts
from services.zones.rrset import Records, RRset

SPF_LENGTH = 450
"""Longer than this, an SPF record may not fit into an answer of 512 octets (RFC 7208 section 3.4)."""
OFFERED = (("submissions", 465, 0), ("submission", 587, 10), ("imaps", 993, 0), ("sieve", 4190, 0))
"""Service, port and priority: TLS from the first byte is better (RFC 6186 section 3.4, RFC 8314 section 3.3)."""
NOT_OFFERED = ("imap", "pop3", "pop3s")
"""Services that a client might look for (RFC 6186, RFC 8314), and that there are none of here."""


# Keys


def key_records(stack: Stack) -> tuple[RRset, ...]:
    """TLSA of every name that an MX leads to, with the keys of every host that serves it (RFC 7672 section 3.1.1), and
    the keys that mail is signed with (RFC 6376 section 3.6.1).

    Published before all else, so that a key is known before it is met.
    """
    records = Records(stack, "internal")
    served: dict[str, list[Host]] = {}
    for host in stack.all_hosts.values():
        for name in tlsa_names(stack, host):
            served.setdefault(name, []).append(host)
    for name, hosts in served.items():
        keys = sorted(f"3 1 1 {digest}" for host in hosts for digest in _digests(stack, host))
        records.add("keys.public.hosts", name, "TLSA", stack.dns.ttl.service, keys)
    for domain in stack.sending_domains:
        for selector, key in sorted(stack.keys.public.dkim.get(domain, {}).items()):
            if selector in (stack.dkim.selector, *stack.dkim.published):
                name = f"{selector}._domainkey.{domain}"
                records.texts("dkim", name, stack.dns.ttl.policy, f"v=DKIM1; k=rsa; p={key}")
    return tuple(records.found)


def tlsa_names(stack: Stack, host: Host) -> tuple[str, ...]:
    """The names of the TLSA records that hold a host's key: of its port 25, where an MX leads to it."""
    names = [stack.public_name("smtp_in")] if host.has(Role.SMTP_IN) else []
    names += [host.fqdn] if host.has(Role.MAILDROP) else []
    return tuple(f"_25._tcp.{name}" for name in names)


def key_digest(key: PublicKeyTypes) -> str:
    """SHA-256 of a public key: what TLSA 3 1 1 holds (RFC 6698 section 2.1)."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _digests(stack: Stack, host: Host) -> Iterator[str]:
    """The key that a host serves with, and the one that follows or went before while it is replaced."""
    if public := stack.keys.public.hosts.get(host.name):
        yield key_digest(x509.load_pem_x509_certificate(public.certificate.encode()).public_key())
        yield from (digest for digest in (public.next, public.previous) if digest)


# Names and policies


def service_records(stack: Stack) -> tuple[RRset, ...]:
    """What leads the world to the service, and what the world is told about its mail."""
    records, ttl = Records(stack, "service"), stack.dns.ttl
    frontend = stack.public_name("frontend")
    for service, seconds in (("smtp_out", ttl.submission), ("imap", ttl.service), ("webmail", ttl.service)):
        records.add(f"service.names.{service}", stack.public_name(service), "CNAME", seconds, (f"{frontend}.",))
    for name, value in _spf(stack):
        records.texts("gateways", name, ttl.policy, value)
    # The names that hosts greet with are senders too: of every bounce (RFC 7208 section 2.4).
    for service in ("smtp_in", "egress"):
        records.texts(f"service.names.{service}", stack.public_name(service), ttl.policy, _sent_by_us(stack))
    for domain in stack.domains:
        _domain(records, domain)
    for path, name in _silent(stack):
        records.add(path, name, "MX", ttl.mx, ("0 .",))
    for path, name in _never_sending(stack):
        records.texts(path, name, ttl.policy, "v=spf1 -all")
    for index, name in enumerate(stack.dns.silent):
        _forged(records, f"dns.silent[{index}]", name)
    for domain in (*stack.domains, *stack.dns.silent):
        for receiver in _receivers(stack):
            # A receiver in another domain has to agree (RFC 9990 section 4).
            if domain != receiver:
                records.texts("dns.reports", f"{domain}._report._dmarc.{receiver}", ttl.policy, "v=DMARC1")
    _authorities(records)
    return tuple(records.found)


def _domain(records: Records, domain: str) -> None:
    """All records of a domain that takes mail."""
    stack, ttl, path = records.stack, records.stack.dns.ttl, f"domains.{domain}"
    settings = stack.domains[domain]
    records.add(path, domain, "MX", ttl.mx, (f"10 {stack.public_name('smtp_in')}.",))
    if settings.sends:
        records.texts(path, domain, ttl.policy, _sent_by_us(stack, settings.also_from), *settings.texts)
        records.texts("dns.dmarc", f"_dmarc.{domain}", ttl.policy, _dmarc(stack, stack.dns.dmarc))
    else:
        records.texts(path, domain, ttl.policy, "v=spf1 -all", *settings.texts)
        _forged(records, path, domain)
    # How other hosts are to meet our MX, and whom they tell when it fails (RFC 8461 section 3.1, RFC 8460 section 3).
    records.texts("dns.mta_sts", f"_mta-sts.{domain}", ttl.policy, f"v=STSv1; id={mta_sts.policy_id(stack)}")
    records.texts("dns.reports", f"_smtp._tls.{domain}", ttl.policy, f"v=TLSRPTv1; rua=mailto:{stack.reports_to}")
    # Where mail programs find their servers. An SRV record may not lead to an alias (RFC 2782).
    frontend = stack.public_name("frontend")
    for label in WEB_LABELS:
        records.add(path, f"{label}.{domain}", "CNAME", ttl.policy, (f"{frontend}.",))
    for service, port, priority in OFFERED:
        records.add(path, f"_{service}._tcp.{domain}", "SRV", ttl.policy, (f"{priority} 1 {port} {frontend}.",))
    for service in NOT_OFFERED:
        records.add(path, f"_{service}._tcp.{domain}", "SRV", ttl.policy, ("0 0 0 .",))


def _dmarc(stack: Stack, policy: str) -> str:
    """A DMARC policy, with an address for reports where it names none (RFC 9989 section 4.7)."""
    return policy if "rua=" in policy else f"{policy.rstrip('; ')}; rua=mailto:{stack.reports_to}"


def _receivers(stack: Stack) -> list[str]:
    """The domains that reports about DMARC go to."""
    found = re.findall(r"mailto:[^@\s]+@([^,;!\s]+)", f"{_dmarc(stack, stack.dns.dmarc)} mailto:{stack.reports_to}")
    return sorted({domain.lower().rstrip(".") for domain in found})


def _forged(records: Records, path: str, name: str) -> None:
    """Whatever claims to be from a name that sends no mail is forged: by DMARC, and by a DKIM key that was revoked."""
    ttl = records.stack.dns.ttl.policy
    records.texts(path, f"_dmarc.{name}", ttl, _dmarc(records.stack, "v=DMARC1; p=reject; adkim=s; aspf=s"))
    records.texts(path, f"*._domainkey.{name}", ttl, "v=DKIM1; p=")


def _silent(stack: Stack) -> Iterator[tuple[str, str]]:
    """Names that take no mail (RFC 7505): without a null MX, mail would be tried at their addresses."""
    for service in ("frontend", "egress"):
        yield f"service.names.{service}", stack.public_name(service)
    for index, gateway in enumerate(stack.gateways):
        yield f"gateways[{index}].name", gateway.name
    for index, name in enumerate(stack.dns.silent):
        yield f"dns.silent[{index}]", name


def _never_sending(stack: Stack) -> Iterator[tuple[str, str]]:
    """Those of them that send none either: smtp-out greets as the egress."""
    return ((path, name) for path, name in _silent(stack) if name != stack.public_name("egress"))


def _authorities(records: Records) -> None:
    """CAA of every domain, and of the internal names, which no public authority is to know (RFC 8659 section 4)."""
    stack, ttl = records.stack, records.stack.dns.ttl.policy
    if not stack.dns.caa:
        return
    told = f'0 iodef "mailto:{stack.reports_to}"'
    for domain in dict.fromkeys((stack.domain, *stack.domains)):
        records.add("dns.caa", domain, "CAA", ttl, (*(f'0 issue "{name}"' for name in stack.dns.caa), told))
    if stack.net not in (stack.domain, *stack.domains):
        records.add("dns.caa", stack.net, "CAA", ttl, ('0 issue ";"', told))


# SPF


def _sent_by_us(stack: Stack, also_from: Iterable[str] = ()) -> str:
    return " ".join(("v=spf1", f"include:_spf.{stack.domain}", *also_from, stack.dns.spf_all))


def _spf(stack: Stack) -> Iterator[tuple[str, str]]:
    """SPF of the stack, split by family: three look-ups of the ten that are allowed (RFC 7208 section 4.6.4).

    A family with many addresses goes over several records, so that each fits into an answer.
    """
    sources, all_ = stack.leaves_from(), stack.dns.spf_all
    parts: dict[str, str] = {}
    for version in (4, 6):
        words = [f"ip{version}:{_short(source)}" for source in sources if source.version == version]
        for index, chunk in enumerate(_chunks(words), 1):
            number = "" if index == 1 else f"-{index}"
            parts[f"_spf{version}{number}.{stack.domain}"] = " ".join(("v=spf1", *chunk, all_))
    yield f"_spf.{stack.domain}", " ".join(("v=spf1", *(f"include:{name}" for name in parts), all_))
    yield from parts.items()


def _chunks(words: Iterable[str]) -> list[list[str]]:
    """Words in groups that make no longer record than is good."""
    chunks: list[list[str]] = [[]]
    for word in words:
        if sum(map(len, chunks[-1])) + len(chunks[-1]) + len(word) > SPF_LENGTH - len("v=spf1 ~all "):
            chunks.append([])
        chunks[-1].append(word)
    return chunks


def _short(source: IPAddress | IPNetwork) -> str:
    return str(source).removesuffix("/32" if source.version == 4 else "/128")
