"""The cache of the lab's images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab import image, up
from lab.__main__ import main
from lab.state import LabError

DAY = 86400.0


def test_an_image_that_no_lab_was_started_from_for_a_month_is_removed(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    for name, days in (("debian-12-old", 31), ("debian-12-used", 2), ("vm-old", 40)):
        (tmp_path / name / "root").mkdir(parents=True)
        os.utime(tmp_path / name, (now - days * DAY,) * 2)
    (tmp_path / "debian-12-old.lock").touch()
    os.utime(tmp_path / "debian-12-old.lock", (now - 31 * DAY,) * 2)
    removed = [path.name for path in image.forget(tmp_path, now)]
    assert removed == ["debian-12-old", "debian-12-old.lock", "vm-old"]
    assert [path.name for path in tmp_path.iterdir()] == ["debian-12-used"]


def test_starting_a_lab_keeps_its_image(tmp_path: Path) -> None:
    used = tmp_path / "debian-12-x"
    used.mkdir()
    os.utime(used, (0, 0))
    image.note_use(used)
    assert not image.forget(tmp_path, used.stat().st_mtime + DAY) and used.exists()


def test_the_lab_s_files_can_be_read_by_daemons_whatever_the_operator_s_umask_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(up, "status", lambda console: (tmp_path / "file").touch())
    before = os.umask(0o077)
    try:
        assert main(["status"]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


CLOUD = """\
Types: deb deb-src
URIs: mirror+file://{etc}/mirrors/debian.list
Suites: trixie trixie-updates trixie-backports
Components: main

Types: deb deb-src
URIs: mirror+file://{etc}/mirrors/debian-security.list
Suites: trixie-security
Components: main
"""
DOCKER = "deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.asc] https://docker.example/linux/debian bookworm stable\n"
COUNTRY = """\
deb http://ftp.country.example/debian/ bookworm main non-free-firmware
deb-src http://ftp.country.example/debian/ bookworm main
# deb http://old.example/debian-security bookworm-security main
deb http://ftp.country.example/debian/ bookworm-updates main
deb http://security.example/debian-security bookworm-security main # by the installer
"""
SOURCES = {
    "Debian's cloud image": (
        {
            "sources.list": "# See /etc/apt/sources.list.d/debian.sources\n",
            "sources.list.d/debian.sources": CLOUD,
            "mirrors/debian.list": "https://cloud.example/debian\n",
            "mirrors/debian-security.list": "# one\nhttps://cloud.example/debian-security\tpriority:1\n",
        },
        "https://cloud.example/debian",
        "https://cloud.example/debian-security",
    ),
    "a provider's mirror, in lines": (
        {
            "sources.list": "",
            "sources.list.d/provider.list": (
                "deb https://mirror.example/debian/packages bookworm main contrib\n"
                "deb https://mirror.example/debian/packages bookworm-backports main\n"
                "deb https://mirror.example/debian/security bookworm-security main contrib\n"
            ),
        },
        "https://mirror.example/debian/packages",
        "https://mirror.example/debian/security",
    ),
    "a provider's mirror, in stanzas": (
        {
            "sources.list.d/a.sources": (
                "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: stable\nComponents: main\n\n"
                "Types: deb\nURIs: https://mirror.example/debian/security\nSuites: stable-security\nComponents: main\n"
                "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n  \n"
                "types: deb\nuris:\n https://mirror.example/debian/packages\n#\nsuites: stable\n stable-updates\n"
                "components: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.pgp\n"
            )
        },
        "https://mirror.example/debian/packages",
        "https://mirror.example/debian/security",
    ),
    "somebody else's first": (
        {
            "sources.list": DOCKER + "deb [signed-by=/usr/share/keyrings/x.gpg] https://tools.example trixie main\n",
            "sources.list.d/debian.sources": (
                "Types: deb\nURIs: http://debian.example/debian\nSuites: trixie trixie-updates\nComponents: main\n\n"
                "Types: deb\nURIs: http://debian.example/debian-security\nSuites: trixie-security\nComponents: main\n"
            ),
            "sources.list.d/tools.sources": (
                "Types: deb\nURIs: https://tools.example\nSuites: trixie\nComponents: main\n"
                "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n"
            ),
            "sources.list.d/old.list.save": "deb http://old.example/debian trixie main\n",
        },
        "http://debian.example/debian",
        "http://debian.example/debian-security",
    ),
    "a country's mirror": (
        {"sources.list": COUNTRY},
        "http://ftp.country.example/debian/",
        "http://security.example/debian-security",
    ),
    "no security updates": (
        {"sources.list": "deb http://a.example/debian stable main\n"},
        "http://a.example/debian",
        "",
    ),
}


def apt(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("{etc}", str(folder)))
    return folder


@pytest.mark.parametrize(("texts", "mirror", "security"), SOURCES.values(), ids=SOURCES.keys())
def test_an_image_is_made_from_the_mirror_and_the_security_updates_that_the_machine_itself_has(
    tmp_path: Path, texts: dict[str, str], mirror: str, security: str
) -> None:
    expected = [f"deb {mirror} bookworm main", f"deb {mirror} bookworm-updates main"]
    expected += [f"deb {security} bookworm-security main"] if security else []
    assert image.debian_sources("bookworm", apt(tmp_path, texts)).splitlines() == expected


def test_a_machine_without_a_source_of_debian_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no package source of Debian"):
        image.debian_sources("bookworm", apt(tmp_path, {"sources.list": DOCKER}))
