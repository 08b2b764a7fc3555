"""Zone files: for name servers that take no updates, and for eyes."""

from __future__ import annotations

from collections.abc import Iterable

from services.zones.rrset import RRset


def zone_file(zone: str, rrsets: Iterable[RRset]) -> str:
    """The records of a zone in standard syntax (RFC 1035 section 5.1), parents before children."""
    lines = [
        f"; All records of the stack in {zone}. Its SOA and NS are its operator's:",
        "; $INCLUDE this file below them.",
        f"$ORIGIN {zone}.",
    ]
    for rrset in sorted(rrsets, key=lambda rrset: (tuple(reversed(rrset.name.split("."))), rrset.type)):
        owner = "@" if rrset.name == zone else rrset.name.removesuffix(f".{zone}")
        lines += [f"{owner} {rrset.ttl} IN {rrset.type} {record}" for record in rrset.records]
    return "\n".join(lines) + "\n"
