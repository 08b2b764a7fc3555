"""The Pulumi program: reads the configuration of a stack and builds its platform."""

from __future__ import annotations

import pulumi

from components.platform import Platform
from model.base import StackError
from model.checks import missing_keys, missing_secrets
from model.load import PROJECT, parse
from model.stack import Stack, StackFile
from services.bundle import Conflict
from services.zones import record_problems


def configured_stack() -> Stack:
    """The stack of this run, with its secrets.

    Raises `pulumi.RunError` with all that is wrong, so that nothing is changed and no traceback is shown.
    """
    given = pulumi.Config(PROJECT)
    values = {key: given.get_object(key) for key in StackFile.model_fields}
    name = pulumi.get_stack()
    config = {key: value for key, value in values.items() if value is not None}
    try:
        return parse(name, f"Pulumi.{name}.yaml", config, missing_keys, missing_secrets, record_problems)
    except StackError as error:
        raise pulumi.RunError(str(error)) from None


stack = configured_stack()
try:
    platform = Platform(stack)
except Conflict as conflict:
    raise pulumi.RunError(str(conflict)) from None
pulumi.export("imap", stack.public_name("imap"))
pulumi.export("submission", stack.public_name("smtp_out"))
pulumi.export("mx", stack.public_name("smtp_in"))
pulumi.export("hosts", {host.name: str(host.management_address) for host in stack.all_hosts.values()})
