"""Making keys: what is missing is made, what is there is kept.

Every private key is made on the operator's machine and goes into the stack file as a Pulumi secret, so that losing
the Pulumi state loses no key, and preview, rendering and TLSA records know the public halves.
"""

from __future__ import annotations

import base64
import datetime as dt
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from model.base import Problem
from model.keys import HostPrivateKeys, HostPublicKeys, PrivateKeys, PublicKeys
from model.stack import Host, Stack

AUTHORITY_YEARS = 20
CERTIFICATE_DAYS = 825
RENEW_BEFORE_DAYS = 275
RSPAMD_ALPHABET = "ybndrfg8ejkmcpqxot1uwisza345h769"

_PRIVATE_PEM = serialization.PrivateFormat.PKCS8
_PLAIN = serialization.NoEncryption()


@dataclass
class KeyRing:
    """The keys of a stack while they are being completed, and a sentence for each that was made."""

    public: dict[str, Any]
    private: dict[str, Any]
    made: list[str] = field(default_factory=list)

    def pair(
        self,
        public: dict[str, Any],
        private: dict[str, Any],
        name: str,
        what: str,
        make: Callable[[], str],
        public_of: Callable[[str], str],
    ) -> None:
        """Makes a private key that is missing, and its public half wherever that does not follow from it."""
        if not private.get(name):
            private[name] = make()
            self.made.append(what)
        elif public.get(name) != public_of(private[name]):
            self.made.append(f"public half of the {what}")
        public[name] = public_of(private[name])


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    return key.private_bytes(serialization.Encoding.PEM, _PRIVATE_PEM, _PLAIN).decode()


def tls_key() -> str:
    """A key for TLS, on the curve P-256, in PEM."""
    return _pem(ec.generate_private_key(ec.SECP256R1()))


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def new_authority(name: str, key_pem: str = "") -> tuple[str, str]:
    """A certificate authority, for a new key or for one that is there: (certificate, key) in PEM."""
    key = serialization.load_pem_private_key((key_pem or tls_key()).encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key of the stack's authority is an elliptic curve key")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority {_now():%Y-%m-%d %H:%M:%S}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - dt.timedelta(hours=1))
        .not_valid_after(_now() + dt.timedelta(days=365 * AUTHORITY_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        # Python 3.13 refuses an authority whose key usage does not say so (RFC 5280 section 4.2.1.3).
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), _pem(key)


def _key_usage(**used: bool) -> x509.KeyUsage:
    kinds = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    more = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{kind: used.get(kind, False) for kind in (*kinds, *more)})


def sign_certificate(names: Sequence[str], key_pem: str, authority_pem: str, authority_key_pem: str) -> str:
    """A certificate for a server and client of these names by the stack's authority, in PEM."""
    key = serialization.load_pem_private_key(key_pem.encode(), None)
    authority_key = serialization.load_pem_private_key(authority_key_pem.encode(), None)
    authority = x509.load_pem_x509_certificate(authority_pem.encode())
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey) or not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the stack's TLS keys are elliptic curve keys")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - dt.timedelta(hours=1))
        .not_valid_after(_now() + dt.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def certifies(certificate_pem: str, key_pem: str) -> bool:
    """Whether a certificate is for this private key."""
    key = serialization.load_pem_private_key(key_pem.encode(), None).public_key()
    return bool(certificate_pem) and x509.load_pem_x509_certificate(certificate_pem.encode()).public_key() == key


def certificate_serves(certificate_pem: str, names: Sequence[str], authority_pem: str) -> bool:
    """Whether a certificate covers exactly these names, is by this authority, and lasts long enough still."""
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority_pem.encode()))
    except Exception:  # noqa: BLE001 (the library names no common base for its reasons)
        return False
    lasts = certificate.not_valid_after_utc - _now() > dt.timedelta(days=RENEW_BEFORE_DAYS)
    return lasts and _names_in(certificate_pem) == set(names)


def certificates_without_names(stack: Stack) -> Iterator[Problem]:
    """Hosts that serve under names which their certificate does not hold yet: a domain was added, a role moved."""
    for host in stack.all_hosts.values():
        public = stack.keys.public.hosts.get(host.name)
        # One that is missing altogether is told by `missing_keys`.
        if public and public.certificate:
            missing = set(stack.certificate_names(host)) - _names_in(public.certificate)
            if missing:
                yield Problem(
                    f"keys.public.hosts.{host.name}.certificate",
                    f"does not hold {', '.join(sorted(missing))} of {host.name}: run make keys STACK={stack.name}",
                )


def _names_in(certificate_pem: str) -> set[str]:
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(alternative.get_values_for_type(x509.DNSName))


def ssh_key(comment: str) -> tuple[str, str]:
    """An Ed25519 SSH key: (public as in authorized_keys, private in OpenSSH's format)."""
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, _PLAIN).decode()
    return ssh_public(private, comment), private


