"""Keys of a stack: public halves in clear, private halves as one Pulumi secret.

``make keys`` makes what is missing and writes both into the stack file. The private halves are one JSON text in
one ``secure:`` value, so that any of Pulumi's secrets providers can hold it and one call writes it; which key was
made or changed is seen from the public halves.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Annotated

from pydantic import BeforeValidator, Field

from model.base import Frozen

PLACEHOLDER = "SECRET"
GIVEN_UP = ("controller",)
"""Keys that were made once, that stack files may hold still, and that nothing reads."""


class HostPublicKeys(Frozen):
    """``ssh``: the host key as in authorized_keys, empty for a host that existed before; ``certificate``: its TLS
    certificate by the stack's authority.

    While the TLS key is replaced, TLSA records name the ``next`` key or the ``previous`` one too, each by the SHA-256
    of its SubjectPublicKeyInfo (RFC 7671 section 8.1).
    """

    ssh: str
    certificate: str
    next: str = ""
    previous: str = ""


class PublicKeys(Frozen):
    """What anybody may know."""

    authority: str = ""
    """The certificate of the stack's own authority, in PEM."""
    next_authority: str = ""
    """The one to come, while it is replaced: believed, and signs nothing yet."""
    previous_authority: str = ""
    """The one before, while it is replaced: believed, and signs nothing any more."""
    hosts: dict[str, HostPublicKeys] = {}
    dkim: dict[str, dict[str, str]] = {}
    """Domain to selector to public key (base64 of the SubjectPublicKeyInfo, RFC 6376 section 3.6.1)."""
    rspamd: str = ""
    """The scanners' public key, in rspamd's base32."""

    @property
    def believed(self) -> str:
        """The authorities that hosts believe about one another, in PEM: one, but while it is replaced."""
        return self.authority + self.next_authority + self.previous_authority


class HostPrivateKeys(Frozen):
    """``next``: the TLS key to come, while it is replaced."""

    ssh: str
    tls: str
    next: str = ""


class PrivateKeys(Frozen):
    """What only the host that needs it gets. ``version_key`` turns secrets into versions that tell nothing."""

    authority: str = ""
    next_authority: str = ""
    hosts: dict[str, HostPrivateKeys] = {}
    dkim: dict[str, dict[str, str]] = {}
    rspamd: str = ""
    srs: str = ""
    next_srs: str = ""
    previous_srs: str = ""
    session: str = ""
    replication: str = ""
    version_key: str = ""
    tsig: dict[str, str] = {}
    """TSIG key name to its secret in base64."""

    @property
    def srs_known(self) -> str:
        """The secrets of forwarded senders, one a line: the first signs, and what any of them signed is known."""
        return "".join(f"{secret}\n" for secret in (self.srs, self.next_srs, self.previous_srs) if secret)


def _read(value: object) -> object:
    """Private halves as `Keys.private` takes them, from the JSON text that the stack file has encrypted."""
    if value == PLACEHOLDER:
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("is not what make keys wrote: take it from an earlier commit") from None
    return {name: key for name, key in found.items() if name not in GIVEN_UP} if isinstance(found, dict) else found


class Keys(Frozen):
    """Both halves. ``private`` is None where no passphrase was given: rendering then writes placeholders."""

    public: PublicKeys = PublicKeys()
    private: Annotated[PrivateKeys | None, BeforeValidator(_read)] = Field(default=None, repr=False)

    @classmethod
    def parse_private(cls, text: str) -> PrivateKeys:
        """Reads the JSON text of the private halves; without one, there are none yet."""
        return cls.model_validate({"private": text or {}}).private or PrivateKeys()

    def version(self, content: str) -> str:
        """A name for a secret's content: equal for equal contents, and of no use to guess it (HMAC, RFC 2104)."""
        if self.private is None:
            return PLACEHOLDER
        return hmac.new(self.private.version_key.encode(), content.encode(), hashlib.sha256).hexdigest()[:20]
