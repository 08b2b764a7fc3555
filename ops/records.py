"""Looks at published records before a run: what it would delete, and what it is told to take over."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from model.stack import Stack
from ops.pulumi import OperatorError, Project
from services.zones import rrsets

RRSET = "pulumi-python:dynamic/dns:RRset"
SHOWN = 5

Identity = tuple[str, str]
"""Name, without the trailing dot, and type."""


def published(state: dict[str, Any]) -> dict[str, set[Identity]]:
    """Zone to the RRsets that the stack has published there, from an exported Pulumi state."""
    found: dict[str, set[Identity]] = defaultdict(set)
    for resource in (state.get("deployment") or {}).get("resources") or []:
        if resource["type"] == RRSET and not resource.get("delete"):
            values = resource.get("outputs") or {}
            found[values["zone"].rstrip(".")].add((values["name"].rstrip("."), values["type"]))
    return dict(found)


def too_many_deletions(stack: Stack, before: dict[str, set[Identity]], allowed: Collection[str]) -> Iterator[str]:
    """A sentence for each zone of which more would be deleted than the stack lets pass; ``allowed`` zones pass."""
    if unknown := set(allowed) - set(before):
        raise OperatorError(f"DELETE={','.join(sorted(unknown))}: the stack has published nothing in such a zone")
    brake = stack.dns.deletions
    # In whatever zone: an RRset that moves to another is created there before it is deleted here.
    wanted = {(r.name, r.type) for r in rrsets(stack) if stack.dns.zones.get(r.zone) is not None}
    for zone, there in sorted(before.items()):
        gone = sorted(there - wanted)
        share = 100 * len(gone) / len(there)
        if zone not in allowed and len(there) >= brake.least and share > brake.share:
            shown = ", ".join(" ".join(identity) for identity in gone[:SHOWN])
            more = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
            yield (
                f"zone {zone}: {len(gone)} of {len(there)} RRsets would be deleted, {share:.0f} % where"
                f" dns.deletions.share lets {brake.share} % pass: {shown}{more}."
                f" If that is meant: make up STACK={stack.name} DELETE={zone}"
            )


def state_of(project: Project) -> dict[str, Any]:
    """The Pulumi state of a stack, as it is exported."""
    state: dict[str, Any] = json.loads(project.run("stack", "export") or "{}")
    return state


def adopted(stack: Stack, words: Iterable[str]) -> str:
    """The words of ADOPT=name/TYPE,…, each checked to be an RRset of the stack, as the program reads them.

    Raises `OperatorError` where one is not.
    """
    known = {f"{rrset.name}/{rrset.type}" for rrset in rrsets(stack)}
    chosen = []
    for word in words:
        name, _, kind = word.partition("/")
        chosen.append(f"{name.rstrip('.').lower()}/{kind.upper()}")
        if chosen[-1] not in known:
            raise OperatorError(
                f"ADOPT={word}: the stack publishes no such RRset; say name/TYPE, as {sorted(known)[0]}"
            )
    return ",".join(chosen)
