"""Certificates: how long they last, whose they are, and whether they are the keys that the stack knows."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from check.finding import Finding, Findings, Place
from model.stack import Host, Stack

EXPIRES_DAYS, SOON_DAYS = 7.0, 21.0
"""Too late to be calm, and late enough to ask why nobody renewed it: a public one is renewed with a month to go."""
EXPIRES_SHARE, SOON_SHARE = 1 / 12, 1 / 4
"""The same of its life, for those that live for days."""


@lru_cache(maxsize=256)
def of_der(data: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(data)


@lru_cache(maxsize=256)
def of_pem(text: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(text.encode())


def public_key(certificate: x509.Certificate) -> bytes:
    """The SubjectPublicKeyInfo, in DER."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def days_left(certificate: x509.Certificate, now: dt.datetime) -> float:
    return (certificate.not_valid_after_utc - now) / dt.timedelta(days=1)


def by_authority(certificate: x509.Certificate, stack: Stack) -> bool:
    """Whether the stack's own authority signed it, or the one that it follows or that follows it."""
    believed = stack.keys.public.believed
    authorities = x509.load_pem_x509_certificates(believed.encode()) if believed else []
    return any(_by(certificate, authority) for authority in authorities)


def _by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def renewal(stack: Stack, certificate: x509.Certificate) -> str:
    """How a certificate comes to be renewed."""
    if by_authority(certificate, stack):
        return f"make keys STACK={stack.name} signs it anew, make up STACK={stack.name} brings it there"
    return "see why the host does not renew it: journalctl -u 'posthorn-*' on it"


def certificate_advice(stack: Stack, *hosts: Host) -> str:
    """What to do where no public certificate comes: most often a domain is new, and its name server was not told."""
    advice = f"give the name server what make update-keys STACK={stack.name} prints, if it has not got that"
    again = "systemctl start posthorn-certificate asks again at once"
    return f"{advice}; {again}, journalctl -u posthorn-certificate on {', '.join(host.name for host in hosts)} says why"


def judge_days(place: Place, stack: Stack, certificate: x509.Certificate, now: dt.datetime, what: str) -> Findings:
    """How long a certificate still lasts."""
    left = days_left(certificate, now)
    life = (certificate.not_valid_after_utc - certificate.not_valid_before_utc) / dt.timedelta(days=1)
    if left < 0:
        yield place.wrong(f"{what} ended {-left:.0f} days ago", renewal(stack, certificate))
    elif left < min(EXPIRES_DAYS, life * EXPIRES_SHARE):
        yield place.wrong(f"{what} ends in {left:.0f} days", renewal(stack, certificate))
    elif left < min(SOON_DAYS, life * SOON_SHARE):
        yield place.better(f"{what} ends in {left:.0f} days", renewal(stack, certificate))
    else:
        yield place.good(f"{what} lasts {left:.0f} days")


def stack_keys(stack: Stack, hosts: Iterable[Host]) -> Mapping[bytes, str]:
    """The public keys that hosts should serve with, as the stack knows them."""
    known = stack.keys.public.hosts
    return {public_key(of_pem(known[host.name].certificate)): host.name for host in hosts if host.name in known}


def judge_rolls(stack: Stack) -> Findings:
    """Keys that are being replaced: somebody who takes a key away wants the last step not to be forgotten."""
    public = stack.keys.public
    if public.next_authority or public.previous_authority:
        yield _half_done(stack, "authority", "authority", "the stack's authority")
    for name, host in public.hosts.items():
        if name in stack.hosts and (host.next or host.previous):
            yield _half_done(stack, name, f"tls/{name}", "its TLS key")


def _half_done(stack: Stack, where: str, word: str, what: str) -> Finding:
    advice = f"make keys STACK={stack.name} ROLL={word} says how it goes on (docs/keys.md)"
    return Place("hosts", where).better(f"{what} is being replaced", advice)


def matches_tlsa(record: str, certificate: x509.Certificate) -> bool:
    """Whether a certificate is the one that a TLSA record means (RFC 6698 section 2.1): usage, selector, matching."""
    _, selector, matching, *data = record.split()
    chosen = public_key(certificate) if selector == "1" else certificate.public_bytes(Encoding.DER)
    digests = {"0": lambda: chosen.hex(), "1": lambda: hashlib.sha256(chosen).hexdigest()}
    digests["2"] = lambda: hashlib.sha512(chosen).hexdigest()
    return matching in digests and digests[matching]() == "".join(data).lower()
