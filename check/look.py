"""Looks at a host from within, and prints what it sees as JSON. Changes nothing, concludes nothing.

With Python's standard library alone: it is sent over the one SSH connection of the check, and runs as root. What
cannot be seen is left out, with the reason under ``failed``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import difflib
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Task = dict[str, Any]
COMMAND_SECONDS = 120
JOURNAL_LINES = "3000"
OLD_TLS = r"TLS library problem: .*unsupported protocol"
"""What Postfix says when somebody, this check among others, tries a version of TLS that it does not speak."""


def run(*command: str) -> str:
    """What a command prints. Raises `OSError` or `subprocess.SubprocessError` when it cannot be had."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=COMMAND_SECONDS)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def found(*command: str) -> str:
    """What a search prints: an exit status of 1 says that nothing was found."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if done.returncode > 1:
        raise OSError(f"{command[0]}: {done.stderr.strip()[-300:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def machine(task: Task) -> Any:
    """Memory in bytes, the release, how long it has been up; and whether it is a container, which has no clock."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        fields[key] = int(rest.split()[0]) * 1024
    container = Path("/run/systemd/container")
    return {
        "container": container.read_text().strip() if container.exists() else "",
        "memory": fields["MemTotal"],
        "available": fields["MemAvailable"],
        "swap": fields["SwapTotal"],
        "swap_free": fields["SwapFree"],
        "release": Path("/etc/debian_version").read_text().strip(),
        "kernel": os.uname().release,
        "processors": os.cpu_count(),
        "load": os.getloadavg()[1],
        "up": float(Path("/proc/uptime").read_text().split()[0]),
    }


def clock(task: Task) -> Any:
    """Whether systemd-timesyncd has set the clock since the start: it leaves a mark (systemd-timesyncd.service(8))."""
    return {"synchronized": os.path.exists("/run/systemd/timesync/synchronized")}


def disks(task: Task) -> Any:
    """Free space and free inodes of every file system that the stack writes to, by where it is mounted."""
    found = {}
    for path in task["paths"]:
        if os.path.exists(path):
            status = os.statvfs(path)
            found[os.stat(path).st_dev] = {
                "path": _mount_point(path),
                "size": status.f_blocks * status.f_frsize,
                "free": status.f_bavail * status.f_frsize,
                "inodes": status.f_files,
                "free_inodes": status.f_favail,
            }
    return list(found.values())


def _mount_point(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What runs


def units(task: Task) -> Any:
    """Units that failed; and of the stack's own: how often each was started again by itself."""
    failed = run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "--full")
    restarts = {}
    if task["units"]:
        shown = run("systemctl", "show", "--property=Id,NRestarts", "--", *task["units"])
        for block in shown.strip().split("\n\n"):
            fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            if int(fields.get("NRestarts") or 0):
                restarts[fields["Id"]] = int(fields["NRestarts"])
    return {"failed": [line.split()[0] for line in failed.splitlines() if line.strip()], "restarts": restarts}


