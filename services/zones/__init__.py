"""Every DNS record of a stack, derived from the model: nothing is typed twice."""

from __future__ import annotations

from model.base import Problem
from model.stack import Stack
from services.zones.hosts import host_records, internal_records
from services.zones.mail import key_digest, key_records, service_records, tlsa_names
from services.zones.rrset import RRset, text
from services.zones.validators import problems_of, removed_from_dmarc
from services.zones.zone_file import zone_file

__all__ = [
    "RRset",
    "internal_records",
    "key_digest",
    "record_problems",
    "removed_from_dmarc",
    "rrsets",
    "text",
    "tlsa_names",
    "zone_files",
]


def rrsets(stack: Stack) -> tuple[RRset, ...]:
    """All RRsets of a stack, in the order in which they are published."""
    return (*internal_records(stack), *key_records(stack), *host_records(stack), *service_records(stack))


def record_problems(stack: Stack) -> list[Problem]:
    """Why a stack's records would be no good zones: every reason, at its path in the stack file."""
    return problems_of(rrsets(stack))


def zone_files(stack: Stack) -> dict[str, str]:
    """Zone to its records in standard syntax (RFC 1035 section 5), to be included below one's own SOA and NS."""
    found = rrsets(stack)
    return {zone: zone_file(zone, [rrset for rrset in found if rrset.zone == zone]) for zone in stack.dns.zones}
