"""PostSRSd: senders of forwarded mail, rewritten so that the next host's SPF check passes, and back again."""

from __future__ import annotations

from model.stack import Host, Stack
from services.private import private
from services.render import render_tree
from services.service import SecretFile, Service, Unit


def configure(stack: Stack, host: Host) -> Service:
    """One secret at all sites, so that a bounce may return by any of them."""
    return Service(
        name="postsrsd",
        packages=("postsrsd",),
        files=render_tree("postsrsd", stack=stack, host=host),
        secret_files=(SecretFile("/etc/postsrsd.secret", "srs", private(stack, lambda keys: keys.srs + "\n")),),
        units=(Unit("postsrsd.service", restart_on=("/etc/default/postsrsd", "/etc/postsrsd.secret")),),
    )
