"""The ground that every part of the model stands on: immutable values, names, problems."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import idna
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
_ATEXT = frozenset("abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-/=?^_`{|}~")
"""Letters of an Atom (RFC 5322 section 3.2.3), in lower case."""
_SYNTAX = {
    "*": "stands for all other addresses of a domain, and only alone",
    "#": "begins a comment in the tables that programs read",
    "%": "routes a mail on (user%host) where a program still knows that",
    "!": "routes a mail on (host!user) where a program still knows that",
}
"""Letters of an Atom that an address of the stack itself may not have, and why."""
ACCOUNT_LETTERS, LOCAL_LETTERS, ADDRESS_LETTERS, DOMAIN_LETTERS = 63, 64, 254, 253
"""The most letters: of a local part and of a path (RFC 5321 section 4.5.3.1), of a name (RFC 1035 section 2.3.4)."""


def to_ascii(value: str) -> str:
    """A name as DNS has it: letters that are not ASCII by IDNA2008 (RFC 5891), which changes nothing but the case.

    IDNA2003 would make other names of some: strasse of straße, which may belong to somebody else.
    """
    name = unicodedata.normalize("NFC", value.lower())
    if name.isascii():
        return name
    try:
        return idna.encode(name, strict=True).decode()
    except idna.IDNAError as error:
        raise ValueError(f"{value!r} is not an international domain name (RFC 5891): {error}") from None


def to_unicode(name: str) -> str:
    """A domain as users type it, in NFC; as it is, where it has no other form."""
    try:
        return idna.decode(name)
    except idna.IDNAError:
        return name


def _dns_name(value: object) -> str:
    """A DNS name in lower case without the trailing dot (RFC 1035 section 2.3.1, RFC 5891 for U-labels)."""
    if not isinstance(value, str):
        raise ValueError("must be a DNS name")
    name = to_ascii(value.removesuffix("."))
    if not all(map(_LABEL.match, name.split("."))):
        longest = max(map(len, name.split(".")))
        why = f": {longest} letters between two dots, and 63 are the most" if longest > 63 else ""
        form = "labels of letters, digits and hyphens, joined by dots"
        raise ValueError(f"{value!r} is not a DNS name ({form}){why}")
    if len(name) > DOMAIN_LETTERS:
        raise ValueError(f"{value!r} has {len(name)} letters, and {DOMAIN_LETTERS} are the most in a DNS name")
    return name


def _host_name(value: object) -> str:
    """The name of a host or of a mail domain (RFC 1123 section 2.1, RFC 5321 section 2.3.5): none has a _."""
    name = _dns_name(value)
    if "_" in name:
        raise ValueError(f"{value!r} has a _, which no name of a host or of a mail domain has: nobody would certify it")
    if name.rpartition(".")[2].isdigit():
        raise ValueError(f"{value!r} ends in a number, as only addresses do: it must be a name")
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
    if isinstance(value, str) and len(value) > ACCOUNT_LETTERS:
        raise ValueError(f"{value!r} has {len(value)} letters, and {ACCOUNT_LETTERS} are the most")
    if not isinstance(value, str) or not _ACCOUNT.match(value) or not value[-1].isalnum():
        raise ValueError(f"{value!r} must be small letters and digits, with single dots, - or _ between them")
    return value


def _any_local_part(value: object) -> str:
    """The part of an address before the @ (RFC 5321 section 4.1.2, Dot-string), in lower case."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not the local part of an address: put it in quotes")
    local, told = value.lower(), f"{value!r} cannot be the local part of an address:"
    if not local:
        raise ValueError("is empty: no address begins with the @")
    if "@" in local:
        raise ValueError(f"{value!r} is an address: write what stands before the @ alone")
    if len(local) > LOCAL_LETTERS:
        raise ValueError(f"{told} it has {len(local)} letters, and {LOCAL_LETTERS} are the most")
    if not local.isascii():
        raise ValueError(f"{told} it has letters that are not ASCII, which this service takes in domains alone")
    if strange := sorted(set(local) - _ATEXT - {"."}):
        raise ValueError(f"{told} it has {' '.join(map(repr, strange))}")
    if not all(local.split(".")):
        raise ValueError(f"{told} a dot stands between two letters, and this one does not")
    return local


def _local_part(value: object) -> str:
    """A local part to which mail can be brought: Postfix takes none that begins as an option does (allow_min_user)."""
    local = _any_local_part(value)
    if local.startswith("-"):
        raise ValueError(f"{value!r} cannot be the local part of an address: Postfix takes none that begins with -")
    return local


def _own_local_part(value: object) -> str:
    """A local part of an address of the stack: none that a reader of tables, or of addresses, takes for syntax."""
    local = _local_part(value)
    for letter, meaning in _SYNTAX.items():
        if letter in local:
            raise ValueError(f"{value!r} cannot be the local part of an address here: {letter} {meaning}")
    return local


def _joined(value: object, local_part: Callable[[object], str]) -> str:
    if not isinstance(value, str) or value.count("@") != 1:
        raise ValueError(f"{value!r} is not a mail address (local-part@domain)")
    local, domain = value.split("@")
    address = f"{local_part(local)}@{_dns_name(domain)}"
    if len(address) > ADDRESS_LETTERS:
        raise ValueError(f"{value!r} has {len(address)} letters, and {ADDRESS_LETTERS} are the most in a mail address")
    return address


def _address(value: object) -> str:
    """A full mail address (RFC 5321 section 4.1.2, without quoted local parts), in lower case."""
    return _joined(value, _local_part)


def _own_address(value: object) -> str:
    """A full mail address in a domain of the stack."""
    return _joined(value, _own_local_part)


def _sender(value: object) -> str:
    """A mail address, as strange as senders may have it, or a domain: all addresses in it and below it."""
    return _joined(value, _any_local_part) if isinstance(value, str) and "@" in value else _dns_name(value)


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
HostName = Annotated[str, BeforeValidator(_host_name)]
Label = Annotated[str, AfterValidator(_label)]
Selector = Annotated[str, AfterValidator(_selector)]
AccountName = Annotated[str, BeforeValidator(_account)]
LocalPart = Annotated[str, BeforeValidator(_local_part)]
MailAddress = Annotated[str, BeforeValidator(_address)]
OwnAddress = Annotated[str, BeforeValidator(_own_address)]
Sender = Annotated[str, BeforeValidator(_sender)]
