"""What smtp-out and maildrop have in common of Dovecot: who may log in, and the check of its configuration."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping

import bcrypt

from model.keys import PLACEHOLDER
from model.stack import Host, Stack
from services.service import Check, SecretFile

USERS = "/etc/dovecot/users"
CHECKS = (Check(("sh", "-c", "doveconf -n -x >/dev/null")),)
"""``-x`` opens the files that settings name, which plain ``doveconf -n`` does not."""


def users_file(lines: Mapping[str, str]) -> SecretFile:
    """The passwd-file of Dovecot: a user to what follows its name."""
    text = "".join(f"{user}:{rest}\n" for user, rest in sorted(lines.items()))
    return SecretFile(USERS, "users", text, mode="0640", group="dovecot")


def submission_users(stack: Stack) -> dict[str, str]:
    """Everybody who may submit mail: accounts, and machine users."""
    users = {name: account.password.get_secret_value() for name, account in stack.accounts.items()}
    for name, machine in stack.machine_users.items():
        users[name] = _hash(stack, name, machine.password.get_secret_value())
    return users


def mailbox_users(stack: Stack, host: Host) -> dict[str, str]:
    """Everybody who has a mailbox: its quota, a rule for Dovecot 2.3, a setting for 2.4; the address of its filters."""
    quota = "quota_storage_size=" if stack.release_of(host) >= 13 else "quota_rule=*:storage="
    return {
        name: f"{account.password.get_secret_value()}::::::userdb_{quota}{account.quota}"
        f" userdb_sieve_user_email={stack.primary_address(name)}"
        for name, account in stack.accounts.items()
    }


def _hash(stack: Stack, user: str, password: str) -> str:
    """A hash of a password that the stack file holds in clear: the same at every run, so that nothing seems changed."""
    if stack.keys.private is None:
        return PLACEHOLDER
    seed = hmac.new(stack.keys.private.version_key.encode(), f"salt of {user}".encode(), hashlib.sha256).digest()[:16]
    alphabet = bytes.maketrans(
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
        b"./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789",
    )
    salt = base64.b64encode(seed).rstrip(b"=").translate(alphabet)
    return "{BLF-CRYPT}" + bcrypt.hashpw(password.encode(), b"$2y$10$" + salt).decode()
