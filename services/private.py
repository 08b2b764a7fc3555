"""Secrets in files: the value where it is known, a marked placeholder where it is not."""

from __future__ import annotations

from collections.abc import Callable

from model.keys import PLACEHOLDER, PrivateKeys
from model.stack import Stack


def private(stack: Stack, pick: Callable[[PrivateKeys], str]) -> str:
    """A private key or password of the stack; a placeholder when it was rendered without a passphrase."""
    return PLACEHOLDER if stack.keys.private is None else pick(stack.keys.private)
