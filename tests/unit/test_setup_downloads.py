"""Pulumi and its plugins, from a server that has them as their publisher does, and from servers that do not."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools import setup

SDK = f"sdk/pulumi-v{setup.PULUMI_VERSION}-linux-x64.tar.gz"
SUMS = f"sdk/pulumi-{setup.PULUMI_VERSION}-checksums.txt"
COMMAND = f"plugins/pulumi-resource-command-v{setup.PLUGINS['command']}-linux-amd64.tar.gz"
PULUMI = f"""#!/bin/sh
case "$1" in
version) echo v{setup.PULUMI_VERSION};;
plugin) mkdir -p "$PULUMI_HOME/plugins/resource-$4-v$5" && tar -xzf "$8" -C "$PULUMI_HOME/plugins/resource-$4-v$5";;
esac
"""
"""As much of Pulumi as a set-up calls."""


def _archive(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


@dataclass
class Releases:
    """What a server has, by its path below the releases, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    """The length that is told where it is not the real one."""
    asked: list[str] = field(default_factory=list)

    def publish(self, path: str, content: bytes, summed: bytes | None = None) -> None:
        self.files[path] = content
        if path.startswith("sdk/"):
            line = f"{hashlib.sha256(content if summed is None else summed).hexdigest()}  {Path(path).name}\n"
            self.files[SUMS] = line.encode()


