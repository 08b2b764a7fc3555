"""Published records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import pulumi

from model.stack import Stack
from providers.rrset import RRset as Published
from services.zones import RRset

ADOPT = "POSTHORN_ADOPT"
"""Variable of the environment: RRsets, as name/TYPE, that this run takes over where others stand already."""


class Zones(pulumi.ComponentResource):
    """RRsets that are published together. Those in a zone without a server are left to its operator.

    Each RRset depends on those at the names that it leads to, so that nothing ever leads to what is not there yet, or
    not any more: what is published first is removed last.
    """

    def __init__(
        self,
        name: str,
        stack: Stack,
        records: Iterable[RRset],
        after: Sequence[pulumi.Resource] = (),
        known: Zones | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Publishes ``records`` once the resources of ``after`` are there; ``known`` are zones published before."""
        super().__init__("posthorn:index:Zones", name, None, opts)
        self._stack, self._after = stack, after
        self._adopted = os.environ.get(ADOPT, "").split(",")
        self._published: dict[str, list[pulumi.Resource]] = dict(known._published) if known else {}
        self._waiting: dict[str, list[RRset]] = {}
        for rrset in records:
            if stack.dns.zones.get(rrset.zone) is not None:
                self._waiting.setdefault(rrset.name, []).append(rrset)
        while self._waiting:
            self._publish(next(iter(self._waiting)))
        self.register_outputs({})

    def _publish(self, name: str) -> None:
        """Publishes all RRsets of a name that are still to come, those at names that they lead to before them."""
        for rrset in self._waiting.pop(name, []):
            for target in rrset.leads_to:
                self._publish(target)
            behind = [resource for target in rrset.leads_to for resource in self._published.get(target, [])]
            self._published.setdefault(name, []).append(self._resource(rrset, [*self._after, *behind]))

    def _resource(self, rrset: RRset, depends_on: list[pulumi.Resource]) -> pulumi.Resource:
        server = self._stack.dns.servers[str(self._stack.dns.zones[rrset.zone])]
        return Published(
            f"{rrset.name}-{rrset.type}",
            server=str(server.address),
            port=server.port,
            zone=f"{rrset.zone}.",
            name=f"{rrset.name}.",
            type=rrset.type,
            ttl=rrset.ttl,
            records=sorted(rrset.records),
            key_name=server.key,
            algorithm=server.algorithm,
            adopt=f"{rrset.name}/{rrset.type}" in self._adopted,
            opts=pulumi.ResourceOptions(parent=self, depends_on=depends_on),
        )
