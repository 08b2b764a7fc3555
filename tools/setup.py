"""Sets up a Debian machine to run the project, and runs a command in what was set up.

Standard library only: it has to run before anything is there. Every phase says that it is alive and how long it took,
and does nothing where nothing is to be done.

    python3 tools/setup.py                          set up what the commands of an operator need
    python3 tools/setup.py --machines vms           and what the lab needs
    python3 tools/setup.py run [--machines …] -- COMMAND …
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GO = ROOT / "tools" / "go"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posthorn"
STATE = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "posthorn"

PULUMI_VERSION = "3.255.0"
PLUGINS = {"command": "1.2.1", "libvirt": "0.5.4"}
LANGUAGE_HOST = "github.com/pulumi/pulumi/sdk/v3/python/cmd/pulumi-language-python"
GO_VERSION = (1, 26)
PULUMI_DOWNLOADS = "https://get.pulumi.com/releases/sdk"
DOWNLOAD_SECONDS = 5

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
NOTHING_STARTS = "#!/bin/sh\n# Of Posthorn, as long as it sets this machine up.\nexit 101\n"
BROWSER = ("chromium-driver", "libnss3-tools")
"""What the tests of the web mail need beside: a real browser, and how it is told whom to believe."""


class SetupFailed(Exception):
    """The machine cannot be set up: the message says why, and what to do."""


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

    @classmethod
    def here(cls) -> Machine:
        release: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in Path("/etc/os-release").read_text().splitlines():
                key, _, value = line.partition("=")
                release[key] = value.strip('"')
        existing = next(path for path in (CACHE, *CACHE.parents) if path.exists())
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


def call(*command: str, log: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Runs a command with its output in a log file. Raises `SetupFailed` with the end of it."""
    LOGS.mkdir(parents=True, exist_ok=True)
    file = LOGS / f"{log}.log"
    with file.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=env
        )
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in file.read_text(errors="replace").splitlines()[-12:])
        raise SetupFailed(f"{' '.join(command[:4])} … failed ({file}):\n{tail}")


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
        raise SetupFailed(f"these Debian packages are missing: apt-get install {' '.join(missing)}")
    with phase(f"Debian packages ({len(missing)})"), no_service_starts():
        units_before = _enabled_units()
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        call("apt-get", "update", "-q", log="apt-update", env=env)
        # What a set-up that was killed left half done is finished first, and its apt waited for where it still works.
        subprocess.run(["dpkg", "--configure", "--pending"], capture_output=True, env=env)
        options = ("-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300")
        install = ("apt-get", "install", "-q", "-y", "--no-install-recommends", *options)
        call(*install, *missing, log="apt-install", env=env)
        # A service that came with a package is not to start at the next boot either.
        for unit in sorted(_enabled_units() - units_before):
            subprocess.run(["systemctl", "disable", unit], capture_output=True)


def _enabled_units() -> set[str]:
    listed = subprocess.run(
        ["systemctl", "list-unit-files", "--state=enabled", "--no-legend", "--plain"], capture_output=True, text=True
    )
    return {line.split()[0] for line in listed.stdout.splitlines() if line}


def _digest(*paths: Path) -> str:
    summed = hashlib.sha256(sys.version.encode())
    for path in sorted(paths):
        summed.update(path.name.encode() + path.read_bytes())
    return summed.hexdigest()[:12]


def python_environment() -> Path:
    """The folder of the locked virtual environment, made when it is missing."""
    lock = ROOT / "requirements.lock"
    folder = CACHE / f"venv-{_digest(lock)}"
    stamp = folder / "complete"
    if stamp.exists():
        return folder
    with phase("Python environment"):
        shutil.rmtree(folder, ignore_errors=True)
        call(sys.executable, "-m", "venv", str(folder), log="venv")
        pip = (str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "--no-input")
        call(*pip, "--require-hashes", "-r", str(lock), log="pip")
        stamp.touch()
    return folder


def _go() -> str:
    """A Go tool chain: the one on the PATH when it is new enough, else one from a Python package."""
    found = shutil.which("go")
    if found:
        words = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True).stdout.strip()
        if tuple(int(part) for part in words.removeprefix("go").split(".")[:2] if part.isdigit()) >= GO_VERSION:
            return found
    folder = CACHE / "go"
    binary = folder / "bin" / "go"
    if not binary.exists():
        with phase("Go"):
            shutil.rmtree(folder, ignore_errors=True)
            call(sys.executable, "-m", "venv", str(folder), log="go-venv")
            call(
                str(folder / "bin" / "pip"),
                "install",
                "--quiet",
                "--require-hashes",
                "-r",
                str(GO / "requirements.txt"),
                log="go",
            )
    return str(binary)


def _build(name: str, module: str, package: str, output: Path) -> None:
    go = _go()
    with phase(f"build {name}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly", "CGO_ENABLED": "0"}
        half_done = output.with_suffix(".part")
        call(go, "build", "-o", str(half_done), package, log=f"build-{name}", env=env, cwd=GO / module)
        half_done.replace(output)


def _module_folder(module: str, path: str) -> Path:
    env = {**os.environ, "GOFLAGS": "-mod=readonly"}
    done = subprocess.run(
        [_go(), "list", "-m", "-f", "{{.Dir}}", path], cwd=GO / module, env=env, capture_output=True, text=True
    )
    return Path(done.stdout.strip())


