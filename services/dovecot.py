"""What smtp-out and maildrop have in common of Dovecot: who may log in, and the check of its configuration."""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import bcrypt
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from model.keys import PLACEHOLDER
from model.stack import Host, Stack
from services.render import render_tree
from services.service import Check, File, Sandbox, SecretFile, Unit

CONFIGURATION = "/etc/dovecot/dovecot.conf"
USERS, LOGINS = "/etc/dovecot/users", "/etc/dovecot/logins"
"""Who has a mailbox, by the account's name; and by what its user may log in."""
LOGINS_PROGRAM = "/etc/dovecot/logins.lua"
FORGET = "posthorn-logins.service"
OWN = {"mode": "0640", "group": "dovecot"}
SANDBOX = Sandbox(
    # Its first process stays root: it binds ports below 1024, makes sockets for others, and starts and ends processes
    # of several users, some in an empty folder.
    "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_KILL CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID CAP_SYS_CHROOT "
    "CAP_SYS_RESOURCE",
    asks_addresses=True,
)
QUIET = 'said=$(doveconf -n -x 2>&1 >/dev/null) && test -z "$said" || { echo "$said"; exit 1; }'
"""Dovecot only warns of limits that contradict each other, on standard error: here that counts as refused.

``-x`` opens the files that settings name, which plain ``doveconf -n`` does not.
"""
CHECKS = (Check(("sh", "-c", QUIET)),)
LOGIN_PROCESSES = 4
"""As many processes do the TLS of all sessions, on whatever cores a host has."""
AUTH_WORKERS = 16
"""As many passwords are checked side by side."""
OTHER_PROCESSES = 1000
"""Room for deliveries, logins that are under way, and doveadm: many times what they need."""


@dataclass(frozen=True)
class Sessions:
    """How many of everything a mailbox host has to have for the sessions that it allows."""

    imap: int
    sieve: int
    waiting: int
    """Clients that are not logged in yet: room for two addresses that send nothing on all their connections."""

    @property
    def of_login_process(self) -> int:
        """Each session stays with the login process that does its TLS."""
        return math.ceil((self.imap + self.waiting) / LOGIN_PROCESSES)

    @property
    def processes(self) -> int:
        """Processes of Dovecot: one for each session, and some for all else."""
        return self.imap + self.sieve + OTHER_PROCESSES

    @classmethod
    def of(cls, stack: Stack, host: Host) -> Sessions:
        """Those of a mailbox host."""
        limits = stack.limits
        return cls(stack.imap_sessions_of(host), limits.sieve_processes, 2 * limits.address_connections)


def _passwd_file(lines: Mapping[str, str]) -> str:
    """The passwd-file of Dovecot: a name to what follows it."""
    return "".join(f"{name}:{rest}\n" for name, rest in sorted(lines.items()))


def login_files() -> tuple[File, ...]:
    """The program that checks passwords, and the unit that has Dovecot forget those of before."""
    return render_tree("logins", logins=LOGINS)


def unit(*, restart_on: tuple[str, ...] = (), reload_on: tuple[str, ...]) -> tuple[Unit, ...]:
    """Dovecot, and what makes it forget."""
    return (
        Unit("dovecot.service", restart_on=restart_on, reload_on=(*reload_on, LOGINS_PROGRAM), sandbox=SANDBOX),
        Unit(FORGET, restart_on=(LOGINS, f"/etc/systemd/system/{FORGET}"), once=True),
    )


def hashed(password: str) -> str:
    """A password's hash for an account, in the notation of Dovecot: Argon2id as OWASP's cheat sheet has it first."""
    made = Argon2id(salt=secrets.token_bytes(16), length=32, iterations=2, lanes=1, memory_cost=19456)
    return "{ARGON2ID}" + made.derive_phc_encoded(password.encode())


def is_hash_of(text: str, password: str) -> bool:
    """Whether a hash that `hashed` made is that of a password."""
    try:
        Argon2id.verify_phc_encoded(password.encode(), text.removeprefix("{ARGON2ID}"))
    except (InvalidKey, ValueError):
        return False
    return True


def logins_file(stack: Stack, *, machines: bool = False) -> SecretFile:
    """The passwords, by what users log in by. Whoever logs in is the account (``user`` in passdb extra fields)."""
    lines: dict[str, str] = {}
    for login, account in stack.logins.items():
        password = stack.accounts[account].password.get_secret_value()
        lines[login] = password if login == account else f"{password}::::::user={account}"
    for name, user in stack.machine_users.items() if machines else ():
        lines[name] = _hash(stack, name, user.password.get_secret_value())
    return SecretFile(LOGINS, "logins", _passwd_file(lines), **OWN)


def mailboxes_file(stack: Stack, host: Host) -> File:
    """Everybody who has a mailbox: its quota, a rule for Dovecot 2.3, a setting for 2.4; the address of its filters."""
    quota = "quota_storage_size=" if stack.release_of(host) >= 13 else "quota_rule=*:storage="
    lines = {
        name: f"::::::userdb_{quota}{account.quota} userdb_sieve_user_email={stack.primary_address(name)}"
        for name, account in stack.accounts.items()
    }
    return File(USERS, _passwd_file(lines), **OWN)


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
