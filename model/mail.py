"""Domains, accounts and aliases: who gets mail, and who may send it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

from model.base import (
    Frozen,
    HostName,
    LocalPart,
    OwnAddress,
    _address,
    _local_part,
    _own_local_part,
    matching,
)
from model.passwords import Password, PasswordHash

CATCH_ALL = "*"
DISCARD = "/dev/null"


@dataclass(frozen=True)
class Target:
    """Where an alias leads: an account, an address, or nowhere (``/dev/null``)."""

    text: str

    @property
    def discards(self) -> bool:
        return self.text == DISCARD

    @property
    def address(self) -> str | None:
        """The full address, when the target is one."""
        return self.text if "@" in self.text else None

    @property
    def account(self) -> str | None:
        """The account's name without its subaddress, when the target is an account."""
        return None if self.discards or self.address else self.text.split("+")[0]

    def __str__(self) -> str:
        return self.text


def _target(value: object) -> Target:
    if isinstance(value, Target):
        return value
    if not isinstance(value, str):
        raise ValueError("must be an account, an address or /dev/null")
    if value == DISCARD:
        return Target(value)
    return Target(_address(value) if "@" in value else _local_part(value))


def _alias_key(value: object) -> str:
    return CATCH_ALL if value == CATCH_ALL else _own_local_part(value)


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


AliasTarget = Annotated[Target, BeforeValidator(_target)]
LocalPartOrCatchAll = Annotated[str, BeforeValidator(_alias_key)]
Targets = Annotated[tuple[AliasTarget, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
SpfTerm = Annotated[
    str,
    matching(
        r'(include|a|mx|exists|ip4|ip6):[^\s"]+',
        "must be a term of SPF: write it as include:spf.example.net or ip4:198.51.100.0/24",
    ),
]
"""A mechanism that lets another sender pass (RFC 7208 section 5)."""


class Domain(Frozen):
    """A domain that the stack takes mail for.

    ``aliases`` maps a local part, or ``*`` for all others, to its targets. ``same_as`` makes every address of
    another domain valid here too.
    """

    aliases: dict[LocalPartOrCatchAll, Targets] = {}
    """Local part to where its mail goes: an account, an address, ``/dev/null``, or a list."""
    same_as: HostName | None = None
    """A domain all of whose addresses are valid here too."""
    sends: bool = True
    """False where mail is only taken: nobody may write as this domain, and its records say so to the world."""
    also_from: tuple[SpfTerm, ...] = ()
    """Others who send for it, as terms of SPF: ``include:spf.example.net``, ``ip4:198.51.100.0/24``."""
    texts: tuple[str, ...] = ()
    """Further TXT records at its name, as others ask for to prove that the domain is one's own."""


# Of nought Dovecot makes no limit at all; and it counts in bytes, of which 63 bits hold so many.
QUOTA = r"[1-9][0-9]{0,6}[MG]"
TOLD_QUOTA = "must be a whole number from 1 to 9999999 with M or G: write it as 500M or 5G"


class Account(Frozen):
    """A mailbox, and the right to submit mail. The password is kept as a hash in Dovecot's notation."""

    password: PasswordHash
    """The hash of it, as ``make password`` prints it."""
    quota: Annotated[str, matching(QUOTA, TOLD_QUOTA)] = "1G"
    """What the mailbox may hold, as 500M or 5G. The user is told at 80 and at 95 per cent."""
    send_as: tuple[OwnAddress, ...] = ()
    """Addresses that it may write as, beside those that lead to it."""


class MachineUser(Frozen):
    """A user for hosts that send their own mail, one for each group of hosts: submission only, no mailbox.

    The hosts need the password itself, so it stands here as a Pulumi secret.
    """

    password: Password
    """The password itself, as a Pulumi secret: the hosts need it."""
    mail_from: HostName
    """The domain of the envelope sender."""
    send_as: tuple[OwnAddress, ...] = ()
    """What programs of theirs write as, beside the names of the hosts themselves."""
    hosts: tuple[str, ...] = ()
    """Hosts with the role relay-client that are this user."""

    @property
    def sender(self) -> str:
        """The envelope sender: every domain has a postmaster (RFC 2142), who reads what comes back."""
        return f"postmaster@{self.mail_from}"


__all__ = ["Account", "Domain", "LocalPart", "MachineUser", "Target"]
