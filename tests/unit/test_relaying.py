"""How mail hosts find scanners, sign, and know what other domains demand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from model.load import parse
from model.network import Role
from model.stack import Stack
from services import data_disk
from services.bundle import bundle
from services.zones import rrsets


def file(stack: Stack, host: str, path: str) -> str:
    content: str = bundle(stack, stack.all_hosts[host])["files"][path]["content"]
    return content


def test_all_mail_hosts_prefer_the_same_scanner(keyed_stack: Stack) -> None:
    hosts = (*keyed_stack.hosts_with(Role.SMTP_IN), *keyed_stack.hosts_with(Role.SMTP_OUT))
    texts = {file(keyed_stack, host.name, "/etc/haproxy/haproxy.cfg").partition("\n")[2] for host in hosts}
    (text,) = texts
    assert re.findall(r"^    server (\S+) (\S+)( backup)?$", text, re.MULTILINE) == [
        ("frontend-oak", "198.18.1.14:11333", ""),
        ("frontend-elm", "198.18.2.14:11333", " backup"),
        ("frontend-ash", "198.18.3.14:11333", " backup"),
    ]


def test_only_submission_hosts_hold_the_keys_of_all_domains(keyed_stack: Stack) -> None:
    for host in keyed_stack.all_hosts.values():
        held = [path for path in bundle(keyed_stack, host)["secrets"] if path.startswith("/etc/opendkim/keys/")]
        if host.has(Role.SMTP_OUT):
            assert len(held) == len(keyed_stack.sending_domains)
        elif host.has(Role.SMTP_IN):
            assert held == ["/etc/opendkim/keys/lab2026-hill.example.private"]
        else:
            assert not held


def test_a_key_is_published_before_a_host_signs_with_it(keyed_stack: Stack) -> None:
    keys = [rrset for rrset in rrsets(keyed_stack) if "._domainkey." in rrset.name]
    assert keys and {rrset.phase for rrset in keys} == {"internal"}


def test_every_daemon_is_started_again_and_nothing_that_only_runs_once(keyed_stack: Stack) -> None:
    for host in keyed_stack.all_hosts.values():
        pushed = bundle(keyed_stack, host)
        revived = {p.split("/")[-2].removesuffix(".d") for p in pushed["files"] if p.endswith(".d/revive.conf")}
        daemons = {unit for unit in pushed["units"] if unit.endswith(".service") and not unit.startswith("systemd-")}
        assert daemons - revived <= {
            "nftables.service",
            "postfix.service",
            "data-disk.service",
            "posthorn-logins.service",
        }
        assert "nftables.service" not in revived


def test_a_host_starts_without_its_data_disk_only_where_no_mail_lies_on_it(keyed_stack: Stack) -> None:
    for host in keyed_stack.all_hosts.values():
        pushed = bundle(keyed_stack, host)["files"]
        mounts = {p: f["content"] for p, f in pushed.items() if p.endswith(".mount")}
        keeps_mail = any(path.startswith(("/var/vmail", "/var/spool/postfix")) for path in data_disk.kept(host))
        wanted = "RequiredBy" if keeps_mail else "WantedBy"
        assert mounts and all(f"\n{wanted}=local-fs.target" in text for text in mounts.values())
        # What writes there starts after it all the same.
        assert all("Before=local-fs.target" in text for text in mounts.values())
    front = keyed_stack.all_hosts["frontend-oak"]
    drop_in = bundle(keyed_stack, front)["files"]["/etc/systemd/system/opensmtpd.service.d/posthorn.conf"]["content"]
    assert "[Unit]\n" in drop_in and "\nRequiresMountsFor=/var/spool/smtpd\n" in drop_in, (
        "its queue is there, or it waits"
    )
    assert not data_disk.needed(front)
    assert data_disk.needed(keyed_stack.all_hosts["maildrop-oak"])


def test_a_data_disk_is_made_anew_only_where_it_is_blank(keyed_stack: Stack, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    unit = file(keyed_stack, "maildrop-oak", f"/etc/systemd/system/{data_disk.FORMAT}").replace("\\\n", " ")
    (look,) = re.findall(r"^ExecStartPre=/bin/sh -c '(.*)'$", unit, re.MULTILINE)

    def may_be_made(at: int, text: bytes) -> bool:
        with disk.open("wb") as device:
            device.truncate(300 * 1024**2)
            device.seek(at)
            device.write(text)
        command = ["sh", "-c", look.replace(data_disk.DEVICE, str(disk))]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
        assert bool(done.returncode) == ("is not blank, and nothing is written there" in done.stderr), done.stderr
        return done.returncode == 0

    assert may_be_made(0, b"")
    # What ext4 has further on, behind a first block that is gone; and ext's signature, which systemd-makefs leaves.
    assert not may_be_made(200 * 1024**2, b"x") and not may_be_made(0, b"x" * 4096)
    assert may_be_made(1080, b"\x53\xef")


def test_a_private_internet_has_roots_of_its_own(keyed_config: dict[str, Any]) -> None:
    root = keyed_config["keys"]["public"]["authority"]
    config = {**keyed_config, "service": {**keyed_config["service"], "authorities": [root]}}
    stack = parse("lab", "Pulumi.lab.yaml", config)
    assert file(stack, "smtp-out-oak", "/etc/posthorn/roots.pem") == root
    assert "smtp_tls_CAfile = /etc/posthorn/roots.pem\n" in file(stack, "smtp-out-oak", "/etc/postfix/main.cf")