def replaced(task: Task) -> Any:
    """Programs that run from a file that is not there any more: an upgrade that they did not take up."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program = os.readlink(process / "exe")
            if program.endswith(" (deleted)") and program.startswith(("/usr", "/bin", "/sbin", "/lib")):
                found.add(program.removesuffix(" (deleted)"))
    return sorted(found)


def journal(task: Task) -> Any:
    """Warnings and errors of a day: how many, and of whom the most."""
    command = ("journalctl", "--quiet", "--priority=warning", "--since=-24h", "--output=json", "-n", JOURNAL_LINES)
    text = run(*command, "--output-fields=SYSLOG_IDENTIFIER,PRIORITY,MESSAGE,_TRANSPORT")
    by_whom: Counter[str] = Counter()
    worst, last = 7, {}
    for line in text.splitlines():
        entry = json.loads(line)
        if re.search(OLD_TLS, str(entry.get("MESSAGE", ""))):
            continue
        name = str(entry.get("SYSLOG_IDENTIFIER", "?"))
        by_whom[name] += 1
        worst = min(worst, int(entry["PRIORITY"]))
        last[name] = str(entry.get("MESSAGE", ""))[:200]
    return {"count": sum(by_whom.values()), "worst": worst, "most": by_whom.most_common(3), "last": last}


WRONG_PASSWORD = (
    r"lua(?:\((?P<old>.*),(?P<from>[0-9a-fA-F.:]+)(?:,<[^>]*>)?\))?: (?:db-lua: )?(?:Password mismatch|unknown user)"
)
NEW_PREFIX = r"^auth(?:-worker)?\((?P<new>.*),(?P<at>[0-9a-fA-F.:]+)(?:,[^)]*)?\)"
"""How Dovecot 2.3 says whose password was wrong, and 2.4, which names them in front: the worker that looked, or the
process "auth" of one that it remembers."""


def guesses(task: Task) -> Any:
    """Passwords that were wrong in a day: how many by the name that was tried, and by the client; the first of each."""
    text = found("journalctl", "--quiet", "--since=-24h", "-t", "dovecot", "-o", "cat", "-g", "mismatch|nknown user")
    names: Counter[str] = Counter()
    clients: Counter[str] = Counter()
    for line in text.splitlines():
        if (said := re.search(WRONG_PASSWORD, line)) and (who := said if said["from"] else re.search(NEW_PREFIX, line)):
            name, client = (who["old"], who["from"]) if said["from"] else (who["new"], who["at"])
            names[name.lower()] += 1
            clients[client] += 1
    return {"names": names.most_common(50), "clients": clients.most_common(50)}


def logins(task: Task) -> Any:
    """Whether the SSH server takes passwords: its settings as they count for this very connection (sshd(8), -T, -C).

    Nothing more is asked for than to be root here, and no port is knocked at.
    """
    client, _, server, port = os.environ["SSH_CONNECTION"].split()
    connection = f"user=root,host={client},addr={client},laddr={server},lport={port}"
    settings = dict(line.partition(" ")[::2] for line in run("/usr/sbin/sshd", "-T", "-C", connection).splitlines())
    return {name: settings[name] for name in ("passwordauthentication", "kbdinteractiveauthentication")}


def drift(task: Task) -> Any:
    """How the host differs from its bundle, by the agent's own word, with the first lines that differ."""
    with contextlib.suppress(FileNotFoundError), open("/var/lib/posthorn/lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise OSError(f"a push is under way ({lock.read().strip()})") from None
    found = agent(task)["difference"](task["bundle"])
    found["lines"] = {path: _lines(task, path) for path in found["changed"] if path in task["bundle"]["files"]}
    return found


def _lines(task: Task, path: str) -> list[str]:
    """What a file has more (+) and less (-) than it should, its first lines."""
    should = task["bundle"]["files"][path]["content"].splitlines()
    try:
        has = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ["it is gone"]
    compared = list(difflib.unified_diff(should, has, n=0, lineterm=""))[2:]
    return [line[:160] for line in compared if line[0] in "+-"][:3] or ["its owner, group or mode"]


def agent(task: Task) -> dict[str, Any]:
    """The agent, as it would run with a bundle."""
    scope: dict[str, Any] = {"__name__": "agent"}
    exec(compile(task["agent"], "agent", "exec"), scope)
    return scope


def health(task: Task) -> Any:
    """What the services say to the transactions by which the agent knows that they are well."""
    probes = agent(task)["PROBES"]

    def ask(probe: dict[str, Any]) -> str | None:
        try:
            return probes[probe["kind"]](probe)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what the service did)
            return str(error) or type(error).__name__

    wrong = []
    # A service that is to serve nobody yet is not asked.
    asked = [probe for probe in task["bundle"]["health"] if not os.path.exists(probe.get("unless", ""))]
    for probe in asked:
        # Once more, before it is called ill: a daemon may have just been reloaded.
        if ask(probe) and (said := ask(probe)):
            wrong.append({"service": probe["service"], "kind": probe["kind"], "port": probe.get("port"), "said": said})
    return {"asked": len(asked), "wrong": wrong}


# ---------------------------------------------------------------------------------------------------------------------
# Mail


def queue(task: Task) -> Any:
    """Postfix's queues: how many, since when, and why (postqueue(1))."""
    if not os.path.exists("/etc/postfix/main.cf"):
        return None
    count: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    oldest: float | None = None
    for line in run("postqueue", "-j").splitlines():
        mail = json.loads(line)
        count[mail["queue_name"]] += 1
        oldest = min(oldest or mail["arrival_time"], mail["arrival_time"])
        for recipient in mail["recipients"]:
            if reason := recipient.get("delay_reason"):
                reasons[reason[:160]] += 1
    age = time.time() - oldest if oldest else 0
    return {"count": dict(count), "oldest": age, "reasons": reasons.most_common(2)}


FORWARDING = {"postfix/forward/smtpd": "alias", "postfix/redirected/smtpd": "filter"}
"""By which ways Postfix takes what is sent on: of aliases an MX from itself, of users' filters smtp-out."""
TELLING = ("postfix/qmgr", "postfix/smtp", "postfix/out/smtp", "postfix/error", "postfix/bounce")
RETURNED = 100
"""So many of a day's bounces are looked at."""


