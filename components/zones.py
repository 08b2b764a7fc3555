"""Published records."""

from __future__ import annotations

from collections.abc import Iterable

import pulumi

from model.stack import Stack
from providers.rrset import RRset as Published
from services.zones import RRset


class Zones(pulumi.ComponentResource):
    """RRsets that are published together. Those in a zone without a server are left to its operator."""

    def __init__(
        self, name: str, stack: Stack, records: Iterable[RRset], opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("posthorn:index:Zones", name, None, opts)
        for rrset in records:
            server_name = stack.dns.zones.get(rrset.zone)
            if server_name is None:
                continue
            server = stack.dns.servers[server_name]
            Published(
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
                opts=pulumi.ResourceOptions(parent=self),
            )
        self.register_outputs({})
