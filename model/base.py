"""The ground that every part of the model stands on: immutable values, names, problems."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Frozen(BaseModel):
    """A value that never changes after it was read, and that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong in a stack file: where it is, and what would be right."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class StackError(Exception):
    """A stack file that cannot be used. Carries every problem that was found, not the first alone."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = sorted(problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{source} is not valid, nothing was changed:\n{lines}")


_LABEL = re.compile(r"^(?!-)[a-z0-9_-]{1,63}(?<!-)$")
_DOT_ATOM = re.compile(r"^[a-z0-9!#$%&'*/=?^_`{|}~+-]+(\.[a-z0-9!#$%&'*/=?^_`{|}~+-]+)*$")


def _dns_name(value: object) -> str:
    """A DNS name in lower case without the trailing dot (RFC 1035 section 2.3.1, RFC 5891 for U-labels)."""
    if not isinstance(value, str):
        raise ValueError("must be a DNS name")
    name = value.rstrip(".").lower()
    if not name.isascii():
        name = name.encode("idna").decode()
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.match(label) for label in labels):
        raise ValueError(f"{value!r} is not a DNS name (labels of letters, digits and hyphens, joined by dots)")
    return name


def _label(value: str) -> str:
    if not _LABEL.match(value) or "_" in value:
        raise ValueError(f"{value!r} must be one DNS label: small letters, digits and hyphens")
    return value


def _local_part(value: object) -> str:
    """The part of an address before the @ (RFC 5321 section 4.1.2, Dot-string), in lower case."""
    if not isinstance(value, str) or len(value) > 64 or not _DOT_ATOM.match(value.lower()):
        raise ValueError(f"{value!r} is not the local part of an address (letters, digits and !#$%&'*/=?^_`{{|}}~+-.)")
    return value.lower()


def _address(value: object) -> str:
    """A full mail address (RFC 5321 section 4.1.2, without quoted local parts), in lower case."""
    if not isinstance(value, str) or value.count("@") != 1:
        raise ValueError(f"{value!r} is not a mail address (local-part@domain)")
    local, domain = value.split("@")
    return f"{_local_part(local)}@{_dns_name(domain)}"


def _sender(value: object) -> str:
    """A mail address, or a domain: all addresses in it and below it."""
    return _address(value) if isinstance(value, str) and "@" in value else _dns_name(value)


def _selector(value: str) -> str:
    """A DKIM selector: one label, whose case is kept as it was chosen (RFC 6376 section 3.1)."""
    _label(value.lower())
    return value


DnsName = Annotated[str, BeforeValidator(_dns_name)]
Label = Annotated[str, AfterValidator(_label)]
Selector = Annotated[str, AfterValidator(_selector)]
LocalPart = Annotated[str, BeforeValidator(_local_part)]
MailAddress = Annotated[str, BeforeValidator(_address)]
Sender = Annotated[str, BeforeValidator(_sender)]
