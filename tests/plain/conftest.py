"""A Debian that has never seen the project, and a server that has Pulumi as its publisher does."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import http.server
import os
import shlex
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import image
from lab.state import CACHE
from tools import setup

ROOT = Path(__file__).parent.parent.parent
RELEASE = int(os.environ.get("POSTHORN_RELEASE") or 12)
PACKAGES = ("make", "python3")
"""What the README has an operator install."""
CHECKOUT = "/srv/my post horn"
"""With spaces: everything that is run from it has to bear them."""

ENTER = """set -eu
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK" "$MERGED"
mount -t proc proc "$MERGED/proc"
mount --rbind /dev "$MERGED/dev"
mount -t tmpfs tmpfs "$MERGED/run"
mkdir -p "$MERGED/usr/local/share/ca-certificates" "$MERGED/var/cache/pip"
touch "$MERGED/etc/resolv.conf"
mount --bind /etc/resolv.conf "$MERGED/etc/resolv.conf"
mount --bind /usr/local/share/ca-certificates "$MERGED/usr/local/share/ca-certificates"
mount --bind "$ARCHIVES" "$MERGED/var/cache/apt/archives"
mount --bind "$WHEELS" "$MERGED/var/cache/pip"
exec chroot "$MERGED" "$@"
"""


def _image() -> Path:
    """The smallest Debian with what the README asks for, made once."""
    sources = image.debian_sources(image.SUITES[RELEASE])
    digest = hashlib.sha256(repr((sources, PACKAGES)).encode()).hexdigest()[:12]
    folder = CACHE / "images" / f"plain-{RELEASE}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "archives" / "partial").mkdir(parents=True)
            (folder / "sources.list").write_text(sources)
            command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
            # As on a machine where apt-get update was never run.
            command += [
                '--customize-hook=rm -rf "$1"/var/lib/apt/lists/*',
                '--customize-hook=chroot "$1" useradd -m olga',
            ]
            command += [image.SUITES[RELEASE], str(folder / "root"), str(folder / "sources.list")]
            subprocess.run(command, check=True, capture_output=True)
            (folder / "complete").touch()
        os.utime(folder)
    return folder


@dataclass(frozen=True)
class Plain:
    """A machine with a checkout of the project and nothing else. What a command leaves stays for the next one."""

    image: Path
    folder: Path
    mirror: str

    def run(
        self, script: str, variables: Mapping[str, str] = {}, *, user: str = "root", network: bool = True
    ) -> tuple[int, str]:
        """Runs a script of the shell in the checkout, as one types it: (its exit status, all that it printed)."""
        home = {"root": "/root", "nobody": "/nonexistent"}.get(user, f"/home/{user}")
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": home,
            "POSTHORN_PULUMI_MIRROR": self.mirror,
            "PIP_CACHE_DIR": "/var/cache/pip",
            # How this machine's own pip finds its packages.
            **{name: value for name, value in os.environ.items() if name in ("PIP_INDEX_URL", "PIP_CERT", "PIP_PROXY")},
            **variables,
        }
        words = [f"{name}={value}" for name, value in environment.items()]
        command = ["/usr/bin/env", "-i", *words, "sh", "-c", f"cd {shlex.quote(CHECKOUT)} && {script}"]
        if user != "root":
            command = ["/usr/sbin/runuser", "-u", user, "--", *command]
        unshare = ["unshare", "--mount", "--pid", "--fork", *([] if network else ["--net"])]
        wheels = Path.home() / ".cache" / "pip"
        wheels.mkdir(parents=True, exist_ok=True)
        places = {
            "LOWER": self.image / "root",
            "UPPER": self.folder / "upper",
            "WORK": self.folder / "work",
            "MERGED": self.folder / "merged",
            "ARCHIVES": self.image / "archives",
            "WHEELS": wheels,
        }
        done = subprocess.run(
            [*unshare, "sh", "-c", ENTER, "enter", *command],
            env={**os.environ, **{name: str(path) for name, path in places.items()}},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert "Traceback" not in done.stdout, done.stdout
        return done.returncode, done.stdout

    def write(self, name: str, text: str) -> None:
        """Writes a file of the checkout."""
        (self.folder / "upper" / CHECKOUT[1:] / name).write_text(text)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


def _pack(archive: Path, files: dict[str, Path]) -> str:
    """Makes an archive, and returns the line of sha256sum about it."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, file in files.items():
            tar.add(file, name)
    return f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n"


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server on loopback with the archives of Pulumi and its plugins: (its address, the sums of sha256sum).

    They are made of this machine's own, whether those were downloaded or built, in the layout of their publisher.
    """
    served = tmp_path_factory.mktemp("releases")
    programs = Path(shutil.which("pulumi") or "pulumi").parent
    host = programs / "language-host" / "pulumi-language-python"
    files = {f"pulumi/{path.name}": path for path in programs.glob("pulumi*")}
    if host.exists():
        files |= {f"pulumi/{path.name}": path for path in host.parent.iterdir()}
    sums = _pack(served / "sdk" / setup.archives()["sdk/pulumi"], files)
    (served / "sdk" / f"pulumi-{setup.PULUMI_VERSION}-checksums.txt").write_text(sums)
    for name, version in setup.PLUGINS.items():
        folder = Path(os.environ["PULUMI_HOME"], "plugins", f"resource-{name}-v{version}")
        if folder.exists():
            plugin = {path.name: path for path in folder.iterdir() if path.is_file()}
            sums += _pack(served / "plugins" / setup.archives()[f"plugins/{name}"], plugin)
    handler = functools.partial(_Quiet, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sums
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def plain(mirror: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """A plain Debian with a clean checkout."""
    folder = tmp_path_factory.mktemp("plain")
    for name in ("upper", "work", "merged"):
        (folder / name).mkdir()
    checkout = folder / "upper" / CHECKOUT[1:]
    checkout.mkdir(parents=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    copied = subprocess.run(["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=names, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "--no-same-owner", "-C", str(checkout)], input=copied.stdout, check=True)
    yield Plain(_image(), folder, mirror[0])
    shutil.rmtree(folder)
