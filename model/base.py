"""The ground that every part of the model stands on: immutable values, names, problems."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, IPvAnyAddress, IPvAnyNetwork

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Frozen(BaseModel):
    """A value that never changes after it was read, and that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


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
_ACCOUNT = re.compile(r"^[a-z0-9]([a-z0-9_-]|\.(?!\.))*$")
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


def _account(value: object) -> str:
    """The name of an account: a Dot-string (RFC 5321 section 4.1.2) of letters that are safe in paths, maps and logins.

    No ``+``, which begins a subaddress; no dot or other sign at an end, where paths and shells read more into it.
    """
    if isinstance(value, str) and "@" in value:
        local, _, domain = value.partition("@")
        advice = f"name the account {local}, and let an alias of that name lead to it in domains.{domain}"
        raise ValueError(f"{value!r} is an address: {advice}")
    if not isinstance(value, str) or len(value) > 63 or not _ACCOUNT.match(value) or not value[-1].isalnum():
        raise ValueError(f"{value!r} must be small letters and digits, with single dots, - or _ between them")
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


def _ip_address(value: object) -> object:
    """An address as text: a number would be taken for one too (RFC 791 section 3.2, RFC 4291 section 2.2)."""
    if isinstance(value, IPAddress):
        return value
    try:
        return ipaddress.ip_address(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError(f"{value!r} is not an IP address: write it as 192.0.2.1 or 2001:db8::1") from None


def _ip_network(value: object) -> object:
    """A network as text, which no bits of a host may follow (RFC 4632 section 3.1, RFC 4291 section 2.3)."""
    if isinstance(value, IPNetwork):
        return value
    try:
        interface = ipaddress.ip_interface(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError(f"{value!r} is not a network: write it as 192.0.2.0/24 or 2001:db8::/32") from None
    if interface.ip != interface.network.network_address:
        single = f"{interface.ip}/{interface.max_prefixlen}"
        told = f"{value} is not the beginning of a network: write {interface.network}"
        raise ValueError(f"{told}, or {single} for it alone")
    return interface.network


def matching(pattern: str, told: str) -> AfterValidator:
    """Takes texts of a form alone, and says in words which."""

    def match(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(told)
        return value

    return AfterValidator(match)


AnyAddress = Annotated[IPvAnyAddress, BeforeValidator(_ip_address)]
AnyNetwork = Annotated[IPvAnyNetwork, BeforeValidator(_ip_network)]
DnsName = Annotated[str, BeforeValidator(_dns_name)]
Label = Annotated[str, AfterValidator(_label)]
Selector = Annotated[str, AfterValidator(_selector)]
AccountName = Annotated[str, BeforeValidator(_account)]
LocalPart = Annotated[str, BeforeValidator(_local_part)]
MailAddress = Annotated[str, BeforeValidator(_address)]
Sender = Annotated[str, BeforeValidator(_sender)]
