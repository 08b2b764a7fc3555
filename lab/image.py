"""The Debian file system that the lab's machines start from, made once and kept in the cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lab import repository
from lab.state import CACHE, LabError
from ops.stackfile import write_atomically

SUITES = {12: "bookworm", 13: "trixie"}
OF_DEBIAN = {*SUITES.values(), "oldstable", "stable"}
"""Suites by which a source is known to be Debian's own."""
OWN_KEY = "debian-archive"
"""Part of the name of the file with Debian's own keys."""
ONE_LINE = re.compile(
    r"^[ \t]*deb[ \t]+(?P<options>(?:\[[^\]\n]*\])?)[ \t]*(?P<address>\S+)[ \t]+(?P<suite>\S+)(?P<components>[^#\n]*)",
    re.M,
)
FIELD = re.compile(r"^([A-Za-z-]+):(.*(?:\n[ \t].*)*)", re.M)
BASE = (
    "systemd-sysv dbus openssh-server python3 ca-certificates iproute2 iputils-ping nftables procps kmod "
    "logrotate unattended-upgrades systemd-timesyncd rsync less"
).split()
ROLES = (
    "postfix postfix-lmdb postfix-pcre dovecot-core dovecot-auth-lua dovecot-imapd dovecot-lmtpd dovecot-sieve "
    "dovecot-managesieved opendkim opendkim-tools postsrsd rspamd redis-server unbound dns-root-data nginx "
    "libnginx-mod-stream stunnel4 php-fpm php-enchant php-gd php-sqlite3 php-zip roundcube-core roundcube-plugins "
    "roundcube-sqlite3 hunspell-de-de hunspell-en-us hunspell-fr-classical hunspell-nl lego knot-dnsutils "
    "haproxy postfix-mta-sts-resolver python3-dnspython"
).split()
ABROAD = "bind9 knot opendmarc pdns-backend-sqlite3 pdns-server pebble postfix-policyd-spf-python".split()
"""What only the lab's own machines and tests need: name servers, an authority, the checks of the foreign host."""
KEPT_SECONDS = 30 * 86400
"""How long an image is kept that no lab was started from."""
OWN = 12
"""The release of the lab's own machines, whatever the stack's hosts run."""

# Every daemon waits for its configuration; the agent enables what a host needs.
AT_REST = (
    "postfix dovecot opendkim opendmarc postsrsd rspamd redis-server unbound nginx stunnel4 haproxy knot named pdns "
    "postfix-mta-sts-resolver systemd-timesyncd unattended-upgrades roundcube-gc.timer roundcube-cleandb.timer"
).split()
MASKED = "apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service unbound-resolvconf.service"
DEBCONF = """postfix postfix/main_mailer_type select No configuration
roundcube-core roundcube/dbconfig-install boolean false
"""

TIDY = f"""set -e
systemctl --root="$1" disable --quiet {" ".join(AT_REST)} 2>/dev/null || true
systemctl --root="$1" disable --quiet $(cd "$1"/usr/lib/systemd/system && echo php*-fpm.service)
systemctl --root="$1" mask --quiet {MASKED} 2>/dev/null
rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/postsrsd.secret "$1"/etc/hostname "$1"/etc/resolv.conf
: > "$1"/etc/machine-id
# What the installer and Debian's cloud images have, and every login asks for.
: > "$1"/etc/default/locale
# rspamd compiles its list of public suffixes at its first start, which takes fifteen CPU-seconds: once here, not on
# every machine. (Where the CPU has no SSSE3 it needs none.)
mkdir -p "$1"/run/rspamd && chown --reference="$1"/var/lib/rspamd "$1"/run/rspamd
chroot "$1" runuser -u _rspamd -- timeout 60 rspamd -c /etc/rspamd/rspamd.conf -f >/dev/null 2>&1 &
while kill -0 $! 2>/dev/null && [ -z "$(find "$1"/var/lib/rspamd -name '*.hsmp' -size +8M)" ]; do sleep 0.2; done
kill $! 2>/dev/null && wait $! || true
rm -rf "$1"/run/rspamd "$1"/var/lib/rspamd/*.sock "$1"/var/log/rspamd/*
rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/* "$1"/usr/share/doc/* "$1"/usr/share/man/*
"""


def debian_sources(suite: str, etc: Path = Path("/etc/apt")) -> str:
    """The machine's own package sources of Debian, for another release of Debian where it is one.

    Where the machine names no security updates, neither does this: a mirror need not have them below a like address.
    Raises `LabError` when the machine has no source of Debian.
    """
    mirror = security = None
    for address, of, components in _sources(etc):
        if "main" not in components:
            continue
        if of in OF_DEBIAN:
            mirror = mirror or address
        elif of.removesuffix("-security") in OF_DEBIAN:
            security = security or address
    if mirror is None:
        raise LabError("no package source of Debian is named below /etc/apt: the lab's machines are made from one")
    lines = [f"deb {mirror} {suite} main", f"deb {mirror} {suite}-updates main"]
    return "\n".join((*lines, *([f"deb {security} {suite}-security main"] if security else []), ""))


