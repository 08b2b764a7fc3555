"""Replication between the two mailbox hosts: Dovecot's own, through a tunnel that both ends prove themselves in.

Dovecot's replicator exists on Debian 12 alone; Dovecot 2.4 has none.
"""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services import identity
from services.private import private
from services.render import render_tree
from services.service import Listen, SecretFile, Service, Unit

PORT = 12345
"""Where a tunnel ends, between the two hosts."""
TO_PEER, DOVEADM = 12346, 12347
"""On loopback: the near end of the tunnel to the peer, and Dovecot itself."""
PASSWORD = "/etc/dovecot/replication.conf"
UNIT = "stunnel@replication.service"


def peer_of(stack: Stack, host: Host) -> Host | None:
    """The other mailbox host, if there is one."""
    return next((other for other in stack.hosts_with(Role.MAILDROP) if other.name != host.name), None)


def configure(stack: Stack, host: Host) -> Service:
    """stunnel: each end shows the host's certificate, and takes no other than the peer's."""
    peer = peer_of(stack, host)
    if peer is None:
        return Service(name="replication")
    password = private(stack, lambda keys: keys.replication)
    return Service(
        name="replication",
        packages=("stunnel4",),
        files=render_tree(
            "replication",
            host=host,
            peer=peer,
            identity=identity,
            port=PORT,
            to_peer=TO_PEER,
            doveadm=DOVEADM,
        ),
        secret_files=(SecretFile(PASSWORD, "replication", f"doveadm_password = {password}\n"),),
        units=(Unit(UNIT, restart_on=("/etc/stunnel/", "/etc/posthorn/", "/etc/systemd/system/stunnel@.service.d/")),),
        listens=(Listen(PORT, frm=peer.addresses.local),),
    )