def returned(task: Task) -> Any:
    """Mails that were sent on, of which a bounce of the last day says that they did not arrive: by what, whose filter
    that was (its sender; nobody for an alias), to whom, how many, and what the other side said last.

    None where there is no Postfix. Where there were no bounces, nothing else is searched for.
    """
    if not os.path.exists("/etc/postfix/main.cf"):
        return None
    search = ("journalctl", "--quiet", "--output=json", "--output-fields=SYSLOG_IDENTIFIER,MESSAGE")
    notices = (*search, "--since=-24h", "-n", str(RETURNED), "-t", "postfix/bounce", "-g", ": sender non-delivery")
    told = {mail for _, mail, _ in _of_mails(found(*notices))}
    if not told:
        return []
    names = (part for name in (*FORWARDING, *TELLING) for part in ("-t", name))
    # A mail waits five days at most.
    lines = (*search, "--since=-6d", "-n", JOURNAL_LINES, *names, "-g", f"^({'|'.join(sorted(told))}): ")
    return _returned(_of_mails(found(*lines)))


def _of_mails(text: str) -> list[tuple[str, str, str]]:
    """Lines of a journal about mails, in order: who said what of which queue ID."""
    entries = []
    for line in text.splitlines():
        entry = json.loads(line)
        message = entry.get("MESSAGE") or ""
        # What is not text comes as numbers (systemd.journal-fields(7)). It may be a stranger's, and goes to a terminal.
        said = message if isinstance(message, str) else bytes(message).decode(errors="replace")
        said = "".join(letter if letter.isprintable() else "?" for letter in said)
        if about := re.match(r"([0-9A-Za-z]{6,20}): (.*)", said):
            at = int(entry["__REALTIME_TIMESTAMP"])
            entries.append((at, str(entry.get("SYSLOG_IDENTIFIER", "")), about[1], about[2]))
    return [entry[1:] for entry in sorted(entries, key=lambda entry: entry[0])]


def _returned(lines: list[tuple[str, str, str]]) -> Any:
    by_whom: Counter[tuple[str, str, str]] = Counter()
    last: dict[tuple[str, str, str], str] = {}
    # By queue ID: its way, its sender, and of each recipient whether that is final, and the words.
    under_way: dict[str, tuple[str, str, dict[str, tuple[bool, str]]]] = {}
    for who, mail, text in lines:
        if text.startswith("client=") and who in FORWARDING:
            under_way[mail] = (FORWARDING[who], "", {})
        elif text == "removed":
            # Its queue ID may come again, for any other mail.
            under_way.pop(mail, None)
        elif mail in under_way:
            way, sender, recipients = under_way[mail]
            if who == "postfix/qmgr" and (begins := re.match(r"from=<(.*)>, size=", text)):
                under_way[mail] = (way, begins[1], recipients)
            elif result := re.match(r"to=<(.*?)>, .*?\bstatus=(\w+) \((.*)\)$", text):
                recipients[result[1]] = (result[2] == "bounced", result[3])
                if result[2] == "sent":
                    del recipients[result[1]]
            elif text.startswith("sender non-delivery notification"):
                # Whoever was not refused waits still; where nobody was, the time was over for all.
                refused = {to: said for to, (is_final, said) in recipients.items() if is_final}
                for to, said in (refused or {to: said for to, (_, said) in recipients.items()}).items():
                    key = (way, sender if way == "filter" else "", to)
                    by_whom[key] += 1
                    last[key] = re.sub(r"^.*? said: | \(in reply to [^()]*\)$", "", said)[:160]
                recipients.clear()
    return [[*key, count, last[key]] for key, count in by_whom.most_common(20)]


def lessons(task: Task) -> Any:
    """What users taught, and has not reached each scanner yet."""
    found = {}
    for folder in Path(task["spool"]).glob("*") if task["spool"] else ():
        times = [item.stat().st_mtime for item in folder.iterdir()]
        if times:
            found[folder.name] = {"count": len(times), "oldest": time.time() - min(times)}
    return found


def scanner(task: Task) -> Any:
    """How many mails of each kind the scanner has learnt, by its controller; None where there is no scanner."""
    if not os.path.exists("/etc/rspamd/local.d/worker-controller.inc"):
        return None
    with urllib.request.urlopen("http://127.0.0.1:11334/stat", timeout=COMMAND_SECONDS) as answer:
        return {kind["symbol"]: kind["revision"] for kind in json.load(answer)["statfiles"]}


