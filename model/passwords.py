"""Passwords: hashes that Dovecot verifies, at a cost that a login may have; and passwords that can be hashed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, SecretStr

from model.keys import PLACEHOLDER

HASHED_BYTES = 72
"""What bcrypt hashes of a password, and no more."""
LOCKED = "!"
"""In place of a hash: no password is right."""


@dataclass(frozen=True)
class Scheme:
    """A kind of hash as Dovecot writes it: its form, whose groups are numbers, and what those may be."""

    form: str
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Below the least, Dovecot refuses every password; above the most, a login costs too much."""


BASE64 = r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
NUMBER = r"[1-9][0-9]*"


def _argon2(kind: str) -> Scheme:
    """RFC 9106, in the notation of its authors: hashes of 16, 24, 32 or 64 bytes. m is in KiB."""
    numbers = rf"m=(?P<m>{NUMBER}),t=(?P<t>{NUMBER}),p=(?P<p>{NUMBER})"
    of_hash = "|".join(rf"[A-Za-z0-9+/]{{{letters}}}" for letters in (22, 32, 43, 86))
    return Scheme(
        rf"\$argon2{kind}\$v=19\${numbers}\$[A-Za-z0-9+/]{{11,}}\$(?:{of_hash})",
        {"m": (8, 131072), "t": (1, 16), "p": (1, 16)},
    )


def _sha_crypt(number: int, letters: int) -> Scheme:
    """As in /etc/shadow (crypt(5)). Without a word of them, there are 5000 rounds."""
    rounds = rf"(?:rounds=(?P<rounds>{NUMBER})\$)?"
    form = rf"\${number}\${rounds}[^$:!*\\\s]{{1,16}}\$[./A-Za-z0-9]{{{letters}}}"
    return Scheme(form, {"rounds": (1000, 2000000)})


def _salted(letters: int) -> Scheme:
    """A hash and four or more bytes of salt, in base64 of so many letters or more."""
    return Scheme(rf"(?=.{{{letters},}}){BASE64}")


SCHEMES: Mapping[str, Scheme] = {
    "ARGON2ID": _argon2("id"),
    "ARGON2I": _argon2("i"),
    "BLF-CRYPT": Scheme(r"\$2[abxy]\$(?P<cost>[0-9]{2})\$[./A-Za-z0-9]{53}", {"cost": (4, 15)}),
    "SHA512-CRYPT": _sha_crypt(6, 86),
    "SHA256-CRYPT": _sha_crypt(5, 43),
    # Rounds, salt, StoredKey and ServerKey (RFC 5803). Dovecot takes 4096 rounds or more (RFC 7677).
    "SCRAM-SHA-256": Scheme(
        rf"(?P<rounds>{NUMBER}),(?=[^,]){BASE64}(?:,[A-Za-z0-9+/]{{43}}=){{2}}", {"rounds": (4096, 2000000)}
    ),
    "PBKDF2": Scheme(rf"\$1\$[^$:\s]+\$(?P<rounds>{NUMBER})\$[0-9A-Fa-f]{{40}}", {"rounds": (1, 2000000)}),
    "SSHA512": _salted(92),
    "SSHA256": _salted(48),
}
"""Salted hashes of today that Dovecot 2.3 and 2.4 both verify; what 2.4 calls weak, it refuses to."""
_HASH = re.compile(rf"\{{({'|'.join(SCHEMES)})\}}([^\s:]+)", re.IGNORECASE)


def _hash(value: SecretStr) -> SecretStr:
    """A password hash in Dovecot's notation, which a passwd-file can hold. The message never shows it."""
    text = value.get_secret_value()
    if text == PLACEHOLDER:
        return value
    found = _HASH.fullmatch(text)
    if not found:
        *others, last = (f"{{{scheme}}}" for scheme in SCHEMES)
        listed = f"{', '.join(others)} or {last}"
        raise ValueError(f"must be a hash: put here what make password prints (it may begin with {listed})")
    name, told = found[1].upper(), found[2]
    scheme = SCHEMES[name]
    parts = re.fullmatch(scheme.form, told)
    if not parts and told != LOCKED:
        raise ValueError(f"is no whole {{{name}}} hash: copy all of it, or put here what make password prints")
    for what, number in parts.groupdict().items() if parts else ():
        least, most = scheme.bounds[what]
        # Nobody needs the value of a number of a thousand digits.
        if number and not (len(number) <= len(str(most)) and least <= int(number) <= most):
            told = f"is a {{{name}}} hash with {what}={number[:20]}, and a login may cost {least} to {most}"
            raise ValueError(f"{told}: put here what make password prints")
    return value


PasswordHash = Annotated[SecretStr, AfterValidator(_hash)]


def _one_line(value: SecretStr) -> SecretStr:
    """A password that a line of a file can hold. The message never shows it."""
    text = value.get_secret_value()
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError("must be one line, without spaces at its ends: a longer one would say more than a password")
    return value


def _can_be_hashed(password: SecretStr) -> SecretStr:
    if len(password.get_secret_value().encode()) > HASHED_BYTES:
        raise ValueError(f"has more than {HASHED_BYTES} bytes: bcrypt hashes no more")
    return password


Password = Annotated[SecretStr, AfterValidator(_one_line), AfterValidator(_can_be_hashed)]
