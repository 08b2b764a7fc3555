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
    """``ssh``: the host key as in authorized_keys; ``certificate``: its TLS certificate by the stack's authority."""

    ssh: str
    certificate: str


class PublicKeys(Frozen):
    """What anybody may know."""

    authority: str = ""
    """The certificate of the stack's own authority, in PEM."""
    hosts: dict[str, HostPublicKeys] = {}
    dkim: dict[str, dict[str, str]] = {}
    """Domain to selector to public key (base64 of the SubjectPublicKeyInfo, RFC 6376 section 3.6.1)."""
    rspamd: str = ""
    """The scanners' public key, in rspamd's base32."""


class HostPrivateKeys(Frozen):
    ssh: str
    tls: str


class PrivateKeys(Frozen):
    """What only the host that needs it gets. ``version_key`` turns secrets into versions that tell nothing."""

    authority: str = ""
    hosts: dict[str, HostPrivateKeys] = {}
    dkim: dict[str, dict[str, str]] = {}
    rspamd: str = ""
    srs: str = ""
    session: str = ""
    replication: str = ""
    version_key: str = ""
    tsig: dict[str, str] = {}
    """TSIG key name to its secret in base64."""


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
