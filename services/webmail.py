"""Webmail: Roundcube, run by a PHP of its own behind the host's NGINX.

What users put into it (contacts, identities, settings) lies in their mailboxes, and its database is a copy of that: see
docs/decisions/webmail-state.md. So its hosts are alike, and the loss of one loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from model.network import Role
from model.stack import Host, Stack
from services import identity
from services.private import private
from services.render import render_tree
from services.service import Call, Check, Directory, File, SecretFile, Service, Unit, User

WEB = 8443
"""Where it serves the front ends, which say who the client is."""
IMAPS, SUBMISSION, SIEVE = 20993, 20587, 24190
"""On loopback: NGINX's ways to the mailboxes and to smtp-out, each with its fail-over."""
HOME = "/var/lib/webmail"
SOCKET = "/run/webmail/php.sock"
SETTINGS = "/etc/posthorn/webmail"
FORGET = "/usr/local/lib/posthorn/webmail-forget"
PLUGIN = "/var/lib/roundcube/plugins/posthorn/"
PHP = {12: "8.2", 13: "8.4"}
"""The PHP of a Debian release."""
DICTIONARIES = ("hunspell-de-de", "hunspell-en-us", "hunspell-fr-classical", "hunspell-nl")
CONFIG = "/etc/roundcube/config.inc.php"
OWN = {"mode": "0640", "group": "webmail"}
"""For Roundcube alone; and the package does its upgrades as that group's user."""
FOLDERS = ("", "/sessions", "/temp", "/uploads")


def configure(stack: Stack, host: Host) -> Service:
    """Roundcube in a sandbox, under a user that neither NGINX nor anybody else is."""
    php = PHP[stack.release_of(host)]
    internal = stack.internal_name(Role.WEBMAIL)
    key = private(stack, lambda keys: keys.session)
    probe = {"kind": "http", "address": str(host.addresses.local[0]), "port": WEB, "tls": True, "status": [200]}
    rendered = render_tree(
        "webmail",
        modes={FORGET: "0755"},
        forget=FORGET,
        stack=stack,
        php=php,
        identity=identity,
        home=HOME,
        socket=SOCKET,
        settings=SETTINGS,
        ports={"imaps": IMAPS, "submission": SUBMISSION, "sieve": SIEVE},
        cookie=cookie(host),
        names=(stack.public_name("webmail"), internal),
    )
    return Service(
        name="webmail",
        packages=(
            # Named before Roundcube asks for "php", which would bring Apache.
            f"php{php}-fpm",
            f"php{php}-enchant",
            f"php{php}-gd",
            f"php{php}-sqlite3",
            f"php{php}-zip",
            "roundcube-core",
            "roundcube-plugins",
            "roundcube-sqlite3",
            *DICTIONARIES,
        ),
        users=(User("webmail", home=HOME),),
        directories=(
            Directory(SETTINGS),
            *(Directory(f"{HOME}{folder}", mode="0700", owner="webmail", group="webmail") for folder in FOLDERS),
        ),
        files=(
            *(replace(file, **OWN) if file.path == CONFIG else file for file in rendered),
            File(f"{SETTINGS}/addresses.json", _json(addresses(stack)), **OWN),
            File(f"{SETTINGS}/logins.json", _json(stack.logins), **OWN),
        ),
        secret_files=(SecretFile(f"{SETTINGS}/session-key", "session-key", key, **OWN),),
        units=(
            Unit(
                "webmail.service",
                restart_on=("/etc/systemd/system/webmail.service",),
                reload_on=("/etc/roundcube/", SETTINGS, PLUGIN, FORGET, "/etc/posthorn/authority.pem"),
            ),
            Unit("roundcube-gc.timer"),
        ),
        # Debian's own pool of PHP; and what tidies a database that is none of ours.
        masked=(f"php{php}-fpm.service", "roundcube-cleandb.timer"),
        checks=(
            Check(("php", "-l", CONFIG)),
            # As the user that it runs as: root would be asked which one that is.
            Check(("runuser", "-u", "webmail", "--", f"php-fpm{php}", "-t", "-y", f"{SETTINGS}/fpm.conf")),
        ),
        health=({**probe, "path": "/", "server_name": internal},),
        inside=("webmail",),
        calls=(*(Call(port, "webmail") for port in (IMAPS, SUBMISSION, SIEVE)), Call(WEB, "www-data")),
    )


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def cookie(host: Host) -> str:
    """The cookie of a session at a host: NGINX sees by its name where a user is logged in."""
    return f"webmail_{host.name.replace('-', '_')}"


def addresses(stack: Stack) -> dict[str, list[str]]:
    """Account to the addresses that it may write as, the one of its own name first."""

    def order(account: str, address: str) -> tuple[bool, bool, str]:
        local, _, domain = address.partition("@")
        return local != account, domain != stack.domain, address

    return {
        account: sorted(set(stack.addresses_of(account)), key=lambda address: order(account, address))
        for account in stack.accounts
    }
