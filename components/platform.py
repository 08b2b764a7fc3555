"""The whole platform of a stack: machines, what is on them, and the records that lead to them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pulumi

from agent import SOURCE
from components.host import HostConfiguration, SecretValue
from components.machine import Hypervisor, Machine
from components.zones import Zones
from model.network import Role
from model.stack import Host, Stack
from services.bundle import bundle, secrets
from services.zones import rrsets

WITHOUT = "POSTHORN_WITHOUT"
"""Variable of the environment: sites whose resources this run leaves out.

The program does not name them, and the operator's command excludes them: so Pulumi keeps them in its state as they are,
and starts no provider of a hypervisor that cannot be reached.
"""
FIRST = "POSTHORN_FIRST"
"""The same: set while the stack has no machine yet. Nobody is served who could miss one: all are made at once."""


def steps(stack: Stack) -> Iterator[tuple[str, list[Host]]]:
    """Hosts that are changed side by side, and their site: the mailbox hosts of each site, then the rest of each.

    The most preferred site comes last. No smtp-in host knows an account before the mailbox hosts do: whoever delivers
    is told first, whoever accepts last.
    """
    for delivers in (True, False):
        for site in reversed(stack.sites):
            if hosts := [host for host in stack.hosts_at(site) if host.has(Role.MAILDROP) == delivers]:
                yield site, hosts


class Platform(pulumi.ComponentResource):
    """Builds a stack in the order in which a change is safest.

    Internal names come first, and data disks and images at all sites side by side; then, step by step, the machines and
    what is on them: a machine is switched off or made anew only when the step before serves again, and a bad change
    stops at the first step while the other sites still serve. Last the records that lead the world to them.
    """

    def __init__(self, stack: Stack, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("posthorn:index:Platform", stack.name, None, opts)
        self._stack = stack
        records = {phase: [r for r in rrsets(stack) if r.phase == phase] for phase in ("internal", "hosts", "service")}
        internal = Zones(f"{stack.name}-internal", stack, records["internal"], opts=self._child())
        left_out = os.environ.get(WITHOUT, "").split(",")
        sites = [site for site in stack.sites if site not in left_out]
        machines = {name: machine for site in sites for name, machine in self._machines(site).items()}
        before: list[pulumi.Resource] = [internal]
        for site, step in steps(stack):
            if site in sites:
                before = [self._host(host, machines.get(host.name), before) for host in step]
        names = Zones(f"{stack.name}-hosts", stack, records["hosts"], before, internal, self._child(before))
        Zones(f"{stack.name}-service", stack, records["service"], (), names, self._child([names]))
        self.register_outputs({})

    def _child(self, depends_on: list[pulumi.Resource] | None = None) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions(parent=self, depends_on=depends_on or [])

    def _machines(self, site: str) -> dict[str, Machine]:
        """The machines of a site by host, with nothing yet but their data disks, and the images for the rest."""
        settings, stack = self._stack.sites[site].hypervisor, self._stack
        hosts = [host for host in stack.hosts_at(site) if host.machine]
        if settings is None or not hosts:
            return {}
        hypervisor = Hypervisor(site, settings, self._child())
        machines = {host.name: Machine(host.name, stack, host, hypervisor, self._child()) for host in hosts}
        hypervisor.upload({stack.release_of(host) for host in hosts})
        return machines

    def _host(self, host: Host, machine: Machine | None, before: list[pulumi.Resource]) -> HostConfiguration:
        """A host as it has to be: its machine, if that is the stack's to make, and all that is on it."""
        stack = self._stack
        generation = machine.make([] if os.environ.get(FIRST) else before) if machine else None
        return HostConfiguration(
            host.name,
            address=str(host.management_address),
            host_key=host.host_key(stack.keys),
            bundle={"agent": SOURCE, **bundle(stack, host)},
            secrets={
                name: SecretValue(version=stack.keys.version(content), content=content)
                for name, content in secrets(stack, host).items()
            },
            generation=generation or (host.existing.generation if host.existing else ""),
            opts=self._child(before),
        )