def _sources(etc: Path) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Address, suite and components of all sources of packages, in both styles (sources.list(5)), in apt's order.

    Those alone that are not signed by somebody else's key.
    """
    parts = sorted((etc / "sources.list.d").glob("*"))
    for file in (path for path in (etc / "sources.list", *parts) if path.is_file()):
        text = "".join(
            line for line in file.read_text(errors="replace").splitlines(keepends=True) if not line.startswith("#")
        )
        if file.suffix == ".list":
            for words in ONE_LINE.finditer(text):
                if "signed-by" not in words["options"].lower() or OWN_KEY in words["options"]:
                    yield _resolved(words["address"]), words["suite"], words["components"].split()
        elif file.suffix == ".sources":
            for stanza in re.split(r"\n\s*\n", text):
                fields = {name.lower(): value for name, value in FIELD.findall(stanza)}
                types, signed = fields.get("types", "").split(), fields.get("signed-by", OWN_KEY)
                if "deb" in types and fields.get("enabled", "yes").strip() != "no" and OWN_KEY in signed:
                    for address in fields.get("uris", "").split():
                        for of in fields.get("suites", "").split():
                            yield _resolved(address), of, fields.get("components", "").split()


def _resolved(address: str) -> str:
    """The first mirror of a list in a file (apt-transport-mirror(1)): an image cannot read this machine's files."""
    lines: list[str] = []
    if address.startswith("mirror+file:"):
        with contextlib.suppress(OSError):
            lines = Path(urlsplit(address).path).read_text().splitlines()
    return next((line.split()[0] for line in lines if line.strip() and not line.startswith("#")), address)


def packages(release: int) -> list[str]:
    """What is installed in an image, beside what that depends on."""
    return sorted({*BASE, *ROLES, *(ABROAD if release == OWN else ())})


def recipe(release: int) -> dict[str, object]:
    """All that decides what is in an image: equal recipes give equal images."""
    return {"release": release, "packages": packages(release), "tidy": TIDY, "debconf": DEBCONF}


def folder(release: int) -> Path:
    """Where the image of a Debian release lies, whether it was made or not."""
    digest = hashlib.sha256(json.dumps(recipe(release), sort_keys=True).encode()).hexdigest()[:12]
    return CACHE / "images" / f"debian-{release}-{digest}"


def note_use(image: Path) -> None:
    """Notes that a lab starts from an image, for `forget`."""
    for path in (image, repository.folder(image)):
        if path.exists():
            os.utime(path)


def forget(images: Path, now: float) -> list[Path]:
    """Removes what no lab was started from for a month, and returns it: a change of a recipe leaves an image behind.

    For when no lab runs: one that does has what it was started from, however long ago.
    """
    old = [path for path in sorted(images.glob("*")) if now - path.stat().st_mtime > KEPT_SECONDS]
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return old


def is_made(release: int) -> bool:
    """Whether the cache holds an image and the packages that are served beside it."""
    image = folder(release)
    return (image / "packages").exists() and repository.folder(image).exists()


def make(release: int, log: Path) -> Path:
    """The root folder of an image, made with mmdebstrap when the cache has none (some 50 s on two cores).

    With it comes the repository of what its machines install later (`lab.repository`).

    Raises `LabError` with the end of the log.
    """
    image = folder(release)
    image.parent.mkdir(parents=True, exist_ok=True)
    with image.with_suffix(".lock").open("w") as lock:
        # Another lab may want the same image: the second finds it made.
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = _make(release, image, log)
        repository.make(image, SUITES[release], debian_sources(SUITES[release]))
        note_use(image)
        return root


def _make(release: int, image: Path, log: Path) -> Path:
    root = image / "root"
    if (image / "packages").exists():
        return root
    shutil.rmtree(image, ignore_errors=True)
    image.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        sources, tidy, answers = (Path(scratch, name) for name in ("sources.list", "tidy", "answers"))
        sources.write_text(debian_sources(SUITES[release]))
        answers.write_text(DEBCONF)
        tidy.write_text(f"#!/bin/sh\n{TIDY}")
        tidy.chmod(0o755)
        command = [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(packages(release))}",
            f'--essential-hook=chroot "$1" debconf-set-selections < {answers}',
            f"--customize-hook={tidy}",
            SUITES[release],
            str(root),
            str(sources),
        ]
        with log.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        shutil.rmtree(image, ignore_errors=True)
        raise LabError(f"mmdebstrap could not make the image ({log}):\n{tail}")
    listed = subprocess.run(
        ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W"], capture_output=True, text=True, check=True
    )
    # The list comes last: an image without it was not finished.
    write_atomically(image / "packages", listed.stdout)
    return root
