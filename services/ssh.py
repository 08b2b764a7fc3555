"""How the operators come in: with their keys, over SSH, from the networks named."""

from __future__ import annotations

from model.stack import Host, Stack
from services.render import render_tree
from services.service import Check, Listen, Service, Unit


def configure(stack: Stack, host: Host) -> Service:
    """The SSH server. Its check runs before anything is replaced, so that a mistake shuts nobody out."""
    return Service(
        name="ssh",
        packages=("openssh-server",),
        files=render_tree("ssh", stack=stack, host=host),
        units=(Unit("ssh.service", reload_on=("/etc/ssh/sshd_config.d/",)),),
        checks=(Check(("/usr/sbin/sshd", "-t")),),
        # An existing host may say ListenAddress in a file of its own: where it is managed is what has to answer.
        listens=(Listen(22, frm=stack.access.ssh_from, at=(host.management_address,)),),
    )
