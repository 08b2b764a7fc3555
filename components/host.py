"""What is on a host, pushed as one bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
from pulumi_command import remote

# Short and constant: it stands whole in every error. Data comes on standard input, where no process list shows it.
APPLY = """exec python3 -c 'import json,sys
bundle = json.load(sys.stdin)
scope = {"__name__": "agent"}
exec(compile(bundle["agent"], "agent", "exec"), scope)
scope["main"](bundle)'"""

DIAL_ATTEMPTS = 30
"""With the plugin's growing pauses this waits some minutes for a VM that is just starting."""


@dataclass(frozen=True)
class SecretValue:
    """A secret and the version it is stored under, which tells nothing about it."""

    version: str
    content: str = field(repr=False)


class HostConfiguration(pulumi.ComponentResource):
    """Everything that is on a host, pushed with two commands over one connection.

    The first stores secrets under their versions and activates nothing; its standard input is a Pulumi secret. The
    second carries the bundle in clear, so that a preview shows each changed line, and alone applies everything.
    Neither has a delete: a host that leaves the stack is left as it is.
    """

    def __init__(
        self,
        name: str,
        *,
        address: str,
        host_key: str,
        bundle: Mapping[str, Any],
        secrets: Mapping[str, SecretValue],
        generation: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Pushes ``bundle`` to the host at ``address``; again, and in full, whenever ``generation`` changes.

        Raises `ValueError` without a host key: nothing is ever sent to a host that is not known.
        """
        if not host_key:
            raise ValueError(f"{name}: no SSH host key is pinned")
        super().__init__("posthorn:index:HostConfiguration", name, None, opts)
        connection = remote.ConnectionArgs(
            host=address, user="root", host_key=host_key, dial_error_limit=DIAL_ATTEMPTS, per_dial_timeout=15
        )

        def command(
            suffix: str, stdin: pulumi.Input[str], logging: remote.Logging, depends_on: list[pulumi.Resource]
        ) -> remote.Command:
            return remote.Command(
                f"{name}-{suffix}",
                connection=connection,
                create=APPLY,
                stdin=stdin,
                triggers=[generation],
                logging=logging,
                add_previous_output_in_env=False,
                opts=pulumi.ResourceOptions(parent=self, depends_on=depends_on),
            )

        before: list[pulumi.Resource] = []
        if secrets:
            stored = {n: {"version": s.version, "content": s.content} for n, s in secrets.items()}
            text = json.dumps({"agent": bundle["agent"], "host": name, "store": stored}, sort_keys=True)
            before = [command("secrets", pulumi.Output.secret(text), remote.Logging.NONE, [])]
        text = json.dumps(bundle, sort_keys=True)
        self.applied = command("files", text, remote.Logging.STDOUT_AND_STDERR, before)
        self.register_outputs({})