def _version(command: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run([command, "version"], capture_output=True, text=True).stdout.strip().removeprefix("v")
    return ""


def _download_pulumi(folder: Path) -> bool:
    """Puts the official Pulumi into a folder, where its server is reached, checked against its published sums."""
    archive = f"pulumi-v{PULUMI_VERSION}-linux-x64.tar.gz"
    try:
        with urllib.request.urlopen(
            f"{PULUMI_DOWNLOADS}/pulumi-{PULUMI_VERSION}-checksums.txt", timeout=DOWNLOAD_SECONDS
        ) as answer:
            sums = dict(reversed(line.split()) for line in answer.read().decode().splitlines() if line.strip())
        with (
            urllib.request.urlopen(f"{PULUMI_DOWNLOADS}/{archive}", timeout=60) as answer,
            tempfile.NamedTemporaryFile(dir=folder) as file,
        ):
            shutil.copyfileobj(answer, file)
            file.flush()
            content = Path(file.name).read_bytes()
            length = len(sums[archive])
            found = (hashlib.sha512 if length == 128 else hashlib.sha256)(content).hexdigest()
            if found != sums[archive]:
                raise SetupFailed(f"{archive} is not what its publisher says it is: sum {found}, not {sums[archive]}")
            with tarfile.open(file.name) as tar:
                for member in tar.getmembers():
                    if member.isfile():
                        member.name = Path(member.name).name
                        tar.extract(member, folder, filter="data")
    except (urllib.error.URLError, OSError, KeyError):
        return False
    return True


WRAPPER = """#!/bin/sh
# Starts the language host with the environment that the command runs in.
exec "$(dirname "$0")/language-host/pulumi-language-python" "-virtualenv=$VIRTUAL_ENV" "$@"
"""


def _build_pulumi(folder: Path) -> None:
    """Builds Pulumi and its host for Python programs from Go modules."""
    _build("pulumi", "pulumi", "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi", folder / "pulumi")
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


def pulumi(plugins: Sequence[str]) -> tuple[Path | None, Path]:
    """Pulumi and its plugins: (the folder of its programs, or None when it is on the PATH; its home)."""
    home = CACHE / "pulumi-home"
    folder = CACHE / f"pulumi-{_digest(*GO.rglob('go.sum'), *GO.rglob('*.go'))}"
    stamp = folder / "complete"
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        on_path = _version("pulumi") == PULUMI_VERSION
        if not on_path:
            with phase("download Pulumi"):
                downloaded = _download_pulumi(folder)
            if not downloaded:
                say("  its server is not reached from here: it is built from Go modules")
                _build_pulumi(folder)
        stamp.write_text(json.dumps({"on_path": on_path}))
    programs = None if json.loads(stamp.read_text())["on_path"] else folder
    for name in plugins:
        if not (home / "plugins" / f"resource-{name}-v{PLUGINS[name]}").is_dir():
            _plugin(name, PLUGINS[name], folder, {**os.environ, **_environment(None, programs, home)})
    return programs, home


def _plugin(name: str, version: str, folder: Path, environment: dict[str, str]) -> None:
    binary = shutil.which("pulumi", path=environment["PATH"]) or "pulumi"
    install = [binary, "plugin", "install", "resource", name, version]
    with contextlib.suppress(subprocess.TimeoutExpired):
        # Only a server that is reached at all is worth waiting for.
        online = subprocess.run(install, env=environment, capture_output=True, timeout=180 if _reached() else 0.01)
        if online.returncode == 0:
            return
    # Not on the PATH: Pulumi would take it from there, and say so each time.
    built = folder / "plugins" / f"pulumi-resource-{name}"
    module, package = {"command": ("pulumi", "./command"), "libvirt": ("libvirt", ".")}[name]
    if not built.exists():
        _build(f"plugin {name}", module, package, built)
    call(*install, "--file", str(built), "--reinstall", log=f"plugin-{name}", env=environment)


def _reached() -> bool:
    try:
        urllib.request.urlopen(PULUMI_DOWNLOADS, timeout=DOWNLOAD_SECONDS)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _environment(venv: Path | None, programs: Path | None, home: Path) -> dict[str, str]:
    folders = [str(venv / "bin")] if venv else []
    folders += [str(programs)] if programs else []
    # /usr/sbin: ip, nft and sshd are there, and not on everybody's PATH.
    variables = {
        "PATH": os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        "PULUMI_HOME": str(home),
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
            programs, home = pulumi(("command", "libvirt") if libvirt else ("command",))
    return _environment(venv, programs, home)


def main(arguments: Sequence[str]) -> int:
    """Sets up, and runs a command when one is given. Returns the exit status."""
    own, dashes, command = list(arguments), "--" in arguments, list[str]()
    if dashes:
        split = own.index("--")
        own, command = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run",))
    parser.add_argument("--machines", choices=("containers", "vms"), default="")
    parser.add_argument("--libvirt", action="store_true", help="the plugin that makes machines on hypervisors")
    parser.add_argument("--browser", action="store_true", help="the browser of the tests")
    options = parser.parse_args(own)
    libvirt = options.libvirt or options.machines == "vms"
    try:
        variables = set_up(options.machines, libvirt=libvirt, browser=options.browser)
    except SetupFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    if command:
        os.chdir(ROOT)
        phases = json.dumps([vars(p) for p in PHASES])
        os.execvpe(command[0], command, {**os.environ, **variables, "POSTHORN_SETUP_PHASES": phases})
    say(f"ready: {len(PHASES)} phases had something to do")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
