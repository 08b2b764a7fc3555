"""What users teach the spam scanners: a mail moved into Junk is spam, one moved out of it is none.

The mail is put into a spool and the user's move is done; a feeder brings it to every scanner, and to one that was away
as soon as it is back.
"""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services import identity, rspamd
from services.identity import TUNNEL_SANDBOX
from services.render import render_tree
from services.service import Call, Compile, Directory, Listen, Service, Unit

PORT = 11335
"""Where a scanner takes lessons, from the mailbox hosts alone."""
SPOOL = "/var/spool/posthorn-learn"
MOST = 400
"""Lessons that wait, at most: to be taken up, and for each scanner. A larger mail than 512 KB is none."""
FEEDER = "/usr/local/lib/posthorn/learn-feed"
PIPES = "/usr/local/lib/posthorn/sieve"
LEARN = "/etc/dovecot/sieve/learn"
SYSTEM = "/etc/systemd/system/"


def send(stack: Stack, host: Host) -> Service:
    """On a mailbox host: Sieve scripts that notice a move, the spool, and the feeder."""
    scanners = {scanner.fqdn: str(scanner.addresses.local[0]) for scanner in stack.hosts_with(Role.RSPAMD)}
    folders = (SPOOL, f"{SPOOL}/tmp", f"{SPOOL}/new", *(f"{SPOOL}/{name}" for name in scanners))
    return Service(
        name="learning",
        files=render_tree(
            "learning-send",
            modes={FEEDER: "0755", f"{PIPES}/learn": "0755"},
            identity=identity,
            scanners=scanners,
            spool=SPOOL,
            most=MOST,
            port=PORT,
        ),
        directories=tuple(Directory(folder, mode="0700", owner="vmail", group="vmail") for folder in folders),
        compiles=(Compile(("sievec", "-x", "+vnd.dovecot.pipe", LEARN), of=LEARN),),
        calls=(Call(PORT, "vmail"),) if host.has(Role.RSPAMD) else (),
        units=(
            Unit("posthorn-learn.path", restart_on=(f"{SYSTEM}posthorn-learn",)),
            Unit("posthorn-learn.timer", restart_on=(f"{SYSTEM}posthorn-learn",)),
        ),
    )


def receive(stack: Stack, host: Host) -> Service:
    """On a scanner: a tunnel to its controller, for hosts that prove to be mailbox hosts of this stack."""
    teachers = stack.hosts_with(Role.MAILDROP)
    return Service(
        name="learning",
        packages=("stunnel4",),
        files=render_tree(
            "learning-receive", host=host, teachers=teachers, identity=identity, port=PORT, controller=rspamd.CONTROLLER
        ),
        calls=(Call(rspamd.CONTROLLER, "stunnel4"),),
        units=(
            Unit(
                "stunnel@learning.service",
                restart_on=("/etc/stunnel/learning.conf", *identity.SHOWN),
                sandbox=TUNNEL_SANDBOX,
            ),
        ),
        listens=(Listen(PORT, frm=stack.local_addresses(Role.MAILDROP)),),
    )
