"""A small Debian repository that the lab serves: what hosts install at a push, and a security update.

Made once per image and kept in the cache beside it: packages that the image does not carry, with what they depend on,
and a package that does nothing, in two versions, the later of which is a security update. Signed with a key of its own
(apt-secure(8)), which the hosts get with their package sources; nothing of it leads to the world.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.state import LabError
from ops.stackfile import write_atomically

OFFERED = ("opensmtpd",)
"""What the stack's hosts install at a push. All else is in the image, to save the time."""
TRIAL = "posthorn-trial"
"""A package that does nothing. Version 1 is in the release, version 2 in its security updates."""
HOST = "packages.example"
KEY = "etc/apt/keyrings/lab.asc"
ARCHITECTURE = "amd64"


def folder(image: Path) -> Path:
    """Where the repository of an image (a folder of `lab.image`) lies, whether it was made or not."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return image.with_name(f"repository-{image.name}-{recipe}")


def host_files(image: Path) -> Mapping[str, str]:
    """The package sources of a machine made of an image, and the key that they are signed with: path to text."""
    made = folder(image)
    signed = f"[signed-by=/{KEY}]"
    suites = [path.name for path in sorted((made / "dists").iterdir())]
    # In place of the sources that the image itself was made from.
    sources = "".join(f"deb {signed} http://{HOST} {suite} main\n" for suite in suites)
    return {"etc/apt/sources.list.d/0000sources.list": sources, KEY: (made / "key.asc").read_text()}


def make(image: Path, suite: str, sources: str) -> Path:
    """The repository of an image, made when the cache has none.

    ``suite`` names its Debian release, ``sources`` are this machine's own package sources for it (sources.list(5)).
    Raises `LabError` with what the failing program said.
    """
    made = folder(image)
    if made.exists():
        return made
    half = made.with_name(f".{made.name}")
    shutil.rmtree(half, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for version, part, label in (("1", suite, "Debian"), ("2", f"{suite}-security", "Debian-Security")):
            pool = half / "pool" / part
            pool.mkdir(parents=True)
            _build_trial(version, pool, scratch)
            if part == suite:
                _download(image / "root", sources, pool, scratch)
            _index(half, part, label)
        _sign(half, scratch)
    half.rename(made)
    return made


def _run(command: Sequence[str | Path], **options: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise LabError(f"the lab's packages: {' '.join(words[:4])}: {done.stderr.strip()[-2000:]}")
    return str(done.stdout)


def _download(root: Path, sources: str, pool: Path, scratch: Path) -> None:
    """What the image lacks, as apt finds it: with the image's own list of what is installed."""
    for part in ("lists/partial", "archives/partial"):
        (scratch / part).mkdir(parents=True)
    (scratch / "sources.list").write_text(sources)
    settings = {
        "APT::Architecture": ARCHITECTURE,
        "APT::Sandbox::User": "root",
        "Dir::Etc::SourceList": scratch / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::TrustedParts": root / "etc/apt/trusted.gpg.d",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::status": root / "var/lib/dpkg/status",
        "Dir::Cache": scratch,
        "Dir::Cache::archives": scratch / "archives",
    }
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in settings.items())]
    _run([*apt, "update"])
    _run([*apt, "install", "--yes", "--download-only", "--no-install-recommends", *OFFERED])
    for package in (scratch / "archives").glob("*.deb"):
        shutil.copy(package, pool)


def _build_trial(version: str, pool: Path, scratch: Path) -> None:
    tree = scratch / f"{TRIAL}-{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = {
        "Package": TRIAL,
        "Version": version,
        "Architecture": "all",
        "Maintainer": "The lab <postmaster@hill.example>",
        "Description": "does nothing, and is updated",
    }
    (tree / "DEBIAN" / "control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    _run(["dpkg-deb", "--root-owner-group", "--build", tree, pool / f"{TRIAL}_{version}_all.deb"])


def _index(top: Path, suite: str, label: str) -> None:
    """Packages and Release of a suite (the format is that of Debian's wiki, DebianRepository/Format)."""
    paragraphs = []
    for package in sorted((top / "pool" / suite).glob("*.deb")):
        content = package.read_bytes()
        fields = _run(["dpkg-deb", "--field", package]).rstrip("\n")
        digest = hashlib.sha256(content).hexdigest()
        where = package.relative_to(top)
        paragraphs.append(f"{fields}\nFilename: {where}\nSize: {len(content)}\nSHA256: {digest}\n")
    index = f"main/binary-{ARCHITECTURE}/Packages"
    listed = "\n".join(paragraphs).encode()
    release = top / "dists" / suite
    (release / index).parent.mkdir(parents=True)
    (release / index).write_bytes(listed)
    fields = (
        f"Origin: Debian\nLabel: {label}\nSuite: {suite}\nCodename: {suite}\n"
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S UTC', time.gmtime())}\n"
        f"Architectures: {ARCHITECTURE} all\nComponents: main\n"
        f"SHA256:\n {hashlib.sha256(listed).hexdigest()} {len(listed)} {index}\n"
    )
    (release / "Release").write_text(fields)


def _sign(top: Path, scratch: Path) -> None:
    home = scratch / "gpg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    try:
        _run([*gpg, "--quick-generate-key", "lab", "ed25519", "sign", "never"])
        for release in sorted(top.glob("dists/*/Release")):
            _run([*gpg, "--clearsign", "--output", release.with_name("InRelease"), release])
            release.unlink()
        write_atomically(top / "key.asc", _run([*gpg, "--armor", "--export"]))
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], capture_output=True)
