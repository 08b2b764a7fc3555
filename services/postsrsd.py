"""PostSRSd: senders of forwarded mail, rewritten so that the next host's SPF check passes, and back again."""

from __future__ import annotations

from model.stack import Host, Stack
from services.private import private
from services.render import render_tree
from services.service import Call, Sandbox, SecretFile, Service, Unit

FORWARD, REVERSE = 10001, 10002
SECRETS = "/etc/postsrsd.secret"

SANDBOX = Sandbox("CAP_SETGID CAP_SETUID CAP_SYS_CHROOT")
"""It reads its secrets as root, and becomes another user in an empty folder."""


def configure(stack: Stack, host: Host) -> Service:
    """The same secrets at all sites, so that a bounce may return by any of them. The first signs (postsrsd(8))."""
    return Service(
        name="postsrsd",
        packages=("postsrsd",),
        files=render_tree("postsrsd", stack=stack, host=host, forward=FORWARD, reverse=REVERSE),
        secret_files=(SecretFile(SECRETS, "srs", private(stack, lambda keys: keys.srs_known)),),
        inside=("postsrsd",),
        calls=(Call(FORWARD, "postfix"), Call(REVERSE, "postfix")),
        units=(Unit("postsrsd.service", restart_on=("/etc/default/postsrsd", SECRETS), sandbox=SANDBOX),),
    )
