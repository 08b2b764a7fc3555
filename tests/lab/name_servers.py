"""Name servers of Debian that take updates, on loopback, each with its files in a folder of its own.

Their programs are those of the image that the lab's machines start from: this machine needs none of them.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.update

ADDRESS = "127.0.0.1"
SECRET = "c2VjcmV0IG9mIHRoZSB0ZXN0cw=="
KEY = dns.tsig.Key("posthorn", SECRET, "hmac-sha256")
PARENT, CHILD = "example.", "child.example."
"""A zone, and one below it on the same server, to which nothing delegates."""
READY_SECONDS = 30.0
START = """
mount --bind "$ROOT" "$ROOT"
mount -o remount,bind,ro "$ROOT"
mount --bind "$FOLDER" "$ROOT/tmp"
mount --rbind /dev "$ROOT/dev"
exec chroot "$ROOT" "$@"
"""
"""In a mount namespace of its own: the image is read alone, and the folder of a server is its /tmp."""


def _apex(zone: str) -> tuple[str, str]:
    return f"ns.{zone} hostmaster.{zone} 1 3600 600 604800 60", f"ns.{zone}"


def _zone_files(folder: Path) -> None:
    for zone in (PARENT, CHILD):
        soa, ns = _apex(zone)
        (folder / f"{zone}zone").write_text(f"@ 3600 IN SOA {soa}\n@ 3600 IN NS {ns}\nns 3600 IN A {ADDRESS}\n")


def knot(folder: Path, port: int, _root: Path) -> Sequence[str]:
    """Knot DNS, which signs its zones."""
    _zone_files(folder)
    zones = "".join(f"  - domain: {zone}\n    file: {zone}zone\n    acl: update\n" for zone in (PARENT, CHILD))
    (folder / "knot.conf").write_text(
        f"server:\n    listen: {ADDRESS}@{port}\n    rundir: /tmp\n"
        "log:\n  - target: stderr\n    any: info\n"
        f"key:\n  - id: {KEY.name}\n    algorithm: hmac-sha256\n    secret: {SECRET}\n"
        f"acl:\n  - id: update\n    key: {KEY.name}\n    action: [update, transfer]\n"
        "database:\n    storage: /tmp\n"
        "template:\n  - id: default\n    storage: /tmp\n    dnssec-signing: on\n    zonefile-sync: -1\n"
        f"zone:\n{zones}"
    )
    return "knotd", "-c", "/tmp/knot.conf"


def bind(folder: Path, port: int, _root: Path) -> Sequence[str]:
    """BIND 9, which answers nobody without the key."""
    _zone_files(folder)
    zones = "".join(
        f'zone "{zone}" {{ type primary; file "/tmp/{zone}zone"; allow-update {{ key "{KEY.name}"; }};'
        f' allow-query {{ key "{KEY.name}"; }}; }};\n'
        for zone in (PARENT, CHILD)
    )
    (folder / "named.conf").write_text(
        'options { directory "/tmp"; pid-file none; session-keyfile none; recursion no; dnssec-validation no;\n'
        f"    listen-on port {port} {{ {ADDRESS}; }}; listen-on-v6 {{ none; }}; }};\n"
        f'controls {{ }};\nkey "{KEY.name}" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n{zones}'
    )
    return "named", "-g", "-n", "1", "-c", "/tmp/named.conf"


def powerdns(folder: Path, port: int, root: Path) -> Sequence[str]:
    """PowerDNS with its records in SQLite; it takes no updates into the files of its BIND backend."""
    schema = root / "usr" / "share" / "pdns-backend-sqlite3" / "schema" / "schema.sqlite3.sql"
    with sqlite3.connect(folder / "pdns.sqlite3") as database:
        database.executescript(schema.read_text())
        secret = (KEY.name.to_text(omit_final_dot=True), "hmac-sha256", SECRET)
        database.execute("INSERT INTO tsigkeys (name, algorithm, secret) VALUES (?, ?, ?)", secret)
        for number, zone in enumerate((PARENT, CHILD), 1):
            name, (soa, ns) = zone.rstrip("."), _apex(zone.rstrip("."))
            database.execute("INSERT INTO domains (id, name, type) VALUES (?, ?, 'NATIVE')", (number, name))
            database.executemany(
                "INSERT INTO records (domain_id, name, type, content, ttl, auth) VALUES (?, ?, ?, ?, 3600, 1)",
                [(number, name, "SOA", soa), (number, name, "NS", ns), (number, ns, "A", ADDRESS)],
            )
            allow = (number, "TSIG-ALLOW-DNSUPDATE", secret[0])
            database.execute("INSERT INTO domainmetadata (domain_id, kind, content) VALUES (?, ?, ?)", allow)
    database.close()
    (folder / "pdns.conf").write_text(
        "launch=gsqlite3\ngsqlite3-database=/tmp/pdns.sqlite3\ngsqlite3-pragma-synchronous=0\ndnsupdate=yes\n"
        f"local-address={ADDRESS}\nlocal-port={port}\nsocket-dir=/tmp\nsecurity-poll-suffix=\n"
    )
    return "pdns_server", "--config-dir=/tmp", "--daemon=no", "--guardian=no", "--disable-syslog=yes"


KINDS: dict[str, Callable[[Path, int, Path], Sequence[str]]] = {"knot": knot, "bind": bind, "powerdns": powerdns}


@dataclass(frozen=True)
class NameServer:
    """A name server that runs, and how to talk to it past the provider."""

    port: int

    def rrset(self, name: str, kind: str) -> tuple[int, set[str]] | None:
        """TTL and records, as the server answers them."""
        answer = self.ask(dns.message.make_query(name, kind, flags=0))
        found = [rrset for rrset in answer.answer if rrset.rdtype == dns.rdatatype.from_text(kind)]
        return (found[0].ttl, {rdata.to_text() for rdata in found[0]}) if found else None

    def stands(self, zone: str, name: str, kind: str) -> bool:
        """Whether a zone has an RRset, also where a zone below hides it from queries."""
        asked = dns.update.UpdateMessage(zone)
        asked.present(name, kind)
        return self.ask(asked).rcode() == dns.rcode.NOERROR

    def ask(self, message: dns.message.Message) -> dns.message.Message:
        message.use_tsig(KEY)
        return dns.query.tcp(message, ADDRESS, port=self.port, timeout=10)


@contextmanager
def running(kind: str, root: Path, folder: Path) -> Iterator[NameServer]:
    """A server of a kind, until the end of the block."""
    with socket.socket() as free:
        free.bind((ADDRESS, 0))
        port: int = free.getsockname()[1]
    command = KINDS[kind](folder, port, root)
    environment = {**os.environ, "FOLDER": str(folder), "ROOT": str(root), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", START, "sh", *command],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        server = NameServer(port)
        _wait(server, process, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait(server: NameServer, process: subprocess.Popen[Any], log: Path) -> None:
    """Waits until a server has both of its zones."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with suppress(OSError, dns.exception.DNSException):
            if all(server.rrset(zone, "SOA") for zone in (PARENT, CHILD)):
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the name server does not serve: {log.read_text(errors='replace')}")
        time.sleep(0.05)