class _Server(http.server.BaseHTTPRequestHandler):
    def __init__(self, releases: Releases, *arguments: object) -> None:
        self.releases = releases
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.path.removeprefix("/releases/")
        self.releases.asked.append(path)
        content = self.releases.files.get(path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.releases.lengths.get(path, len(content))))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Releases]:
    """A server on loopback with the official layout, named as a mirror; nothing is in the cache, nothing pinned."""
    served = Releases()
    served.publish(SDK, _archive({"pulumi/pulumi": PULUMI, "pulumi/pulumi-language-python": "#!/bin/sh\n"}))
    served.publish(COMMAND, _archive({"pulumi-resource-command": "#!/bin/sh\n", "LICENSE": "free"}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Server, served))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(setup, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(setup, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(setup, "SUMS", tmp_path / "sums.txt")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "MIRROR", f"http://127.0.0.1:{server.server_port}/releases")
    (tmp_path / "sums.txt").write_text("# a comment\n")
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was built from Go modules, in place of building it."""
    named: list[str] = []

    def build_pulumi(folder: Path) -> None:
        named.append("pulumi")
        (folder / "pulumi").write_text(PULUMI)
        (folder / "pulumi").chmod(0o755)

    def build(name: str, module: str, package: str, output: Path, *linked: str) -> None:
        named.append(name)
        output.write_bytes(_archive({output.name: "#!/bin/sh\n"}))

    monkeypatch.setattr(setup, "_build_pulumi", build_pulumi)
    monkeypatch.setattr(setup, "_build", build)
    return named


def _pin(content: bytes, path: str) -> None:
    with setup.SUMS.open("a") as file:
        file.write(f"{hashlib.sha256(content).hexdigest()}  {Path(path).name}\n")


def test_pulumi_and_its_plugin_are_downloaded_where_their_publisher_has_them(
    releases: Releases, built: list[str]
) -> None:
    folder = setup.pulumi(("command",))
    assert os.access(folder / "pulumi", os.X_OK) and os.access(folder / "pulumi-language-python", os.X_OK)
    plugins = folder / "home" / "plugins"
    assert (plugins / f"resource-command-v{setup.PLUGINS['command']}" / "pulumi-resource-command").exists()
    assert releases.asked == [SUMS, SDK, COMMAND] and not built
    assert setup.pulumi(("command",)) == folder
    assert len(releases.asked) == 3, "a second set-up asks for nothing"


def test_what_is_pinned_needs_no_list_of_sums(releases: Releases, built: list[str]) -> None:
    _pin(releases.files[SDK], SDK)
    _pin(releases.files[COMMAND], COMMAND)
    setup.pulumi(("command",))
    assert releases.asked == [SDK, COMMAND]


@pytest.mark.parametrize("is_mirror", [True, False])
def test_a_wrong_sum_ends_a_set_up_and_is_never_a_reason_to_build(
    releases: Releases, built: list[str], is_mirror: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "PULUMI_RELEASES", setup.MIRROR)
    monkeypatch.setattr(setup, "MIRROR", setup.MIRROR if is_mirror else "")
    releases.publish(SDK, releases.files[SDK], summed=b"another archive")
    with pytest.raises(setup.SetupFailed, match=r"was downloaded, and is not what http\S+checksums.txt says"):
        setup.pulumi(())
    assert not built and not list(setup.CACHE.glob("*/complete")) and not list(setup.CACHE.glob("*/pulumi"))


def test_a_plugin_is_installed_again_where_pulumi_was_killed_while_it_unpacked_it(
    releases: Releases, built: list[str]
) -> None:
    folder = setup.pulumi(["command"])
    there = folder / "home" / "plugins" / f"resource-command-v{setup.PLUGINS['command']}"
    (there / "pulumi-resource-command").unlink()
    there.with_name(f"{there.name}.partial").touch()
    setup.pulumi(["command"])
    assert (there / "pulumi-resource-command").exists() and not built


def test_a_plugin_that_is_not_the_pinned_one_is_refused(releases: Releases, built: list[str]) -> None:
    _pin(b"another archive", COMMAND)
    with pytest.raises(setup.SetupFailed, match=r"command-v\S+ was downloaded, and is not what sums.txt says"):
        setup.pulumi(("command",))
    assert not built and not list(setup.CACHE.glob("*/home/plugins/resource-*"))


def test_an_archive_that_its_publisher_has_no_sum_of_is_not_taken(releases: Releases, built: list[str]) -> None:
    releases.files[SUMS] = b"00  another.tar.gz\n"
    with pytest.raises(setup.SetupFailed, match=r"checksums.txt has no sum of pulumi-v"):
        setup.pulumi(())
    assert SDK not in releases.asked


@pytest.mark.parametrize("path", [SDK, COMMAND])
def test_a_mirror_that_lacks_something_is_told_and_nothing_is_built(
    releases: Releases, built: list[str], path: str
) -> None:
    del releases.files[path]
    with pytest.raises(setup.SetupFailed, match=r"POSTHORN_PULUMI_MIRROR names: \S+/releases/\S+ answers 404"):
        setup.pulumi(("command",))
    assert not built


def test_what_its_publisher_does_not_have_is_built_and_that_is_said(
    releases: Releases, built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "PULUMI_RELEASES", setup.MIRROR)
    monkeypatch.setattr(setup, "MIRROR", "")
    releases.files.clear()
    setup.pulumi(("command",))
    assert built == ["pulumi", "plugin command"]
    said = capsys.readouterr().err
    assert "Pulumi cannot be downloaded: http://127.0.0.1" in said and "answers 404" in said
    assert "the plugin command cannot be downloaded" in said and "It is built from Go modules instead" in said


def test_a_publisher_that_is_not_reached_is_told_from_one_that_answers(
    releases: Releases, built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "PULUMI_RELEASES", "http://127.0.0.1:1/releases")
    monkeypatch.setattr(setup, "MIRROR", "")
    setup.pulumi(())
    assert built == ["pulumi"] and "is not reached (" in capsys.readouterr().err


@pytest.mark.parametrize("path", [SUMS, SDK, COMMAND])
def test_a_download_that_breaks_off_is_told_so_and_not_taken_for_a_wrong_archive(
    releases: Releases, built: list[str], path: str
) -> None:
    releases.lengths[path] = len(releases.files[path]) + 1000
    with pytest.raises(setup.SetupFailed, match=r"broke off after \d+ of \d+ bytes: run this again"):
        setup.pulumi(("command",))
    assert not built
    del releases.lengths[path]
    setup.pulumi(("command",))


def test_what_is_no_archive_is_told_in_a_sentence(releases: Releases, built: list[str]) -> None:
    for content in (b"<html>Please log in</html>", releases.files[SDK][:-40]):
        releases.publish(SDK, content)
        with pytest.raises(setup.SetupFailed, match=r"the archive of Pulumi cannot be unpacked \("):
            setup.pulumi(())


def test_another_pulumi_than_the_named_one_is_not_used(releases: Releases, built: list[str]) -> None:
    releases.publish(SDK, _archive({"pulumi/pulumi": "#!/bin/sh\necho v3.0.0\n"}))
    with pytest.raises(
        setup.SetupFailed, match=rf"does not run here as Pulumi {setup.PULUMI_VERSION}, it says: v3.0.0"
    ):
        setup.pulumi(())
    assert not list(setup.CACHE.glob("*/complete"))


def test_nothing_of_an_archive_lands_outside_its_folder(releases: Releases, built: list[str]) -> None:
    releases.publish(SDK, _archive({"pulumi/pulumi": PULUMI, "../../../outside": "x", "/outside": "x"}))
    folder = setup.pulumi(())
    assert (folder / "outside").exists() and not (setup.CACHE.parent / "outside").exists()


@pytest.mark.parametrize("mirror", ["no-address", "file-server/releases", "gopher://127.0.0.1/"])
def test_a_mirror_that_is_no_address_is_told(
    releases: Releases, built: list[str], mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "MIRROR", mirror)
    with pytest.raises(setup.SetupFailed, match="POSTHORN_PULUMI_MIRROR"):
        setup.pulumi(())


def test_the_sums_of_all_archives_are_pinned_by_a_command(releases: Releases) -> None:
    libvirt = setup.archives()["plugins/libvirt"]
    releases.publish(f"plugins/{libvirt}", b"libvirt")
    assert setup.main(["sums"]) == 0
    lines = setup.SUMS.read_text().splitlines()
    assert lines[0] == "# a comment" and len(lines) == 4
    assert setup.pinned()[libvirt] == hashlib.sha256(b"libvirt").hexdigest()
    releases.publish(f"plugins/{libvirt}", b"something else")
    assert setup.main(["sums"]) == 1, "a sum that is pinned is never replaced in silence"
