"""Hosts without Postfix send their own mail, and what they need for it they install."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab import foreign, internet, repository
from tests.lab.conftest import Lab
from tests.lab.steps import MX, eventually, in_mailbox, stopped

FRONTENDS = [f"frontend-{site}" for site in MX]


def written(lab: Lab, host: str, *to: str) -> str:
    """Lets root of a host write a mail, as cron does: without a domain anywhere. Returns its Message-ID."""
    message_id = f"<{secrets.token_hex(8)}@far.example>"
    text = f"From: root (Cron Daemon)\nTo: {to[0]}\nSubject: Cron\nMessage-ID: {message_id}\n\nDone.\n"
    done = lab.run(host, "sendmail", "-i", *to, text=text)
    # 75: OpenSMTPD is not there to take it, and it waits in a folder.
    assert done.returncode in (0, 75), done.stderr
    return message_id


def queue(lab: Lab, host: str) -> str:
    return str(lab.run(host, "smtpctl", "show", "queue").stdout)


def try_again(lab: Lab, host: str) -> None:
    """Asks for what waits, again and again: a route that failed rests for some seconds."""

    def done() -> bool:
        lab.run(host, "smtpctl", "schedule", "all")
        return not queue(lab, host)

    eventually(done)


@pytest.mark.parametrize("host", FRONTENDS)
def test_mail_by_root_of_a_front_end_reaches_the_postmaster_and_the_world_signed(lab: Lab, host: str) -> None:
    message_id = written(lab, host, "root", "www-data", "bob@far.example")
    here = in_mailbox(lab, "ann", message_id)
    assert "Return-Path: <postmaster@hill.example>" in here
    abroad = foreign.wait_for(lab.state, message_id, 60)
    assert abroad
    assert "dkim=pass" in abroad and "header.d=hill.example" in abroad and "spf=pass" in abroad
    for name in ("198.18.", "2001:db8:1:", "localhost"):
        assert name not in abroad.partition("\n\n")[0], abroad


@pytest.mark.parametrize("left", MX)
def test_mail_of_a_host_goes_out_by_whichever_smtp_out_is_left(lab: Lab, left: str) -> None:
    away = [f"smtp-out-{site}" for site in MX if site != left]
    with stopped(lab, lab.postfix(away[0]), *away):
        # A session that was open is lost with its other end, and its mail waits for some minutes: begin without one.
        lab.run("frontend-oak", "systemctl", "restart", "opensmtpd")
        message_id = written(lab, "frontend-oak", "bob@far.example")
        assert foreign.wait_for(lab.state, message_id, 60)


@contextmanager
def spoilt(lab: Lab, host: str, path: str, spoil: str) -> Iterator[None]:
    """A file of a host's OpenSMTPD, spoilt for a while by a sed script."""
    lab.run(host, "cp", "-a", path, f"{path}.kept")
    lab.run(host, "sed", "-i", spoil, path)
    # The copy that sed makes has another owner.
    lab.run(host, "chown", f"--reference={path}.kept", path)
    lab.run(host, "systemctl", "restart", "opensmtpd")
    try:
        yield
    finally:
        lab.run(host, "mv", f"{path}.kept", path)
        lab.run(host, "systemctl", "restart", "opensmtpd")


UNTRUSTED = "SSL certificate check failed|tls-connect-failed"
"""What either release says of a certificate by an authority that it does not believe."""


@pytest.mark.parametrize(
    ("path", "spoil", "said"),
    [
        ("/etc/mail/secrets", "s/:.*/:wrong/", "AUTH rejected: 535"),
        # Another authority: one of the public ones, which this host has among its certificates.
        ("/etc/posthorn/authority.pem", "1,$d;r /etc/ssl/certs/ISRG_Root_X1.pem", UNTRUSTED),
    ],
)
def test_without_a_good_password_and_certificate_mail_waits_and_is_not_lost(
    lab: Lab, path: str, spoil: str, said: str
) -> None:
    host = "frontend-elm"
    with spoilt(lab, host, path, spoil):
        message_id = written(lab, host, "root")
        log = ("journalctl", "-u", "opensmtpd", "-o", "cat", "-n", "20")
        eventually(lambda: re.search(said, lab.run(host, *log).stdout))
        assert "root@frontend.elm.net.hill.example" in queue(lab, host)
    try_again(lab, host)
    assert in_mailbox(lab, "ann", message_id)


