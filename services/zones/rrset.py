"""RRsets, and how they are collected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from model.base import IPAddress
from model.stack import Stack

Phase = Literal["internal", "hosts", "service"]
STRING = 255
"""Longest character-string of a TXT record, in octets (RFC 1035 section 3.3)."""


@dataclass(frozen=True)
class RRset:
    """All records of one name and type (RFC 2181 section 5). Names have no trailing dot, values are as in a zone file.

    ``phase`` says when it is published: internal names first, then the hosts, then what leads the world to them.
    ``path`` is the place in the stack file that it comes from.
    """

    name: str
    type: str
    ttl: int
    records: tuple[str, ...]
    zone: str
    phase: Phase
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.type}"

    @property
    def leads_to(self) -> tuple[str, ...]:
        """The names that whoever reads these records asks for next, without the trailing dot."""
        if self.type in ("CNAME", "PTR", "MX", "SRV"):
            found = [record.rpartition(" ")[2] for record in self.records]
        elif self.type == "TXT":
            found = [name for record in self.records for name in re.findall(r"\binclude:([^\s\"]+)", record)]
        else:
            found = []
        return tuple(name.rstrip(".") for name in found if name != ".")


def text(value: str) -> str:
    """A TXT value as strings of at most 255 octets. Readers join them without a space (RFC 7208 section 3.3)."""
    parts = [value[start : start + STRING] for start in range(0, len(value), STRING)] or [""]
    return " ".join('"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"' for part in parts)


class Records:
    """Collects RRsets. Records of names that no zone of the stack holds are somebody else's."""

    def __init__(self, stack: Stack, phase: Phase) -> None:
        self.stack, self.phase = stack, phase
        self.found: list[RRset] = []

    def add(self, path: str, name: str, kind: str, ttl: int, records: Iterable[str]) -> None:
        values, zone = tuple(dict.fromkeys(records)), self.stack.zone_of(name)
        if values and zone:
            self.found.append(RRset(name, kind, ttl, values, zone, self.phase, path))

    def texts(self, path: str, name: str, ttl: int, *values: str) -> None:
        """TXT."""
        self.add(path, name, "TXT", ttl, map(text, values))

    def addresses(self, path: str, name: str, ttl: int, addresses: Iterable[IPAddress]) -> None:
        """A and AAAA."""
        listed = list(addresses)
        for kind, version in (("A", 4), ("AAAA", 6)):
            self.add(path, name, kind, ttl, (str(a) for a in listed if a.version == version))
