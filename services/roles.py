"""Which services a role brings to its host. Adding a service means one line here."""

from __future__ import annotations

from collections.abc import Callable

from model.network import Role
from model.stack import Host, Stack
from services import (
    certificate,
    data_disk,
    discovery,
    firewall,
    frontend,
    identity,
    learning,
    maildrop,
    network,
    opendkim,
    postsrsd,
    relay_client,
    replication,
    resolver,
    revive,
    rspamd,
    rspamd_proxy,
    sandbox,
    smtp_in,
    smtp_out,
    ssh,
    tls_policy,
    upkeep,
    webmail,
)
from services.service import Service

Configure = Callable[[Stack, Host], Service]

EVERYWHERE: tuple[Configure, ...] = (
    identity.configure,
    certificate.configure,
    network.configure,
    ssh.configure,
    upkeep.configure,
    data_disk.configure,
    resolver.configure,
)

RELAY: tuple[Configure, ...] = (rspamd_proxy.configure, opendkim.configure, tls_policy.configure)
"""What every host has that brings mail to the world."""

OF_ROLE: dict[Role, tuple[Configure, ...]] = {
    Role.SMTP_IN: (*RELAY, postsrsd.configure, smtp_in.configure),
    Role.SMTP_OUT: (*RELAY, smtp_out.configure),
    Role.MAILDROP: (replication.guard, replication.configure, maildrop.configure, learning.send),
    Role.FRONTEND: (frontend.configure, discovery.configure),
    Role.WEBMAIL: (webmail.configure,),
    Role.RSPAMD: (rspamd.configure, learning.receive),
    Role.RELAY_CLIENT: (relay_client.configure,),
}


def services_of(stack: Stack, host: Host) -> tuple[Service, ...]:
    """All services of a host, each once; the firewall is made of the ports that they open."""
    wanted = [*EVERYWHERE, *(configure for role in host.roles for configure in OF_ROLE.get(role, ()))]
    services = tuple(configure(stack, host) for configure in dict.fromkeys(wanted))
    listens = tuple(listen for service in services for listen in service.listens)
    calls = tuple(call for service in services for call in service.calls)
    units = tuple(unit for service in services for unit in service.units)
    inside = tuple(user for service in services for user in service.inside)
    shut = firewall.configure(stack, host, listens, calls, inside)
    return (*services, shut, revive.configure(units), sandbox.configure(units))