def test_mail_that_is_written_while_opensmtpd_is_down_is_sent_when_it_is_up(lab: Lab) -> None:
    with stopped(lab, "opensmtpd", "frontend-ash"):
        message_id = written(lab, "frontend-ash", "root")
    assert in_mailbox(lab, "ann", message_id)


def test_a_host_s_opensmtpd_is_open_to_nobody_else_and_its_password_to_no_user(lab: Lab) -> None:
    listening = lab.run("frontend-oak", "ss", "-Hlnt", "sport = :25").stdout
    assert {line.split()[3] for line in listening.splitlines()} == {"127.0.0.1:25", "[::1]:25"}
    read = lab.run("frontend-oak", "setpriv", "--reuid=www-data", "--clear-groups", "cat", "/etc/mail/secrets")
    assert read.returncode != 0 and "Permission denied" in read.stderr


def test_a_host_may_write_as_no_user(lab: Lab) -> None:
    for sender, code in (("ann@hill.example", 553), ("postmaster@hill.example", 250)):
        request = {"server": "smtp-out.hill.example", "name": "smtp-out.hill.example", "port": 587, "tls": "starttls"}
        said = lab.client("talk", **request, user="doors", **{"from": sender}, recipients=["bob@far.example"])
        assert [reply[1] for reply in said["replies"] if reply[0] == "rcpt"] == [code], said


# Packages


def with_opensmtpd(bundle: dict[str, Any]) -> None:
    bundle["packages"].append("opensmtpd")


def test_a_push_removes_no_package_that_the_stack_does_not_give_up(lab: Lab) -> None:
    host = "smtp-out-ash"
    done = lab.push(host, with_opensmtpd)
    assert done.returncode == 1
    assert "packages opensmtpd were not installed" in done.stderr and "postfix" in done.stderr
    assert lab.run(host, "systemctl", "is-active", lab.postfix(host), "dovecot").stdout.split() == ["active"] * 2


def with_trial(bundle: dict[str, Any]) -> None:
    bundle["packages"].append(repository.TRIAL)
    bundle["files"]["/etc/nginx/nginx.conf"]["content"] += "# changed\n"


def test_a_push_whose_packages_cannot_be_had_leaves_the_host_as_it_was(lab: Lab) -> None:
    host = "frontend-ash"
    before = lab.run(host, "sha256sum", "/etc/nginx/nginx.conf").stdout
    lab.run(host, "sh", "-c", "rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb")
    with stopped(lab, "nginx", internet.NAME):
        done = lab.push(host, with_trial)
    assert done.returncode == 1
    assert f"{host}: packages {repository.TRIAL} could not be installed, nothing was changed" in done.stderr
    assert "packages.example" in done.stderr and "Traceback" not in done.stderr
    assert lab.run(host, "sha256sum", "/etc/nginx/nginx.conf").stdout == before
    assert lab.run(host, "systemctl", "is-active", "nginx").stdout.strip() == "active"


def test_security_updates_come_by_themselves(lab: Lab) -> None:
    host, fqdn = "frontend-ash", "frontend.ash.net.hill.example"

    def version() -> str:
        return str(lab.run(host, "dpkg-query", "-W", "-f", "${Version}", repository.TRIAL).stdout)

    lab.run(host, "apt-get", "-q", "update")
    lab.run(host, "apt-get", "-q", "-y", "install", f"{repository.TRIAL}=1")
    assert version() == "1"
    try:
        # What the timers do once a day. A stamp of the same day would keep them from it.
        lab.run(host, "sh", "-c", "rm -f /var/lib/apt/periodic/*")
        lab.run(host, "systemctl", "start", "apt-daily.service", "apt-daily-upgrade.service")
        eventually(lambda: version() == "2")
        # And the postmaster reads of it.
        told = ("doveadm", "search", "-u", "ann", "from", f"root@{fqdn}", "subject", "unattended-upgrades")
        eventually(lambda: lab.run("maildrop-oak", *told).stdout.strip())
    finally:
        lab.run(host, "apt-get", "-q", "-y", "purge", repository.TRIAL)
