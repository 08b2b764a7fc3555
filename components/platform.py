"""The whole platform of a stack: machines, what is on them, and the records that lead to them."""

from __future__ import annotations

import os

import pulumi

from agent import SOURCE
from components.host import HostConfiguration, SecretValue
from components.machine import Hypervisor, Machine
from components.zones import Zones
from model.stack import Host, Stack
from services.bundle import bundle, secrets
from services.zones import rrsets

WITHOUT = "POSTHORN_WITHOUT"
"""Variable of the environment: sites whose resources this run leaves out, which no other site waits for."""
FIRST = "POSTHORN_FIRST"
"""The same: set while the stack has no machine yet. Nobody is served who could miss one: all are made at once."""


class Platform(pulumi.ComponentResource):
    """Builds a stack in the order in which a change is safest.

    Internal names come first, and images at all sites side by side; then, site by site and the most preferred last,
    the machines and what is on them: a machine is switched off or made anew only when the site before serves again,
    and a bad change stops at the first site while the others still do. Last the records that lead the world to them.
    """

    def __init__(self, stack: Stack, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("posthorn:index:Platform", stack.name, None, opts)
        self._stack = stack
        records = {phase: [r for r in rrsets(stack) if r.phase == phase] for phase in ("internal", "hosts", "service")}
        internal = Zones(f"{stack.name}-internal", stack, records["internal"], opts=self._child())
        left_out = os.environ.get(WITHOUT, "").split(",")
        hypervisors = {site: self._hypervisor(site) for site in stack.sites}
        previous_site: list[pulumi.Resource] = [internal]
        for site in reversed(stack.sites):
            hosts = [self._host(host, hypervisors[site], previous_site) for host in stack.hosts_at(site)]
            # What was never made can be nobody's dependency: Pulumi would write a state that it cannot read again.
            if site not in left_out:
                previous_site = list(hosts) or previous_site
        names = Zones(
            f"{stack.name}-hosts", stack, records["hosts"], previous_site, internal, self._child(previous_site)
        )
        Zones(f"{stack.name}-service", stack, records["service"], (), names, self._child([names]))
        self.register_outputs({})

    def _child(self, depends_on: list[pulumi.Resource] | None = None) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions(parent=self, depends_on=depends_on or [])

    def _hypervisor(self, site: str) -> Hypervisor | None:
        settings, stack = self._stack.sites[site].hypervisor, self._stack
        releases = {stack.release_of(host) for host in stack.hosts_at(site) if host.machine}
        return Hypervisor(site, settings, releases, self._child()) if settings and releases else None

    def _host(
        self, host: Host, hypervisor: Hypervisor | None, previous_site: list[pulumi.Resource]
    ) -> HostConfiguration:
        """A host as it has to be: its machine, if that is the stack's to make, and all that is on it."""
        stack, machine = self._stack, None
        if host.machine and hypervisor:
            waits_for = [] if os.environ.get(FIRST) else previous_site
            machine = Machine(host.name, stack, host, hypervisor, self._child(waits_for))
        return HostConfiguration(
            host.name,
            address=str(host.management_address),
            host_key=host.host_key(stack.keys),
            bundle={"agent": SOURCE, **bundle(stack, host)},
            secrets={
                name: SecretValue(version=stack.keys.version(content), content=content)
                for name, content in secrets(stack, host).items()
            },
            generation=machine.generation if machine else host.existing.generation if host.existing else "",
            opts=self._child(previous_site),
        )
