"""Brings a host to what a bundle says. Runs on the host, as root, with Python's standard library alone.

The order is what makes it safe: packages that start nothing, files staged and checked by each service's own checker
in a private view of /etc, then atomic renames, then only those units touched whose files changed, then a real
transaction with each of them.

A push is a transaction. Before its first write it notes on disk what stands in each place, and that nobody knows any
more what the units run with that it is about to touch. Its last write ends that note. Whatever fails in between puts
files, secrets and units back together. A run that was killed leaves its note: the next one, with whatever bundle,
first puts the files back, and then touches those units.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import grp
import hashlib
import http.client
import ipaddress
import json
import os
import pwd
import re
import shutil
import smtplib
import socket
import ssl
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HOME = Path("/var/lib/posthorn")
AUTHORITY = "/etc/posthorn/authority.pem"
LOCK_SECONDS = 300
KEPT_VERSIONS = 2
AWAY = 1 << 30
"""Added to the number of an owner while files change hands: nobody has such a number."""
UNIT_FOLDER = "/etc/systemd/system/"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
IN_A_PUSH = "POSTHORN_PUSH"
"""A variable by which a package script knows that a push runs it."""
PATIENCE = 300
"""Seconds after which a command counts as hung. Copies and packages take as long as they are large."""
PATIENCE_WITH = {"apt-get": 3600, "dpkg": 3600, "cp": 3600, "unshare": 1800, "systemctl": 600}


class Failed(Exception):
    """The host could not be brought to what was asked: which service, which file, and in whose words."""


def say(line: str) -> None:
    print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Small tools


def run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command and returns what it said; never raises for its exit status. One that hangs is ended and named."""
    quiet = {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", "SYSTEMCTL_SKIP_SYSV": "1", IN_A_PUSH: "1"}
    environment = {**os.environ, **quiet}
    limit = PATIENCE_WITH.get(command[0], PATIENCE)
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment, errors="replace", timeout=limit
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: there is no such command")
    except subprocess.TimeoutExpired:
        name = " ".join(command).partition("\n")[0]
        return subprocess.CompletedProcess(command, 124, "", f"{name} had not ended after {limit} s")


def words(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed command said, without empty lines."""
    lines = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    return "\n".join(lines[-12:]) or f"exit status {done.returncode}"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an error of the system name the file, and the file system where that is full: a full disk names neither."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        said = os.strerror(error.errno)
        if error.errno in FULL:
            said += f" (file system {next(folder for folder in (path, *path.parents) if os.path.ismount(folder))})"
        raise OSError(error.errno, said, str(path)) from error


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_at(path: Path) -> Iterator[tuple[int, bool]]:
    """A folder by its descriptor, and whether it was made here, with all that was missing on the way.

    A symbolic link on the way is followed where root alone could have put it: whoever owns a folder could lead root to
    another's. Raises `Failed` for one that somebody else may have put, and for what is no folder.
    """
    flags, is_new = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, False
    here = os.open("/", flags)
    try:
        for name in path.parts[1:]:
            try:
                if is_new := not _is_there(name, here):
                    os.mkdir(name, 0o755, dir_fd=here)
                there = os.open(name, flags | os.O_NOFOLLOW, dir_fd=here)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    with naming(path):
                        raise
                around = os.fstat(here)
                if around.st_uid != 0 or around.st_mode & 0o022:
                    owner = f"user {around.st_uid}, or whoever else may write beside it, may have put it"
                    raise Failed(f"{path}: {name} is no folder; {owner}: look at it, and remove it") from None
                with naming(path):
                    there = os.open(name, flags, dir_fd=here)
            os.close(here)
            here = there
        yield here, is_new
    finally:
        os.close(here)


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def beside(path: Path) -> Path:
    """The name of what is about to take a file's place: always the same, so that no litter is left by a run's end."""
    return path.with_name(f".{path.name}.push")


def write(path: Path, content: bytes, mode: int, owner: int, group: int) -> None:
    """Replaces a file in one step: a reader sees the old or the new content, with its right mode, never a part."""
    new = beside(path)
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                os.fchown(file.fileno(), owner, group)
                os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def name_again(path: Path, other: Path) -> None:
    """Gives what stands at a path a second name, which takes no space; on another file system it is copied."""
    try:
        with naming(path):
            os.link(path, other, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(path), other)
        else:
            write(other, path.read_bytes(), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def user_id(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise Failed(f"there is no user {name}") from None


def group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Failed(f"there is no group {name}") from None


def digest(*parts: bytes) -> str:
    summed = hashlib.sha256()
    for part in parts:
        summed.update(hashlib.sha256(part).digest())
    return summed.hexdigest()[:24]


def under(path: str, prefixes: list[str]) -> bool:
    """Whether a path is one of the prefixes, or begins with one."""
    return any(path.startswith(prefix) for prefix in prefixes)


# ---------------------------------------------------------------------------------------------------------------------
# What is remembered


class State:
    """What the agent put on this host, and what a push that has not ended yet replaces. A host made anew has neither.

    ``files`` and ``compiled`` are paths, ``units`` has the fingerprints of what each unit runs with: nothing where that
    is not known. ``undo`` is there while a push is under way, and after one that was cut: ``paths`` to what stood there
    before (the name of a file in the folder of the same name; mode and owners of a folder; None where nothing was),
    ``units`` to how they were, and ``known``, the fingerprints of before.
    """

    def __init__(self) -> None:
        self.path = HOME / "state.json"
        self.values: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            self.values = self._read()

    def _read(self) -> dict[str, Any]:
        """What the file says. Raises `Failed` where it is damaged: without it, former files would stay unknown."""
        values: Any = None
        with contextlib.suppress(ValueError):
            values = json.loads(self.path.read_bytes())
        if not _is_note(values):
            raise Failed(
                f"{self.path} is damaged, and nothing was changed. It says which files are the stack's, and what a push"
                " replaces. Put it back from a copy of this host; else move it away: the next push puts all that the"
                " stack has, and leaves what only former pushes put"
            )
        return dict(values)

    def get(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = self.values.setdefault(key, {})
        return value

    @property
    def undo(self) -> dict[str, Any] | None:
        return self.values.get("undo")

    def keep(self, paths: Iterable[str], units: dict[str, dict[str, str]] | None = None) -> None:
        """Notes what stands at some paths, and how some units are, before either changes; what is noted stays so."""
        values: dict[str, Any] = json.loads(json.dumps(self.values))
        folder = HOME / "undo"
        if "undo" not in values:
            shutil.rmtree(folder, ignore_errors=True)
            with naming(folder):
                folder.mkdir(parents=True, mode=0o700)
            values["undo"] = {"paths": {}, "units": {}, "known": values.setdefault("units", {}).copy()}
        undo = values["undo"]
        for path in paths:
            if path not in undo["paths"]:
                undo["paths"][path] = _former(Path(path), folder / str(len(undo["paths"])))
        for name, unit in (units or {}).items():
            undo["units"].setdefault(name, unit)
            if name in values["units"]:
                # A reload leaves alone what a unit read when it started.
                rest = {kind: known for kind, known in values["units"][name].items() if kind != "reload"}
                values["units"][name] = rest if unit["by"] == "reload" else {}
        sync(folder)
        self.save(values)
        sync(HOME)

    def forget_lost(self) -> list[str]:
        """Takes those paths out of what is to be undone whose former file is not kept any more. Returns them."""
        kept, paths = HOME / "undo", self.values["undo"]["paths"]
        lost = [path for path, name in paths.items() if isinstance(name, str) and not os.path.lexists(kept / name)]
        if lost:
            values = json.loads(json.dumps(self.values))
            for path in lost:
                del values["undo"]["paths"][path]
            self.save(values)
        return lost

    def settle(self, path: str) -> None:
        """Takes one path out of what is to be undone: it stays, whatever becomes of this push."""
        values = json.loads(json.dumps(self.values))
        del values["undo"]["paths"][path]
        values.setdefault("files", {})[path] = True
        sync(Path(path).parent)
        self.save(values)

    def close(self, **values: Any) -> None:
        """Ends a push, with what is true from now on, in one step."""
        for folder in {Path(path).parent for path in self.values.get("undo", {"paths": ()})["paths"]}:
            if folder.is_dir():
                sync(folder)
        self.save({**{key: value for key, value in self.values.items() if key != "undo"}, **values})
        # A power failure may bring the former note back, as long as it is not known to be gone: with what it names.
        with contextlib.suppress(OSError):
            sync(HOME)
            shutil.rmtree(HOME / "undo", ignore_errors=True)

    def save(self, values: dict[str, Any]) -> None:
        write(self.path, json.dumps(values, indent=1, sort_keys=True).encode(), 0o600, 0, 0)
        self.values = values


def _is_note(values: Any) -> bool:
    """Whether values have the form of `State`."""

    def has(value: Any, *keys: str) -> bool:
        return isinstance(value, dict) and all(isinstance(value.get(key), dict) for key in keys)

    if not isinstance(values, dict) or not all(
        isinstance(values.get(k, {}), dict) for k in ("files", "compiled", "units")
    ):
        return False
    return values.get("undo") is None or has(values["undo"], "paths", "units", "known")


def _former(path: Path, kept: Path) -> dict[str, int] | str | None:
    """Keeps what stands at a path: a file by a second name, a folder's mode and owners; None where nothing is."""
    try:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            return {"mode": stat.S_IMODE(status.st_mode), "owner": status.st_uid, "group": status.st_gid}
        name_again(path, kept)
    except FileNotFoundError:
        return None
    return kept.name


def put_back(paths: dict[str, Any]) -> list[str]:
    """Puts everything back that can be, as often as it is asked to. Returns what could not, in the system's words."""
    stuck = []
    for name, former in paths.items():
        path = Path(name)
        try:
            beside(path).unlink(missing_ok=True)
            if former is None:
                path.unlink(missing_ok=True)
            elif isinstance(former, str):
                _put_file_back(path, HOME / "undo" / former)
            elif path.is_dir():
                with folder_at(path) as (folder, _):
                    os.fchown(folder, former["owner"], former["group"])
                    os.fchmod(folder, former["mode"])
        except (OSError, Failed) as error:
            stuck.append(str(error))
    return stuck


def _put_file_back(path: Path, kept: Path) -> None:
    # A file that is still in its place stays: a rename onto another name of the same file leaves both (rename(2)).
    if os.path.lexists(path) and os.path.samestat(os.lstat(path), os.lstat(kept)):
        return
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name_again(kept, beside(path))
        os.replace(beside(path), path)


def wait_for(lock: Callable[[Any, int], Any], file: Any, holder: Callable[[], str]) -> None:
    """Takes a lock as soon as nobody else has it. Says for whom it waits, and does not wait for ever."""
    deadline = time.monotonic() + LOCK_SECONDS
    waits = False
    while True:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if not waits:
                say(f"waiting for {holder()}")
                waits = True
            if time.monotonic() > deadline:
                raise Failed(f"{holder()} has held this host for {LOCK_SECONDS} s") from None
            time.sleep(0.2)


@contextlib.contextmanager
def host_lock() -> Iterator[None]:
    """One run at a time. A second one waits, and says for whom."""
    HOME.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(HOME / "lock", "a+") as file:

        def holder() -> str:
            file.seek(0)
            return f"another run on this host ({file.read().strip()})"

        wait_for(fcntl.flock, file, holder)
        with naming(HOME / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
            file.flush()
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Secrets: the first command of a host


def secret_path(name: str, version: str) -> Path:
    return HOME / "secrets" / f"{name}.{version}"


def store(bundle: dict[str, Any]) -> None:
    """Stores secrets under their versions, and activates nothing."""
    folder = HOME / "secrets"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stored = 0
    for name, secret in bundle["store"].items():
        path = secret_path(name, secret["version"])
        if not path.exists():
            write(path, secret["content"].encode(), 0o600, 0, 0)
            stored += 1
    say(f"{bundle['host']}: {stored} secrets stored")


def forget_old_versions(names: set[str], used: set[Path]) -> None:
    """Keeps the versions in use and the newest others, so that a way back is left; and nothing of what is gone."""
    by_name: dict[str, list[Path]] = {}
    for path in (HOME / "secrets").glob("*"):
        by_name.setdefault(path.name.rpartition(".")[0], []).append(path)
    for name, paths in by_name.items():
        others = sorted((p for p in paths if p not in used), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in others[(KEPT_VERSIONS - 1) if name in names else 0 :]:
            old.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Packages, users, folders


APT = (
    *("apt-get", "-q", "-y", "--no-install-recommends", "--fix-broken", "-o", "Dpkg::Options::=--force-confold"),
    *("-o", f"DPkg::Lock::Timeout={LOCK_SECONDS}"),
)
DPKG_LOCKS = (Path("/var/lib/dpkg/lock-frontend"), Path("/var/lib/dpkg/lock"))
APT_LOCKS = (Path("/var/lib/apt/lists/lock"), Path("/var/cache/apt/archives/lock"))
"""apt waits for those of dpkg (DPkg::Lock::Timeout), and ends at once where somebody else has these."""
POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_ASIDE = Path("/usr/sbin/policy-rc.d.aside")
NOTHING_STARTS = f"""#!/bin/sh
# Of a push: what it installs is configured before it starts. What is upgraded beside it starts anew as ever.
[ -z "${IN_A_PUSH}" ] || exit 101
[ ! -x {POLICY_ASIDE} ] || exec {POLICY_ASIDE} "$@"
""".encode()


def install_packages(packages: list[str], replaces: list[str]) -> int:
    """Installs what is missing; nothing starts before it is configured, and changed files are kept.

    A package that has to go for one of them goes only if ``replaces`` has a pattern for it.
    """
    missing = _missing(packages)
    if missing or _is_held() or os.path.lexists(POLICY_ASIDE):
        _finish_installation()
        missing = _missing(packages)
    if not missing:
        return 0
    _wait_for(APT_LOCKS)
    wanted = ", ".join(missing)
    plan = run(*APT, "--simulate", "install", *missing)
    # What was once listed may be gone from where it was: only a fresh list is believed to lack a package.
    if plan.returncode or not _fetch(missing):
        update = run("apt-get", "-q", "update", "-o", "APT::Update::Error-Mode=any")
        plan = run(*APT, "--simulate", "install", *missing)
        if plan.returncode:
            said = update if update.returncode else plan
            raise Failed(f"packages {wanted} could not be installed, nothing was changed:\n{words(said)}")
    removed = [line.split()[1] for line in plan.stdout.splitlines() if line.startswith("Remv ")]
    if unwanted := [name for name in removed if not any(fnmatch.fnmatch(name, pattern) for pattern in replaces)]:
        raise Failed(
            f"packages {wanted} were not installed: {', '.join(unwanted)} would be removed for them, and nothing in the"
            " stack says that they may"
        )
    with nothing_starts():
        done = run(*APT, "install", *missing)
    if done.returncode:
        raise Failed(f"packages {wanted} could not be installed:\n{words(done)}")
    return len(missing)


def _missing(packages: list[str]) -> list[str]:
    listed = run("dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages).stdout
    # Whether it is to stay as it is (apt-mark hold) says nothing of that.
    there = {line.split()[0] for line in listed.splitlines() if line.split()[1:] == ["installed"]}
    return [package for package in packages if package not in there]


def _finish_installation() -> None:
    """Finishes what was cut by a kill or a power failure; what cannot be finished, apt tells in its own words later.

    The apt of a run that was killed may still work, or its dpkg alone: both are waited for, and nothing starts before.
    """
    _wait_for(DPKG_LOCKS)
    with nothing_starts():
        # dpkg alone finishes its journal, apt alone finds what an unpacked package depends on.
        if run("dpkg", "--force-confold", "--configure", "--pending").returncode:
            run(*APT, "--no-remove", "install")


def _wait_for(locks: Iterable[Path]) -> None:
    for path in locks:
        with open(path, "a") as lock:
            wait_for(fcntl.lockf, lock, lambda: "apt or dpkg")


@contextlib.contextmanager
def nothing_starts() -> Iterator[None]:
    """Keeps packages from starting services (policy-rc.d of invoke-rc.d(8)). A policy of the host's own steps aside."""
    if not _is_held():
        if os.path.lexists(POLICY):
            POLICY.rename(POLICY_ASIDE)
        write(POLICY, NOTHING_STARTS, 0o755, 0, 0)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)
        if os.path.lexists(POLICY_ASIDE):
            POLICY_ASIDE.rename(POLICY)


def _is_held() -> bool:
    """Whether a run keeps packages from starting services; or did so, and was killed."""
    return POLICY.exists() and POLICY.read_bytes() == NOTHING_STARTS


def _fetch(packages: list[str]) -> bool:
    """Whether all files of packages could be fetched. Nothing is installed or removed."""
    return run(*APT, "install", "--download-only", *packages).returncode == 0


def make_users(users: dict[str, Any]) -> None:
    for name, user in users.items():
        try:
            known = pwd.getpwnam(name)
        except KeyError:
            options = ["--system", "--user-group", "--home-dir", user["home"], "--shell", "/usr/sbin/nologin"]
            done = run("useradd", *options, name)
            if done.returncode:
                raise Failed(f"user {name} could not be made: {words(done)}") from None
            known = pwd.getpwnam(name)
        for group in user["groups"]:
            if name not in grp.getgrnam(group).gr_mem and grp.getgrnam(group).gr_gid != known.pw_gid:
                run("usermod", "--append", "--groups", group, name)


def mount_first(bundle: dict[str, Any], state: State) -> None:
    """Brings mounts up before anything is written: folders and files are to lie on them, not under them.

    A folder that is to lie on the disk for the first time takes there what a package put into it.
    """
    mounts = [name for name in bundle["units"] if name.endswith(".mount")]
    down = [name for name, now in unit_states(mounts).items() if now.get("ActiveState") != "active"]
    if not down:
        return
    # All units at once: systemd is asked to read them a single time.
    unit_files = [path for path in bundle["files"] if path.startswith(UNIT_FOLDER)]
    state.keep(unit_files)
    for path in unit_files:
        write(Path(path), bundle["files"][path]["content"].encode(), 0o644, 0, 0)
    run("systemctl", "daemon-reload")
    for name in down:
        text = bundle["files"][UNIT_FOLDER + name]["content"]
        settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        what, where = Path(settings["What"]), Path(settings["Where"])
        where.mkdir(parents=True, exist_ok=True)
        if settings.get("Options") == "bind" and not what.exists():
            _move_in(where, what)
        systemctl("start", [name], of=lambda unit: unit)
        # It stays: what is written on the disk from now on would be missed without it.
        state.settle(UNIT_FOLDER + name)


def _move_in(where: Path, what: Path) -> None:
    """Copies a folder with owners and modes; under another name until it is whole."""
    half = what.with_name(f".{what.name}.half")
    what.parent.mkdir(parents=True, exist_ok=True)
    run("rm", "-rf", str(half))
    done = run("cp", "--archive", str(where), str(half))
    if done.returncode:
        raise Failed(f"{where} could not be copied to {what}: {words(done)}")
    half.rename(what)


def owners() -> dict[str, dict[str, int]]:
    """The numbers of all users and groups of this host."""
    users = {user.pw_name: user.pw_uid for user in pwd.getpwall()}
    return {"users": users, "groups": {group.gr_name: group.gr_gid for group in grp.getgrall()}}


def give_back(paths: list[str], now: dict[str, dict[str, int]]) -> None:
    """Gives what outlived an installation to its owners: a new one deals out other numbers for the same names.

    The numbers are written down beside what they own. Files go to numbers that nobody has, all of them, and from there
    to the new ones; so a run that is cut and done again takes no file that has changed hands for one that is to.
    """
    for path in map(Path, paths):
        # A folder that is new has its numbers written down from the start.
        path.mkdir(parents=True, exist_ok=True)
        record = path / ".owners"
        former: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            former = json.loads(record.read_text())
        users, groups = (_moved(former.get(kind, {}), now[kind]) for kind in ("users", "groups"))
        if users or groups:
            say(f"{path}: owners have other numbers than before, files are given back to them")
            _change_hands(path, lambda n, to=users: to.get(n, n), lambda n, to=groups: to.get(n, n))  # type: ignore[misc]
            _write_owners(record, {**now, "away": True})
        if users or groups or former.get("away"):
            _change_hands(path, _returned, _returned)
        if former != now:
            _write_owners(record, now)


def _moved(former: dict[str, int], now: dict[str, int]) -> dict[int, int]:
    """Former number to the one, away, of every name that has another now."""
    return {number: now[name] + AWAY for name, number in former.items() if now.get(name, number) != number}


def _returned(number: int) -> int:
    return number - AWAY if number >= AWAY else number


def _write_owners(record: Path, values: dict[str, Any]) -> None:
    write(record, json.dumps(values, indent=1, sort_keys=True).encode(), 0o600, 0, 0)


def _change_hands(path: Path, user: Callable[[int], int], group: Callable[[int], int]) -> None:
    """Gives a folder and all that is in it to other owners, where these differ."""
    for _, folders, files, here in os.fwalk(path):
        for name in (".", *folders, *files):
            status = os.lstat(name, dir_fd=here)
            owner = user(status.st_uid), group(status.st_gid)
            if owner != (status.st_uid, status.st_gid):
                os.chown(name, *owner, dir_fd=here, follow_symlinks=False)


def make_directories(directories: dict[str, Any], state: State) -> list[str]:
    """Makes folders, and gives those that are there their owners and modes. Returns the paths of the latter."""
    wrong = {}
    for path, wanted in directories.items():
        with folder_at(Path(path)) as (folder, is_new):
            status = os.fstat(folder)
        right = (user_id(wanted["owner"]), group_id(wanted["group"]), int(wanted["mode"], 8))
        if (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != right:
            wrong[path] = (right, is_new)
    if changed := [path for path, (_, is_new) in wrong.items() if not is_new]:
        state.keep(changed)
    for path, ((owner, group, mode), _) in wrong.items():
        with folder_at(Path(path)) as (folder, _):
            os.fchown(folder, owner, group)
            os.fchmod(folder, mode)
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# Files


class File:
    """A file as it should be."""

    def __init__(self, content: bytes, wanted: dict[str, Any]) -> None:
        self.content = content
        self.mode = int(wanted["mode"], 8)
        self.owner_name, self.group_name = wanted["owner"], wanted["group"]

    @property
    def owner(self) -> int:
        return user_id(self.owner_name)

    @property
    def group(self) -> int:
        return group_id(self.group_name)

    def stands_at(self, path: Path) -> bool:
        try:
            status = path.lstat()
            same = (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (self.mode, self.owner, self.group)
            return same and not path.is_symlink() and path.read_bytes() == self.content
        except FileNotFoundError:
            return False


def wanted_files(bundle: dict[str, Any]) -> dict[str, File]:
    """All files of a bundle, those with secrets included."""
    files = {path: File(file["content"].encode(), file) for path, file in bundle["files"].items()}
    for path, secret in bundle["secrets"].items():
        stored = secret_path(secret["name"], secret["version"])
        if not stored.exists():
            raise Failed(f"{path}: version {secret['version']} of the secret {secret['name']} is not on this host")
        files[path] = File(stored.read_bytes(), secret)
    return files


STAGE = r"""
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=700 tmpfs /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work /etc
exec "$0" -c "$1" /mnt/upper
"""
"""A view of /etc that this process alone has, on memory: what is written there is seen by no daemon."""

IN_STAGE = "import json,sys; b=json.load(sys.stdin); exec(compile(b['agent'],'agent','exec'),g:={'__name__':'agent'}); \
g['staged'](b, sys.argv[1])"


def staged(task: dict[str, Any], upper: str) -> None:
    """Runs inside the private view: writes the changed files, compiles and checks, and reports what was compiled."""
    for path, file in task["changed"].items():
        write(Path(path), bytes.fromhex(file["content"]), file["mode"], file["owner"], file["group"])
    for path in task["removed"]:
        Path(path).unlink(missing_ok=True)
    before = _snapshot(Path(upper))
    for step in task["compile"]:
        done = run(*step["run"])
        if done.returncode:
            raise Failed(f"{step['service']}: {' '.join(step['run'])} failed:\n{words(done)}")
    compiled = {path: digest_ for path, digest_ in _snapshot(Path(upper)).items() if before.get(path) != digest_}
    for step in task["checks"]:
        done = run(*step["run"])
        if done.returncode:
            raise Failed(f"{step['service']}: {' '.join(step['run'])} refuses the new configuration:\n{words(done)}")
    result = {}
    for path in compiled:
        real = Path(upper) / path
        status = real.lstat()
        result[f"/etc/{path}"] = {
            "content": real.read_bytes().hex(),
            "mode": status.st_mode & 0o7777,
            "owner": status.st_uid,
            "group": status.st_gid,
        }
    json.dump(result, sys.stdout)


def _snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in files}


def check_staged(
    bundle: dict[str, Any], changed: dict[str, File], removed: list[str], services: set[str]
) -> dict[str, dict[str, Any]]:
    """Checks a change where nobody sees it, and returns what compiling made: path to content and mode.

    Only services whose files change are asked, and only what changed is compiled.
    """
    touched = [*changed, *removed]
    task = {
        "agent": bundle["agent"],
        "changed": {
            path: {"content": f.content.hex(), "mode": f.mode, "owner": f.owner, "group": f.group}
            for path, f in changed.items()
            if path.startswith("/etc/")
        },
        "removed": [path for path in removed if path.startswith("/etc/")],
        "compile": [step for step in bundle["compile"] if any(path.startswith(step["of"]) for path in touched)],
        "checks": [step for step in bundle["checks"] if step["service"] in services],
    }
    if not task["compile"] and not task["checks"]:
        return {}
    done = run("unshare", "--mount", "sh", "-c", STAGE, sys.executable, IN_STAGE, text=json.dumps(task))
    if done.returncode:
        raise Failed(_last_failure(done))
    made: dict[str, dict[str, Any]] = json.loads(done.stdout or "{}")
    return made


def _last_failure(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence of a `Failed` that ended the staged process, without its traceback."""
    _, marker, sentence = done.stderr.rpartition("Failed: ")
    return sentence.strip() if marker else words(done)


# ---------------------------------------------------------------------------------------------------------------------
# Units


def unit_fingerprint(unit: dict[str, Any], kind: str, files: dict[str, File]) -> str:
    """What a unit is to run with: the contents under the prefixes that restart it, or that reload it."""
    prefixes = unit[kind]
    return digest(*(path.encode() + b"\0" + files[path].content for path in sorted(files) if under(path, prefixes)))


def unit_states(units: list[str]) -> dict[str, dict[str, str]]:
    """ActiveState, restarts and the like of several units, in one call."""
    if not units:
        return {}
    asked = run(
        "systemctl", "show", "--property=Id,ActiveState,UnitFileState,NeedDaemonReload,Result,MainPID", "--", *units
    )
    if asked.returncode:
        raise Failed(f"nobody can tell how the units are: {words(asked)}")
    states = {}
    for name, block in zip(units, asked.stdout.strip().split("\n\n"), strict=False):
        states[name] = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
    return states


def runs(name: str, unit_state: dict[str, str]) -> bool:
    """Whether a unit is as it should be: active, or left out by a condition of its own (a clock in a container)."""
    now = unit_state.get("ActiveState")
    # A reload that somebody else asked for (a certificate came) is under way.
    return now in ("active", "reloading") or (
        now == "inactive" and run("systemd-analyze", "condition", "--unit", name).returncode != 0
    )


def of_replaced_programs() -> set[str]:
    """The units of processes whose program on disk is another one by now: a package was upgraded, and they go on."""
    found = set()
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{number}/exe").endswith(" (deleted)"):
                found.add(Path(f"/proc/{number}/cgroup").read_text().strip().rpartition("/")[2])
    return found


def last_words(unit: str) -> str:
    """The end of a unit's journal."""
    return run("journalctl", "-u", unit, "-n", "8", "-o", "cat", "--no-pager").stdout.strip()


def processes_of(units: list[str]) -> set[tuple[str, str]]:
    """What runs in some units, but for their main processes: number and start, since a number is soon another's."""
    main = {unit_state.get("MainPID") for unit_state in unit_states(units).values()}
    found = set()
    for group in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            if group.parent.name not in main and group.read_text().strip().rpartition("/")[2] in units:
                found.add(process(group.parent.name))
    return found


def process(number: str) -> tuple[str, str]:
    """A process by its number and its start (proc_pid_stat(5)). Raises `OSError` where it has ended."""
    return number, Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]


def systemctl(verb: str, units: list[str], *options: str, of: Callable[[str], str]) -> None:
    """One call for all units. On failure the error names the first unit that failed, with the end of its journal."""
    if not units:
        return
    # Timers and paths last: what they start at once is to find the jobs of the units that it waits for (After=).
    units = sorted(units, key=lambda unit: unit.endswith((".timer", ".path")))
    done = run("systemctl", verb, "--quiet", *options, "--", *units)
    if done.returncode:
        for unit, state in unit_states(units).items():
            # Also one that is about to be started again: it has not failed for good.
            if state.get("Result", "success") != "success" or state["ActiveState"] in ("activating", "failed"):
                raise Failed(f"{of(unit)}: {unit} does not {verb}:\n{last_words(unit) or words(done)}")
        raise Failed(f"systemctl {verb} {' '.join(units)}: {words(done)}")


# ---------------------------------------------------------------------------------------------------------------------
# Health: transactions, as a user would have them


def _connect(probe: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection((probe["address"], probe["port"]), timeout=10)
    if probe.get("proxy"):
        family = "TCP6" if ":" in probe["address"] else "TCP4"
        own = "::1" if family == "TCP6" else "127.0.0.1"
        connection.sendall(f"PROXY {family} {own} {probe['address']} 40000 {probe['port']}\r\n".encode())
    if probe.get("former"):
        _require_successor(connection, probe["former"])
    return connection


def _require_successor(connection: socket.socket, former: set[tuple[str, str]]) -> None:
    """Refuses a connection that was taken by a process which a reload is to replace.

    A reload returns when the signal was sent. Former processes answer until new ones are there: for tenths of a second,
    or for ever, where the daemon could not take up its new files.
    """
    near, far = connection.getsockname()[1], connection.getpeername()[1]
    deadline = time.monotonic() + 10
    while not (takers := _holders(far, near)):
        if time.monotonic() > deadline:
            raise Failed("nobody takes the connection")
        time.sleep(0.02)
    if takers & former:
        raise Failed("what answers has not taken up its new files")


def _holders(port: int, client: int) -> set[tuple[str, str]]:
    """The processes that hold the server's end of a connection (ss(8))."""
    shown = run("ss", "-Htnp", "state", "established", f"( sport = :{port} and dport = :{client} )").stdout
    found = set()
    for number in re.findall(r"\bpid=(\d+)", shown):
        with contextlib.suppress(OSError):
            found.add(process(number))
    return found


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if os.path.exists(AUTHORITY):
        context.load_verify_locations(AUTHORITY)
    return context


def probe_smtp(probe: dict[str, Any]) -> str | None:
    context = _tls()
    connection = _connect(probe)
    if probe["tls"] == "implicit":
        connection = context.wrap_socket(connection, server_hostname=probe["server_name"])
    smtp = smtplib.SMTP(timeout=10)
    # smtplib opens its connections itself; this one may have a PROXY header before it.
    smtp.sock = connection
    smtp.file = None
    smtp._host = probe["server_name"]  # type: ignore[attr-defined]
    code, text = smtp.getreply()
    if code != 220:
        return f"greets with {code} {text.decode(errors='replace')}"
    smtp.ehlo("health.invalid")
    if probe["tls"] == "starttls":
        smtp.starttls(context=context)
        smtp.ehlo("health.invalid")
    for key, good in (("accepts", True), ("refuses", False)):
        recipient = probe.get(key)
        if recipient:
            smtp.docmd("RSET")
            smtp.docmd("MAIL FROM:<>")
            code, text = smtp.docmd(f"RCPT TO:<{recipient}>")
            # A full mailbox is its user's affair: the host knows it, and that is what was asked (RFC 3463, X.2.2).
            if good and code == 452 and text.startswith(b"4.2.2 "):
                continue
            if (code == 250) != good or (not good and code < 500):
                return f"{'does not accept' if good else 'does not refuse'} {recipient}: {code} {text.decode()}"
    # Under stress Postfix ends a session at its first refusal (smtpd_hard_error_limit): all has been seen by then.
    with contextlib.suppress(smtplib.SMTPException):
        smtp.docmd("QUIT")
    return None


def probe_tls(probe: dict[str, Any]) -> str | None:
    with _tls().wrap_socket(_connect(probe), server_hostname=probe["server_name"]) as connection:
        expected = probe.get("expect")
        if expected:
            line = connection.recv(512).decode(errors="replace")
            if not line.startswith(expected):
                return f"says {line.strip()!r}, not {expected!r}"
    return None


def probe_dns(probe: dict[str, Any]) -> str | None:
    kinds = {"A": 1, "NS": 2, "SOA": 6, "MX": 15, "AAAA": 28}
    labels = [label for label in probe["name"].rstrip(".").split(".") if label]
    name = b"".join(bytes([len(label)]) + label.encode() for label in labels) + b"\0"
    # Recursion desired and AD: "tell me whether it was validated" (RFC 6840 section 5.7).
    query = struct.pack("!HHHHHH", 4711, 0x0120, 1, 0, 0, 0) + name + struct.pack("!HH", kinds[probe["type"]], 1)
    family = socket.AF_INET6 if ":" in probe["address"] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(query, (probe["address"], 53))
        flags, _, answers = struct.unpack("!HHH", client.recv(4096)[2:8])
    if flags & 0xF or not answers:
        return f"answers {probe['name']} {probe['type']} with code {flags & 0xF} and {answers} records"
    if probe["secure"] and not flags & 0x20:
        return f"answers {probe['name']} {probe['type']} without having validated it"
    return None


def probe_http(probe: dict[str, Any]) -> str | None:
    connection = http.client.HTTPConnection(probe["address"], probe["port"], timeout=10)
    connection.sock = _connect(probe)
    if probe["tls"]:
        connection.sock = _tls().wrap_socket(connection.sock, server_hostname=probe["server_name"])
    connection.request("GET", probe["path"], headers={"Host": probe["server_name"]})
    status = connection.getresponse().status
    connection.close()
    return None if status in probe["status"] else f"answers {probe['path']} with {status}"


def listening() -> dict[tuple[str, int], set[str]]:
    """Protocol and port to the addresses at which somebody listens: "*" is any address of both families (ss(8))."""
    found: dict[tuple[str, int], set[str]] = {}
    done = run("ss", "-Hlntu")
    if done.returncode:
        raise Failed(f"nobody can tell who listens: {words(done)}")
    for line in done.stdout.splitlines():
        protocol, _, _, _, local, *_ = line.split()
        address, _, port = local.rpartition(":")
        found.setdefault((protocol, int(port)), set()).add(address.strip("[]"))
    return found


def deaf_addresses(probe: dict[str, Any], listeners: dict[tuple[str, int], set[str]]) -> list[str]:
    """Addresses of a probe at which nobody listens: a daemon may have bound some, and missed one that came later."""
    at = listeners.get((probe["protocol"], probe["port"]), set())
    return [a for a in probe["addresses"] if not at & {"*", "::" if ":" in a else "0.0.0.0", a}]


def deaf_services(probes: list[dict[str, Any]]) -> set[str]:
    """Services that do not listen where they should: a daemon that missed an address binds it at its next start."""
    listens = [p for p in probes if p["kind"] == "listen" and not os.path.exists(p.get("unless", ""))]
    listeners = listening() if listens else {}
    return {probe["service"] for probe in listens if deaf_addresses(probe, listeners)}


def probe_listen(probe: dict[str, Any]) -> str | None:
    deaf = deaf_addresses(probe, listening())
    return f"nobody listens at {', '.join(deaf)} ({probe['protocol']})" if deaf else None


def probe_addresses(probe: dict[str, Any]) -> str | None:
    """Whether the host has its addresses, and may use them: not while IPv6 looks for doubles (RFC 4862 section 5.4)."""
    for address in probe["addresses"]:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as tried:
            try:
                tried.bind((address, 0))
            except OSError as error:
                return f"{address}: {error.strerror}"
    return None


def probe_command(probe: dict[str, Any]) -> str | None:
    done = run(*probe["run"])
    return None if done.returncode == 0 else f"{' '.join(probe['run'])}: {words(done)}"


PROBES: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "smtp": probe_smtp,
    "tls": probe_tls,
    "dns": probe_dns,
    "http": probe_http,
    "listen": probe_listen,
    "addresses": probe_addresses,
    "command": probe_command,
}


def wait_until_healthy(probes: list[dict[str, Any]], seconds: float, former: set[tuple[str, str]]) -> None:
    """Repeats each transaction until it goes well. Raises `Failed` with what the service said last.

    What a ``former`` process says, one of before a reload, does not count.
    A probe with ``unless`` is left out where that file is: the service serves nobody then, as it should.
    """
    deadline = time.monotonic() + seconds
    for probe in probes:
        where = f"{probe.get('address', '')} port {probe['port']}".strip() if "port" in probe else probe["kind"]
        if os.path.exists(probe.get("unless", "")):
            say(f"{probe['service']}: {where}: not asked, since {probe['unless']} is there")
            continue
        pause = 0.05
        while True:
            try:
                wrong = PROBES[probe["kind"]]({**probe, "former": former})
            except Exception as error:  # noqa: BLE001 (whatever it is, it is what the service did)
                wrong = str(error) or type(error).__name__
            if wrong is None:
                break
            if time.monotonic() > deadline:
                raise Failed(f"{probe['service']}: {where}: {wrong}")
            # Soon at first, then more patiently: asking takes time from the daemon that is starting.
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Applying


class Clock:
    """What the parts of a run took."""

    def __init__(self) -> None:
        self.last = self.started = time.monotonic()
        self.laps: list[str] = []

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps.append(f"{name} {now - self.last:.1f}")
        self.last = now

    def __str__(self) -> str:
        return f"{self.last - self.started:.1f} s ({', '.join(self.laps)})"


class Change:
    """What there is to do on this host, found before anything is done."""

    def __init__(self, bundle: dict[str, Any], state: State) -> None:
        self.bundle, self.state = bundle, state
        self.files = wanted_files(bundle)
        put = state.get("files")
        self.changed = {path: file for path, file in self.files.items() if not file.stands_at(Path(path))}
        by_product_of = state.get("compiled")
        self.removed = sorted(
            path for path in put if path not in self.files and path not in by_product_of and os.path.lexists(path)
        )
        # A compiled file goes when nothing compiles it any more.
        sources = [step["of"] for step in bundle["compile"]]
        self.removed += sorted(p for p in by_product_of if not under(p, sources) and os.path.lexists(p))
        units = bundle["units"]
        self.states = unit_states([*units, *(u for u in state.get("units") if u not in units), *bundle["masked"]])
        self.restart: list[str] = []
        self.reload: list[str] = []
        self.start: list[str] = []
        self.behind: list[str] = []
        self.former: set[tuple[str, str]] = set()
        known = state.get("units")
        drifted = [*self.changed, *self.removed]

        def is_behind(unit: dict[str, Any], kind: str, before: dict[str, str]) -> bool:
            return bool(unit[kind]) and before.get(kind[:-3]) != unit_fingerprint(unit, kind, self.files)

        def is_due(unit: dict[str, Any], kind: str, before: dict[str, str]) -> bool:
            # A file that somebody else changed may have been read since: by a reboot, for one.
            return is_behind(unit, kind, before) or any(under(path, unit[kind]) for path in drifted)

        replaced = of_replaced_programs()
        deaf = deaf_services(bundle["health"])
        self.deaf = [name for name, unit in units.items() if unit["service"] in deaf and name.endswith(".service")]
        for name, unit in units.items():
            before = known.get(name, {})
            unit_state = self.states.get(name, {})
            # A unit that is new here is started without being asked whether it may: asking takes longer.
            if not (runs(name, unit_state) if name in known else unit_state.get("ActiveState") == "active"):
                self.start.append(name)
            elif name in self.deaf or name in replaced or is_due(unit, "restart_on", before):
                self.restart.append(name)
            elif is_due(unit, "reload_on", before):
                self.reload.append(name)
            if name not in self.start and any(is_behind(unit, kind, before) for kind in ("restart_on", "reload_on")):
                self.behind.append(name)
        self.enable = [n for n in units if self.states.get(n, {}).get("UnitFileState") == "disabled"]
        self.mask = [n for n in bundle["masked"] if self.states.get(n, {}).get("UnitFileState") not in ("masked", "")]
        self.retire = [n for n in known if n not in units]
        # Their files were put, by a run that was cut perhaps, and systemd still goes by the former ones.
        self.unread = [n for n in units if self.states.get(n, {}).get("NeedDaemonReload") == "yes"]
        self.unmask = [n for n in units if self.states.get(n, {}).get("UnitFileState") == "masked"]

    @property
    def touched_units(self) -> list[str]:
        return [*self.restart, *self.start, *self.reload]

    @property
    def before(self) -> dict[str, dict[str, str]]:
        """How all units are that this change touches, and by what it does: for the way back."""
        touched = {
            "restart": self.restart,
            "start": self.start,
            "reload": self.reload,
            "retire": self.retire,
            "mask": self.mask,
        }
        return {name: {**self.states.get(name, {}), "by": by} for by, names in touched.items() for name in names}

    @property
    def services(self) -> set[str]:
        """Services whose files or units are touched: only these are checked and asked for their health."""
        paths = [*self.changed, *self.removed]
        found = {self.bundle["units"][name]["service"] for name in self.touched_units}
        for unit in self.bundle["units"].values():
            if any(under(path, [*unit["restart_on"], *unit["reload_on"]]) for path in paths):
                found.add(unit["service"])
        return found

    @property
    def nothing(self) -> bool:
        files = self.changed or self.removed or self.unread
        return not any((files, self.restart, self.start, self.reload, self.enable, self.mask, self.retire))


def require_way_back(networks: list[str], connection: str) -> None:
    """Refuses a change after which whoever pushes it could not come back: its connection would live on and hide it.

    ``connection`` is what sshd says of it (SSH_CONNECTION in ssh(1)); empty where there is no SSH.
    """
    if not connection:
        return
    client = ipaddress.ip_address(connection.split()[0])
    if not any(client in ipaddress.ip_network(network) for network in networks):
        raise Failed(
            f"this push comes from {client}, which is in no network of access.ssh_from ({', '.join(networks)}):"
            " it would be the last. Nothing was changed"
        )


def apply(bundle: dict[str, Any]) -> None:
    """Brings this host to what the bundle says, or leaves it as it was. Raises `Failed` with what is wrong."""
    require_way_back(bundle["ssh_from"], os.environ.get("SSH_CONNECTION", ""))
    clock = Clock()
    state = State()
    _recover(state)
    installed = install_packages(bundle["packages"], bundle["replaces"])
    make_users(bundle["users"])
    try:
        mount_first(bundle, state)
        give_back(bundle["kept"], owners())
        folders = make_directories(bundle["directories"], state)
        change = Change(bundle, state)
        clock.lap("looking")
        if change.nothing and not state.undo:
            say(f"{bundle['host']}: nothing to do, {clock}")
            _serves_nobody_yet(bundle)
            return
        compiled = check_staged(bundle, change.changed, change.removed, change.services)
        clock.lap("checking")
        state.keep([*change.changed, *change.removed, *compiled], change.before)
        _swap(change, compiled)
        _units(change)
        clock.lap("units")
        probes = [probe for probe in bundle["health"] if probe["service"] in change.services]
        wait_until_healthy(probes, bundle.get("health_seconds", 60), change.former)
        _steady(change)
        clock.lap("health")
        _remember(change, compiled)
    except Exception as error:
        if not state.undo:
            raise
        # Whatever it was, this host is not left half changed.
        said = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        raise Failed(f"{said}\n{_roll_back(state)}") from error
    secrets = bundle["secrets"].values()
    used = {secret_path(secret["name"], secret["version"]) for secret in secrets}
    forget_old_versions({secret["name"] for secret in secrets}, used)
    _summary(change, folders, installed, clock)
    _serves_nobody_yet(bundle)


def _swap(change: Change, compiled: dict[str, dict[str, Any]]) -> None:
    for path, file in change.changed.items():
        write(Path(path), file.content, file.mode, file.owner, file.group)
    for path, made in compiled.items():
        write(Path(path), bytes.fromhex(made["content"]), made["mode"], made["owner"], made["group"])
    for path in change.removed:
        Path(path).unlink(missing_ok=True)


def _service_of(change: Change) -> Callable[[str], str]:
    return lambda unit: str(change.bundle["units"].get(unit, {}).get("service", unit))


def _units(change: Change) -> None:
    of = _service_of(change)
    if change.unmask:
        systemctl("unmask", change.unmask, of=of)
    if (
        change.unread
        or change.unmask
        or any(path.startswith(UNIT_FOLDER) for path in (*change.changed, *change.removed))
    ):
        _link_anew([name for name in change.bundle["units"] if UNIT_FOLDER + name in change.changed])
        run("systemctl", "daemon-reload")
        # A unit that was not known before has a state only now.
        states = unit_states(list(change.bundle["units"]))
        change.enable = [n for n in change.bundle["units"] if states.get(n, {}).get("UnitFileState") == "disabled"]
    if change.mask:
        systemctl("mask", change.mask, of=of)
        run("systemctl", "stop", *change.mask)
    if change.retire:
        run("systemctl", "disable", "--now", "--quiet", *change.retire)
    if change.enable:
        # Without a word to the old init scripts, which would reload systemd once for each.
        systemctl("enable", change.enable, "--no-reload", of=of)
        # Until it reads them again, systemd 257 says of every unit that its files have changed (NeedDaemonReload).
        run("systemctl", "daemon-reload")
    systemctl("restart", change.restart, of=of)
    # Started, not restarted: a unit may pull another along, which a second word would end while it starts.
    systemctl("start", change.start, of=of)
    change.former = processes_of(change.reload)
    systemctl("reload", change.reload, of=of)


def _link_anew(units: list[str]) -> None:
    """Has systemd link units that are enabled where their files say now ([Install] in systemd.unit(5)).

    Nothing else takes away the links that a former file asked for. A daemon-reload has to follow.
    """
    states = unit_states(units) if units else {}
    if enabled := [name for name, unit in states.items() if unit.get("UnitFileState") == "enabled"]:
        run("systemctl", "reenable", "--quiet", "--no-reload", *enabled)


def _steady(change: Change) -> None:
    """A unit that dies and is started again for ever answers now and then: that is not health."""
    of = _service_of(change)
    for name, unit_state in unit_states(change.touched_units).items():
        if not runs(name, unit_state):
            raise Failed(f"{of(name)}: {name} is {unit_state.get('ActiveState')}, not active:\n{last_words(name)}")


def take_back(state: State, leaving: Iterable[str] = ()) -> tuple[list[str], list[str], list[str]]:
    """Puts files and units back together, but for running units that are left to a push that follows.

    Returns what could not be put back, in the system's words; the units that are to run; those that refuse to reload.
    """
    undo = state.values["undo"]
    before, known = undo["units"], undo["known"]

    def touched(*by: str) -> list[str]:
        return [name for name, unit in before.items() if unit["by"] in by and name not in leaving]

    # It never ran well here: better none than one that fails again and again. Its file is still there to end it by.
    if fresh := [name for name in touched("start") if name not in known]:
        run("systemctl", "disable", "--now", "--quiet", *fresh)
    stuck = put_back(undo["paths"])
    if any(path.startswith(UNIT_FOLDER) for path in undo["paths"]):
        _link_anew([name for name in known if UNIT_FOLDER + name in undo["paths"]])
        run("systemctl", "daemon-reload")
    restart = [name for name in touched("restart", "start") if name not in fresh]
    refusing = reload = touched("reload")
    # With a part of its files a daemon may not come up again: who runs is left alone.
    if restart:
        run("systemctl", "start" if stuck else "restart", *restart)
    if not reload or (not stuck and run("systemctl", "reload-or-restart", *reload).returncode == 0):
        refusing = []
    # Last: the others have given back what these need, a port for example.
    if again := _allow_again(before, known):
        run("systemctl", "start", *again)
    return stuck, [*restart, *reload, *again], refusing


def _allow_again(before: dict[str, dict[str, str]], known: Iterable[str]) -> list[str]:
    """Allows and enables again what was retired or masked, as far as it was before. Returns what is to run."""
    ended = {name: unit for name, unit in before.items() if unit["by"] in ("retire", "mask")}
    if masked := [name for name, unit in ended.items() if unit["by"] == "mask"]:
        run("systemctl", "unmask", "--quiet", *masked)
    if enabled := [name for name, unit in ended.items() if unit.get("UnitFileState") == "enabled"]:
        run("systemctl", "enable", "--quiet", *enabled)
    if shut := [name for name, unit in before.items() if unit.get("UnitFileState") == "masked"]:
        run("systemctl", "mask", "--quiet", *shut)
    return [name for name, unit in ended.items() if name in known or unit.get("ActiveState") == "active"]


def _recover(state: State) -> None:
    """Puts back what a run that was cut has left.

    Which of its units took up what is not known: the push that follows starts, restarts or reloads them.
    """
    if not state.undo:
        # What was kept by a run that was cut before it noted that, or after it had ended.
        shutil.rmtree(HOME / "undo", ignore_errors=True)
        return
    say("an earlier run on this host was cut: what it changed is put back first")
    if lost := state.forget_lost():
        # Somebody, or a repair of the file system, removed it: nothing but this push can say what belongs there.
        say(f"what stood there before is lost, and is not put back: {', '.join(lost)}")
    stuck, *_ = take_back(state, leaving=state.undo["known"])
    if stuck:
        raise Failed(
            f"an earlier run was cut, and its files could not be put back; nothing else was done: {'; '.join(stuck)}"
        )
    state.close()


def _roll_back(state: State) -> str:
    """Takes this push back. Returns how that went, as a sentence that is true."""
    stuck, units, refusing = take_back(state)
    if stuck:
        return f"Not all files could be put back: {'; '.join(stuck)}. Units that run were left alone."
    try:
        down = [name for name, now in unit_states(units).items() if not runs(name, now) or name in refusing]
        known = state.values["undo"]["known"]
        state.close(units={name: {} if name in down else unit for name, unit in known.items()})
    except (Failed, OSError) as error:
        return f"The files were put back. Whether the services run with them is not known: {error}"
    if down:
        return f"The files were put back, but {', '.join(down)} did not come back."
    return "The files were put back, and the services run with them as before."


def _remember(change: Change, compiled: dict[str, dict[str, Any]]) -> None:
    """The last write of a push: from here on this is what the host has."""
    before, gone = change.state.get("compiled"), set(change.removed)
    change.state.close(
        files=dict.fromkeys(change.files, True),
        compiled=dict.fromkeys((set(before) - gone) | set(compiled), True),
        units={
            name: {
                "restart": unit_fingerprint(unit, "restart_on", change.files),
                "reload": unit_fingerprint(unit, "reload_on", change.files),
            }
            for name, unit in change.bundle["units"].items()
        },
    )


def _summary(change: Change, folders: list[str], installed: int, clock: Clock) -> None:
    parts = []
    if installed:
        parts.append(f"{installed} packages installed")
    for verb, names in (
        ("changed", [*change.changed, *folders]),
        ("removed", change.removed),
        ("restarted", [*change.restart, *change.start]),
        ("reloaded", change.reload),
        ("retired", change.retire),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            parts.append(f"{verb} {shown}")
    say(f"{change.bundle['host']}: {'; '.join(parts)}; {clock}")


def _serves_nobody_yet(bundle: dict[str, Any]) -> None:
    """Says what a host waits for whose services are not asked: the file that holds them back has the words."""
    for reason in sorted({probe["unless"] for probe in bundle["health"] if os.path.exists(probe.get("unless", ""))}):
        said = Path(reason).read_text().strip() or f"it serves not all that it should, since {reason} is there"
        say(f"{bundle['host']}: {said}")


def report(bundle: dict[str, Any]) -> None:
    """Prints as JSON how this host differs from a bundle. Changes nothing."""
    json.dump(difference(bundle), sys.stdout)


def difference(bundle: dict[str, Any]) -> dict[str, Any]:
    """How this host differs from a bundle. Changes nothing.

    Whoever looks without a passphrase does not know the versions of secrets: any that was pushed counts as right.
    """
    secrets = {path: _as_it_stands(path, secret) for path, secret in bundle["secrets"].items()}
    never = sorted(path for path, secret in secrets.items() if secret is None)
    known = {path: secret for path, secret in secrets.items() if secret is not None}
    change = Change({**bundle, "secrets": known}, State())
    return {
        "host": bundle["host"],
        "changed": sorted([*change.changed, *never]),
        "left_over": change.removed,
        "not_active": sorted(name for name in bundle["units"] if not runs(name, change.states.get(name, {}))),
        # Who does not listen is told by its health.
        "behind": sorted({*change.behind, *change.unread} - set(change.deaf)),
    }


def _as_it_stands(path: str, secret: dict[str, Any]) -> dict[str, Any] | None:
    """The same secret with a version that is stored here: the one in its place, else the newest; None without any."""
    if secret_path(secret["name"], secret["version"]).exists():
        return secret
    stored = {p.read_bytes(): p for p in sorted(HOME.glob(f"secrets/{secret['name']}.*"), key=os.path.getmtime)}
    placed = Path(path).read_bytes() if os.path.exists(path) else None
    chosen = stored.get(placed) if placed in stored else next(reversed(stored.values()), None)
    return {**secret, "version": chosen.name.rpartition(".")[2]} if chosen else None


def main(bundle: dict[str, Any]) -> None:
    """Does what a bundle asks for. On failure prints one message and ends with status 1."""
    try:
        with host_lock():
            if "store" in bundle:
                store(bundle)
            elif bundle.get("report"):
                report(bundle)
            else:
                apply(bundle)
    except (Failed, OSError) as failure:
        lines = str(failure).splitlines() or ["?"]
        print(f"{bundle.get('host', '?')}: " + "\n  ".join(lines), file=sys.stderr, flush=True)
        sys.exit(1)
