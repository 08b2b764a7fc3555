"""Replication between the two mailbox hosts: a service of our own that runs `doveadm sync`, and a guard of the store.

Dovecot's own replicator exists on Debian 12 alone, and is minutes late after an outage. The way between the hosts is a
tunnel in which both ends prove themselves; it stands by itself, so that either end works while the other's service is
down. See docs/replication.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from model.network import Role
from model.stack import Host, Stack
from services import identity
from services.data_disk import mount_unit
from services.private import private
from services.render import render_tree
from services.service import Call, File, Listen, SecretFile, Service, Unit
from sync import SOURCE

STORE, HOMES = "/var/vmail", "/var/vmail/users"
"""What is on the disk of the mail. Only the program below makes the folder of the homes: see docs/replication.md."""
PORT, SYNC_PORT = 12345, 12348
"""Where the tunnels end, between the two hosts: Dovecot's, and that of the sync services."""
TO_PEER, DOVEADM = 12346, 12347
"""On loopback: the near end of the tunnel to the peer, and Dovecot itself."""
SYNC_TO_PEER, SYNC = 12349, 12350
"""The same for the sync services. Dovecot's events, the operator and Prometheus come to the second too."""
PASSWORD, TOKEN = "/etc/dovecot/replication.conf", "/etc/posthorn-sync/token"
PROGRAM, CONFIGURATION = "/usr/local/sbin/posthorn-sync", "/etc/posthorn-sync/sync.json"
TUNNEL, UNIT = "stunnel@replication.service", "posthorn-sync.service"
SYSTEM = "/etc/systemd/system"
CHANGING = (
    *"APPEND CLOSE COPY CREATE DELETE EXPUNGE MOVE RENAME SETACL SETMETADATA STORE SUBSCRIBE UNSUBSCRIBE".split(),
    *(f"UID {command}" for command in ("COPY", "EXPUNGE", "MOVE", "STORE")),
)
"""IMAP commands that change a mailbox (RFC 9051, 6851, 4314 and 5464): Dovecot names those by UID apart."""
SEEING = ("*BODY[*", "*BINARY[*", "*RFC822", "*RFC822 *", "*RFC822)*", "*RFC822.TEXT*")
"""Arguments of FETCH that mark a mail as seen."""
SCRIPTING = ("PUTSCRIPT", "SETACTIVE", "DELETESCRIPT", "RENAMESCRIPT")
"""ManageSieve commands that change a script, or which one is active (RFC 5804)."""
FILLING = "/run/posthorn-sync/filling"
"""There while the store of a host is being filled, and Dovecot serves no user."""
DOVECOT_GUARD = f"{SYSTEM}/dovecot.service.d/"


def peer_of(stack: Stack, host: Host) -> Host | None:
    """The other mailbox host, if there is one."""
    return next((other for other in stack.hosts_with(Role.MAILDROP) if other.name != host.name), None)


def one_of(field: str, values: Iterable[str]) -> str:
    """A filter of Dovecot's events: the field has one of some values."""
    return " OR ".join(f'{field}="{value}"' for value in values)


def guard(stack: Stack, host: Host) -> Service:
    """On every mailbox host: Dovecot does not start over a disk that is not mounted, lost, or another's."""
    peer = peer_of(stack, host)
    configuration = {
        "host": host.fqdn,
        "peer": peer.fqdn if peer else None,
        "store": STORE,
        "homes": HOMES,
        "owner": "vmail",
        "listen": SYNC,
        "to_peer": SYNC_TO_PEER,
        "to_doveadm": TO_PEER,
    }
    return Service(
        name="store",
        files=(
            File(PROGRAM, SOURCE, mode="0755"),
            File(CONFIGURATION, json.dumps(configuration, indent=1) + "\n"),
            *render_tree(
                "store",
                program=PROGRAM,
                mount=mount_unit(STORE) if host.machine else None,
                tunnel=TUNNEL if peer else None,
            ),
        ),
    )


def configure(stack: Stack, host: Host) -> Service:
    """The tunnel, each end of which takes no other than the peer; and the service that syncs."""
    peer = peer_of(stack, host)
    if peer is None:
        return Service(name="replication")
    password = private(stack, lambda keys: keys.replication)
    probe = {"kind": "http", "address": "127.0.0.1", "server_name": host.fqdn, "path": "/metrics", "tls": False}
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
            sync_port=SYNC_PORT,
            sync_to_peer=SYNC_TO_PEER,
            sync=SYNC,
            program=PROGRAM,
            token=TOKEN,
        ),
        secret_files=(
            # Whoever runs doveadm sync has to read it: the owner of the mail.
            SecretFile(PASSWORD, "replication", f"doveadm_password = {password}\n", mode="0640", group="vmail"),
            SecretFile(TOKEN, "sync-token", f"{password}\n"),
        ),
        units=(
            Unit(TUNNEL, restart_on=("/etc/stunnel/", *identity.SHOWN), sandbox=identity.TUNNEL_SANDBOX),
            Unit(UNIT, restart_on=(PROGRAM, CONFIGURATION, TOKEN, f"{SYSTEM}/{UNIT}")),
        ),
        health=({**probe, "port": SYNC, "status": [200]},),
        calls=(
            *(Call(port, "stunnel4") for port in (DOVEADM, SYNC)),
            *(Call(port, "vmail") for port in (TO_PEER, SYNC_TO_PEER)),
            # Its events.
            Call(SYNC, "dovecot"),
        ),
        listens=(Listen(PORT, frm=peer.addresses.local), Listen(SYNC_PORT, frm=peer.addresses.local)),
    )