def mailboxes(task: Task) -> Any:
    """What the sync service says of the mailboxes (docs/replication.md); None where there is none."""
    if not os.path.exists("/usr/local/sbin/posthorn-sync") or "posthorn-sync.service" not in task["units"]:
        return None
    # Its exit status says whether all is well: what is not stands in its words.
    command = ("posthorn-sync", "status", "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if not done.stdout.strip():
        raise OSError((done.stderr.strip() or "posthorn-sync says nothing")[-300:])
    return json.loads(done.stdout)


def former(task: Task) -> Any:
    """Homes on a mailbox host whose account is gone: how much is in each, and when something last changed."""
    found = {}
    for home in Path(task["homes"]).iterdir() if task["homes"] else ():
        # One that is being removed just now is gone.
        with contextlib.suppress(FileNotFoundError):
            if home.name not in task["accounts"]:
                files = [path.lstat() for path in (home, *home.rglob("*"))]
                size = sum(file.st_size for file in files)
                found[home.name] = {"size": size, "changed": max(file.st_mtime for file in files)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Packages and certificates


def packages(task: Task) -> Any:
    """Versions of the stack's packages, and what waits to be installed."""
    listed = run("dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Abbrev}\n", *task["bundle"]["packages"])
    versions = {line.split()[0]: line.split()[1] for line in listed.splitlines() if line.endswith("ii ")}
    stamps = [p.stat().st_mtime for p in Path("/var/lib/apt/lists").glob("*_Packages*")]
    waiting = []
    if stamps:
        simulated = run("apt-get", "--simulate", "-qq", "-o", "Debug::NoLocking=true", "upgrade")
        waiting = [s.split()[1] for s in simulated.splitlines() if s.startswith("Inst ") and "-security" in s.lower()]
    return {
        "versions": versions,
        "lists": time.time() - max(stamps) if stamps else None,
        "security": waiting,
        "reboot": Path("/run/reboot-required").exists(),
    }


def certificates(task: Task) -> Any:
    """Every certificate that the stack put here, in PEM."""
    files = sorted(Path("/etc/posthorn").rglob("*.pem"))
    return {str(file): text for file in files if "BEGIN CERTIFICATE" in (text := file.read_text(errors="replace"))}


def renewal(task: Task) -> Any:
    """How the last renewal by ACME went (docs/certificates.md); None where there is none."""
    status = Path("/var/lib/acme/status.json")
    return json.loads(status.read_text()) if status.exists() else None


def others(task: Task) -> Any:
    """What this host sees of the ports of others, by the wire module that comes along."""
    import asyncio

    scope: dict[str, Any] = {"__name__": "wire"}
    exec(compile(task["wire"], "wire", "exec"), scope)
    files = {"stack": Path("/etc/posthorn/authority.pem"), "world": Path("/etc/posthorn/roots.pem")}
    authorities = {whose: file.read_text() if file.exists() else "" for whose, file in files.items()}
    return asyncio.run(scope["talk_to_all"](task["targets"], authorities))


LOOKS: dict[str, Callable[[Task], Any]] = {
    "machine": machine,
    "clock": clock,
    "disks": disks,
    "units": units,
    "replaced": replaced,
    "journal": journal,
    "guesses": guesses,
    "logins": logins,
    "drift": drift,
    "health": health,
    "queue": queue,
    "returned": returned,
    "lessons": lessons,
    "scanner": scanner,
    "mailboxes": mailboxes,
    "former": former,
    "packages": packages,
    "certificates": certificates,
    "renewal": renewal,
    "others": others,
}


def look(task: Task) -> dict[str, Any]:
    """All looks side by side: they wait for other programs most of the time."""
    seen: dict[str, Any] = {"failed": {}, "time": time.time()}
    with concurrent.futures.ThreadPoolExecutor(len(LOOKS)) as pool:
        futures = {name: pool.submit(one, task) for name, one in LOOKS.items()}
        for name, future in futures.items():
            try:
                seen[name] = future.result()
            except Exception as error:  # noqa: BLE001 (one look that fails says so, and the others go on)
                seen["failed"][name] = f"{type(error).__name__}: {error}"
    return seen


def main(task: Task) -> None:
    """Prints what is seen, and nothing else."""
    kept, sys.stdout = sys.stdout, io.StringIO()
    try:
        seen = look(task)
    except Exception:  # noqa: BLE001 (what went wrong is what there is to see)
        seen = {"failed": {"look": traceback.format_exc(limit=2)}}
    finally:
        sys.stdout = kept
    json.dump(seen, sys.stdout)