def ssh_public(private: str, comment: str) -> str:
    """The public half of an SSH key, as in authorized_keys."""
    key = serialization.load_ssh_private_key(private.encode(), None).public_key()
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"{text.decode()} {comment}"


def _dkim_key() -> str:
    """A private RSA key of 2048 bits in PEM (RFC 8301 section 3.2)."""
    return _pem(rsa.generate_private_key(public_exponent=65537, key_size=2048))


def _dkim_public(private: str) -> str:
    """The public half of a DKIM key, in base64 as its record has it."""
    key = serialization.load_pem_private_key(private.encode(), None).public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(der).decode()


def rspamd_base32(data: bytes) -> str:
    """rspamd's own base32: the z-base-32 alphabet, five bits at a time from the low end."""
    number, bits = int.from_bytes(data, "little"), len(data) * 8
    return "".join(RSPAMD_ALPHABET[number >> shift & 31] for shift in range(0, bits, 5))


def _rspamd_key() -> str:
    return rspamd_base32(x25519.X25519PrivateKey.generate().private_bytes_raw())


def _rspamd_public(private: str) -> str:
    number = sum(RSPAMD_ALPHABET.index(letter) << 5 * place for place, letter in enumerate(private))
    key = x25519.X25519PrivateKey.from_private_bytes(number.to_bytes(32, "little"))
    return rspamd_base32(key.public_key().public_bytes_raw())


def complete(stack: Stack, public: PublicKeys, private: PrivateKeys) -> KeyRing:
    """All keys that a stack needs: those given, and new ones for what is missing.

    Public halves follow from private ones, which alone tell what a key is: a run that was cut, or a merge that took
    one half, leaves nothing that the next run does not mend. A host's certificate is signed anew, for the same key,
    when its names changed or a third of its life is left.
    """
    ring = KeyRing(public.model_dump(), private.model_dump())

    def missing(keys: dict[str, Any], name: str, make: Callable[[], str]) -> None:
        if not keys.get(name):
            keys[name] = make()
            ring.made.append(f"{name.replace('_', ' ')} secret")

    if not ring.private["authority"]:
        ring.public["authority"], ring.private["authority"] = new_authority(stack.domain)
        ring.made.append("certificate authority")
    elif not certifies(ring.public["authority"], ring.private["authority"]):
        ring.public["authority"], _ = new_authority(stack.domain, ring.private["authority"])
        ring.made.append("certificate of the authority")
    for host in stack.all_hosts.values():
        _complete_host(stack, host, ring)
    for domain in stack.sending_domains:
        shown, kept = (half["dkim"].setdefault(domain, {}) for half in (ring.public, ring.private))
        for selector in sorted({stack.dkim.selector, *stack.dkim.published}):
            ring.pair(shown, kept, selector, f"DKIM key {selector} of {domain}", _dkim_key, _dkim_public)
    ring.pair(ring.public, ring.private, "rspamd", "key of the spam scanners", _rspamd_key, _rspamd_public)
    for name in ("srs", "replication", "version_key"):
        missing(ring.private, name, lambda: secrets.token_urlsafe(24))
    # Roundcube's des_key has to have 24 characters.
    missing(ring.private, "session", lambda: secrets.token_urlsafe(18))
    return ring


def _complete_host(stack: Stack, host: Host, ring: KeyRing) -> None:
    public = ring.public["hosts"].get(host.name) or {"ssh": "", "certificate": ""}
    private = ring.private["hosts"].get(host.name) or {"ssh": "", "tls": ""}
    # A host that existed before has a key of its own, which stands at existing.host_key.
    if host.machine is not None:
        ring.pair(
            public,
            private,
            "ssh",
            f"SSH host key of {host.name}",
            lambda: ssh_key(host.name)[1],
            lambda key: ssh_public(key, host.name),
        )
    if not private["tls"]:
        private["tls"] = tls_key()
        ring.made.append(f"TLS key of {host.name}")
    if stack.acme_names(host) and host.fqdn not in ring.private["tsig"]:
        # By this the name server knows the host, which may change its own challenges.
        ring.private["tsig"][host.fqdn] = base64.b64encode(secrets.token_bytes(32)).decode()
        ring.made.append(f"TSIG key {host.fqdn}")
    names = stack.certificate_names(host)
    signer = ring.public["authority"]
    certificate = public["certificate"]
    if not certifies(certificate, private["tls"]) or not certificate_serves(certificate, names, signer):
        public["certificate"] = sign_certificate(names, private["tls"], signer, ring.private["authority"])
        ring.made.append(f"certificate of {host.name}")
    ring.public["hosts"][host.name] = HostPublicKeys(**public).model_dump()
    ring.private["hosts"][host.name] = HostPrivateKeys(**private).model_dump()
