"""What is concluded from a look at a host from within."""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cryptography import x509

from check import causes
from check.certificates import certificate_advice, judge_days, of_pem
from check.finding import DAY, HOUR, Finding, Findings, Place, age, size
from check.ssh import Seen
from model.network import Role
from model.stack import Host, Stack
from services import data_disk, identity
from services.roles import services_of

AREA = "hosts"
QUEUE = "/var/spool/postfix"
QUEUE_LATE, QUEUE_OLD = 1 * HOUR, 12 * HOUR
"""A mail that waits for an hour meets some trouble, one that waits for half a day meets trouble that stays."""
QUEUE_MANY = 200
LESSONS_LATE = 1 * HOUR
CLOCK_SECONDS, CLOCK_SOON = 5.0, 1.0
RENEWAL_LATE, RENEWAL_FAILURES = 6 * HOUR, 6
"""The host retries later and later, and fails for the seventh time after 21 hours: what passes sooner is no trouble."""
GUESSES = 100
"""Wrong passwords in a day, of an account or a client, that no person types."""
RETURNED = 5
"""So many ways that lead abroad are named on a host."""
LEARNT = 200
"""min_learns of rspamd's statistics, as it comes."""
LISTS_DAYS = 4
"""Debian's timers fetch the lists daily."""
DISK_WRONG, DISK_SOON = 0.05, 0.15
MEMORY_WRONG, MEMORY_SOON = 0.04, 0.10
Report = Mapping[str, Any]


# Reaching them


def judge_reach(stack: Stack, host: Host, seen: Seen, *, others: bool) -> Findings:
    """A host that could not be looked at. ``others`` says whether this machine reached any other host."""
    place = Place(AREA, host.name)
    where = f"{host.management_address} port 22"
    if seen.kind == "key":
        advice = (
            "somebody answers in its place, or it was installed anew: nothing was sent to it. If it was you, put its"
            f" new key under hosts.{host.name}.existing.host_key"
        )
        yield place.wrong(seen.error, advice)
    elif seen.kind == "login":
        yield place.unknown(seen.error, "run ssh-add with a key that stands under access.operators")
    elif seen.kind == "other":
        yield place.unknown(f"{where}: {seen.error}", f"try ssh root@{host.management_address}")
    elif others:
        lost = f"see its console; if its site is lost, leave it out: WITHOUT={host.site}"
        yield place.wrong(f"{seen.error} at {where}, while others do", lost, explains=(causes.unreached(host),))
    else:
        nets = ", ".join(str(network) for network in stack.access.ssh_from)
        yield place.unknown(f"{seen.error} at {where}", f"run this from a network that may (access.ssh_from: {nets})")


# What is seen


def judge(stack: Stack, host: Host, seen: Seen, now: dt.datetime) -> list[Finding]:
    """All that a look at a host tells."""
    report = seen.report
    assert report is not None
    place = Place(AREA, host.name)
    findings: list[Finding] = []
    for name, judging in JUDGES.items():
        if name in report and report[name] is not None:
            findings += judging(stack, host, place, report)
    for name, reason in report["failed"].items():
        findings.append(place.unknown(f"its {name}: {reason}", f"look there: ssh root@{host.management_address}"))
    findings += _clock(place, seen)
    findings += _certificates(stack, host, place, report, now)
    return findings


def _machine(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    machine = report["machine"]
    if machine["container"]:
        yield place.note(f"a container ({machine['container']}): memory, clock and load are those of its host")
        return
    share = machine["available"] / machine["memory"]
    said = f"{size(machine['available'])} of {size(machine['memory'])} memory to spare"
    if share < MEMORY_WRONG:
        yield place.wrong(said, "see who takes it (systemd-cgtop -m), or give the machine more under hosts")
    elif share < MEMORY_SOON:
        yield place.better(said, "see who takes it (systemd-cgtop -m), or give the machine more under hosts")
    else:
        yield place.good(said)
    if machine["load"] > 4 * machine["processors"]:
        yield place.better(f"load {machine['load']:.1f} on {machine['processors']} processors", "see top")


def _disks(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    for disk in report["disks"]:
        for what, free, whole in (
            ("space", disk["free"], disk["size"]),
            ("inodes", disk["free_inodes"], disk["inodes"]),
        ):
            if not whole:
                continue  # Some file systems have no fixed number of inodes.
            amount = f"{size(free)} of {size(whole)}" if what == "space" else f"{free} of {whole} inodes"
            said = f"{disk['path']}: {amount} free"
            advice = f"see what takes it: du -x --max-depth=2 {disk['path']}; mail is refused when it is full"
            if free / whole < DISK_WRONG:
                holds_queue = QUEUE.startswith(f"{disk['path'].rstrip('/')}/") or disk["path"] == QUEUE
                yield place.wrong(said, advice, explains=(causes.queue(host),) if holds_queue else ())
            elif free / whole < DISK_SOON:
                yield place.better(said, advice)
            elif what == "space":
                yield place.good(said)


def _units(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    for unit in report["units"]["failed"]:
        advice = f"see why: journalctl -u {unit} -n 50"
        yield place.wrong(f"{unit} has failed", advice, explains=(causes.unit(host, unit),))
    for unit, times in report["units"]["restarts"].items():
        yield place.better(f"{unit} died and was started again, {times} times", f"see why: journalctl -u {unit}")
    if not report["units"]["failed"]:
        yield place.good("no unit has failed")


def _replaced(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    if report["replaced"]:
        names = ", ".join(name.rpartition("/")[2] for name in report["replaced"])
        yield place.better(f"{names}: the old program still runs after an upgrade", "restart it, or the host")


def _logins(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    taking = [f"{name} {value}" for name, value in report["logins"].items() if value != "no"]
    if taking:
        advice = "see which file says so: grep -ri password /etc/ssh/sshd_config /etc/ssh/sshd_config.d"
        yield place.wrong(f"its SSH server takes passwords ({', '.join(taking)})", advice)
    else:
        yield place.good("its SSH server takes no passwords")


def _drift(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    drift = report["drift"]
    mend = f"make up STACK={stack.name} PUSH={host.name} puts it right"
    for path in drift["changed"]:
        lines = "; ".join(drift["lines"].get(path, ()))
        yield place.wrong(f"{path} is not what the stack says{f': {lines}' if lines else ''}", mend)
    for path in drift["left_over"]:
        yield place.better(f"{path} is left of an earlier push", mend)
    for unit in drift["not_active"]:
        advice = f"start it, or see why: journalctl -u {unit} -n 50"
        # Each path that is kept on the data disk is a mount of its own (services/data_disk.py).
        below = unit in map(data_disk.mount_unit, data_disk.kept(host))
        because = (causes.unit(host, unit), *([causes.unit(host, data_disk.mount_unit("/data"))] if below else []))
        yield place.wrong(f"{unit} does not run", advice, because, _served_by(stack, host, unit))
    for unit in drift["behind"]:
        yield place.better(f"{unit} has not taken up its present files", mend)
    if not any(drift[key] for key in ("changed", "left_over", "not_active", "behind")):
        yield place.good("all files and units are as the stack says")


def _served_by(stack: Stack, host: Host, unit: str) -> tuple[str, ...]:
    """What cannot be well while a unit does not run: its service, and the ports of that."""
    own = [service for service in services_of(stack, host) if any(its.name == unit for its in service.units)]
    ports = [causes.port(host, listen.port) for service in own for listen in service.listens]
    return (*(causes.service(host, service.name) for service in own), *ports)


ADVICE = {
    "listen": "start its daemon again; its journal says what it could not bind, and ss -ltnup who listens",
    "addresses": "see what networkd says: networkctl status, journalctl -u systemd-networkd",
}
"""What to do about a probe that goes wrong, by its kind."""


def _health(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    health = report["health"]
    for wrong in health["wrong"]:
        port = f" on port {wrong['port']}" if wrong["port"] else ""
        advice = ADVICE.get(wrong["kind"], "see its journal")
        because = (causes.service(host, wrong["service"]),)
        yield place.wrong(f"{wrong['service']}{port}: {wrong['said']}", advice, because)
    if health["asked"] and not health["wrong"]:
        yield place.good(f"{health['asked']} transactions with its own services go well")


def _queue(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    queue = report["queue"]
    count, oldest = sum(queue["count"].values()), queue["oldest"]
    why = f" ({queue['reasons'][0][0]})" if queue["reasons"] else ""
    said = f"{count} mails wait, the oldest for {age(oldest)}{why}"
    advice = "see them with postqueue -p; a foreign server that is down for long is no fault of yours"
    if held := queue["count"].get("hold", 0):
        yield place.better(f"{held} mails are held", "postsuper -H ID lets one go, postsuper -d ID deletes it")
    if count and (oldest > QUEUE_OLD or count > QUEUE_MANY):
        yield (
            place.better(said, advice) if host.has(Role.SMTP_OUT) and count <= QUEUE_MANY else place.wrong(said, advice)
        )
    elif count and oldest > QUEUE_LATE:
        yield place.better(said, advice)
    else:
        yield place.good(said if count else "no mail waits")


def _returned(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    """What was sent on and came back: its sender was told, and its reader here hears nothing of it."""
    told: dict[str, tuple[int, str]] = {}
    for way, by, to, count, said in report["returned"]:
        who = f"a filter of {by}" if way == "filter" else " and ".join(_leading_to(stack, to)[:3]) or "a former alias"
        told[f"{who} to {to}"] = (count, said)
    if told:
        total = sum(count for count, _ in told.values())
        ways = [f'{way} ({count}: "{said}")' for way, (count, said) in list(told.items())[:RETURNED]]
        advice = (
            "ask those who read there, or their postmaster, to take what comes from here, or let the alias or filter"
            f" lead to an account: make trace STACK={stack.name} WHAT=ADDRESS shows each mail"
        )
        yield place.better(f"of what was sent on, {total} came back in 24 hours: from {'; '.join(ways)}", advice)


def _leading_to(stack: Stack, address: str) -> list[str]:
    """The addresses of the stack's domains that lead to one elsewhere."""
    return [
        f"{local}@{domain}"
        for domain in stack.domains
        for local, targets in stack.resolved_aliases(domain).items()
        if any(target.address == address.lower() for target in targets)
    ]


def _lessons(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    for scanner, waiting in report["lessons"].items():
        said = f"{waiting['count']} lessons for {scanner} wait, the oldest for {age(waiting['oldest'])}"
        if waiting["oldest"] > LESSONS_LATE:
            yield place.better(said, "see journalctl -u posthorn-learn")
        else:
            yield place.good(said)


def _packages(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    packages = report["packages"]
    if packages["reboot"]:
        yield place.better("wants to be started anew after an upgrade", "reboot it, one site at a time")
    if stack.dns.resolver.root_hints:
        yield place.note("no security updates come here: the stack lives on an internet of its own")
    elif packages["lists"] is None or packages["lists"] > LISTS_DAYS * DAY:
        since = f"for {age(packages['lists'])}" if packages["lists"] else "ever"
        yield place.wrong(f"has not looked for security updates {since}", "see systemctl status apt-daily.service")
    elif packages["security"]:
        said = f"{len(packages['security'])} security updates wait: {', '.join(packages['security'][:5])}"
        yield place.better(said, "they come by themselves within a day: see /var/log/unattended-upgrades")
    else:
        yield place.good("has all security updates")


def _renewal(stack: Stack, host: Host, place: Place, report: Report) -> Findings:
    renewal, now = report["renewal"], report["time"]
    since = now - dt.datetime.fromisoformat(renewal["tried"]).timestamp()
    if since > RENEWAL_LATE:
        yield place.wrong(
            f"nobody has looked after its public certificates for {age(since)}",
            "see systemctl status posthorn-certificate.timer",
        )
    # Until the program of now has run, the status is that of one certificate.
    known = renewal.get("certificates", {"": renewal})
    failed = {of: status for of, status in known.items() if status.get("failures")}
    for of, status in failed.items():
        times = "once" if status["failures"] == 1 else f"{status['failures']} times"
        named = f"certificate for the names of {of}" if of else "certificate"
        said = f"its public {named} was not renewed, {times}: {status['error']}"
        late = status["failures"] > RENEWAL_FAILURES or not status["ends"]
        yield (place.wrong if late else place.better)(said, certificate_advice(stack, host))
    rest = [status for of, status in known.items() if of not in failed]
    good = sum(bool(status.get("ends")) for status in rest)
    if good:
        yield place.good(f"looks after its public certificates ({good})")
    if good < len(rest):
        advice = (
            "the host asks for some in each run, every 20 minutes: systemctl start posthorn-certificate goes on now"
        )
        yield place.better(f"{len(rest) - good} of its public certificates were not yet asked for", advice)


JUDGES: Mapping[str, Callable[[Stack, Host, Place, Report], Findings]] = {
    "machine": _machine,
    "disks": _disks,
    "units": _units,
    "replaced": _replaced,
    "logins": _logins,
    "drift": _drift,
    "health": _health,
    "queue": _queue,
    "returned": _returned,
    "lessons": _lessons,
    "packages": _packages,
    "renewal": _renewal,
}


def _clock(place: Place, seen: Seen) -> Findings:
    assert seen.report is not None
    machine, clock = seen.report.get("machine"), seen.report.get("clock")
    off, advice = abs(seen.offset), "see timedatectl timesync-status on it, and the clock of this machine"
    if off > CLOCK_SECONDS:
        yield place.wrong(f"its clock is {off:.0f} s {'ahead' if seen.offset > 0 else 'behind'}", advice)
    elif off > CLOCK_SOON:
        yield place.better(f"its clock is {off:.1f} s {'ahead' if seen.offset > 0 else 'behind'}", advice)
    elif machine and not machine["container"] and clock and not clock["synchronized"]:
        yield place.better(
            "nobody keeps its clock right", "see timedatectl timesync-status: can it reach a time server?"
        )
    elif machine and not machine["container"]:
        yield place.good("its clock is right")


def _certificates(stack: Stack, host: Host, place: Place, report: Report, now: dt.datetime) -> Findings:
    shown = {identity.public(of) for of in stack.acme_certificates(host)}
    for path, text in report.get("certificates", {}).items():
        try:
            certificate = of_pem(text)
        except ValueError:
            yield place.wrong(f"{path} is no certificate", f"make up STACK={stack.name}")
            continue
        # That of a domain that left is kept until it ends, and shown to nobody.
        if path.startswith(f"{identity.FOLDER}public") and path not in shown:
            continue
        # An authority outlives all that it signs.
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not basic.ca:
            yield from judge_days(place, stack, certificate, now, path)


# Hosts beside one another


def judge_versions(stack: Stack, reports: Mapping[str, Report]) -> Findings:
    """Versions of the daemons: told, and compared between hosts of one release."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    releases: Counter[str] = Counter()
    for name, report in reports.items():
        release = report.get("machine", {}).get("release", "?")
        releases[release] += 1
        for package, version in report.get("packages", {}).get("versions", {}).items():
            found[package, release.partition(".")[0]][version].append(name)
    place = Place(AREA, "versions")
    for (package, _), versions in found.items():
        if len(versions) > 1:
            *fewer, most = sorted(versions, key=lambda version: len(versions[version]))
            listed = "; ".join(f"{version} on {', '.join(versions[version])}" for version in fewer)
            yield place.better(f"{package} is {most} on most hosts, and {listed}", "see why upgrades do not come there")
    shown = ("postfix", "dovecot-core", "rspamd", "unbound", "nginx")
    daemons = [f"{p} {next(iter(v)).partition('-')[0]}" for (p, _), v in sorted(found.items()) if p in shown]
    if releases:
        yield place.note(f"Debian {', '.join(f'{r} on {n}' for r, n in releases.items())}; {', '.join(daemons)}")


def judge_journals(reports: Mapping[str, Report]) -> Findings:
    """Warnings in the journals: strangers cause many of them, so they are told and not judged."""
    told = []
    for name, report in reports.items():
        journal = report.get("journal") or {"count": 0, "most": []}
        if journal["count"]:
            told.append(f"{name} {journal['count']} ({', '.join(f'{who} {n}' for who, n in journal['most'])})")
    place = Place(AREA, "journals")
    if told:
        yield place.note(f"warnings of a day (journalctl -p warning): {'; '.join(told)}")
    elif reports:
        yield place.good("no warning for a day")


def judge_guesses(stack: Stack, reports: Mapping[str, Report]) -> Findings:
    """Wrong passwords of a day, over all hosts: for each account by whatever name it was tried, and for each client."""
    accounts: Counter[str] = Counter()
    clients: Counter[str] = Counter()
    for report in reports.values():
        guesses = report.get("guesses") or {"names": [], "clients": []}
        for name, count in guesses["names"]:
            accounts[stack.logins.get(name, "")] += count
        clients.update(dict(guesses["clients"]))
    place, nobody = Place(AREA, "passwords"), accounts.pop("", 0)
    many = [(f"wrong passwords for {account}", count) for account, count in accounts.most_common() if count >= GUESSES]
    many += [(f"wrong passwords from {client}", count) for client, count in clients.most_common() if count >= GUESSES]
    if many:
        told = ", ".join(f"{count} {whose}" for whose, count in many[:10])
        advice = (
            "a forgotten mail program of the user's, or somebody who guesses: journalctl -t dovecot -g mismatch on"
            " maildrop and smtp-out hosts names both: set another password, or keep that client from the front ends"
        )
        yield place.better(f"{told} in 24 hours", advice)
    elif reports:
        yield place.good(f"{accounts.total()} wrong passwords for accounts and {nobody} for unknown names in 24 hours")


def judge_learning(reports: Mapping[str, Report]) -> Findings:
    """What the scanners have learnt. Below some number of mails of each kind their statistics say nothing."""
    known = {name: report["scanner"] for name, report in reports.items() if report.get("scanner")}
    few = {name: kinds for name, kinds in known.items() if min(kinds.values()) < LEARNT}
    if few:
        counts = {name: ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())) for name, kinds in few.items()}
        told = "; ".join(f"{name} {count}" for name, count in counts.items())
        yield Place(AREA, "statistics").note(f"silent until {LEARNT} mails of each kind are learnt: {told}")
    elif known:
        yield Place(AREA, "statistics").good(f"{len(known)} scanners have learnt enough of each kind")


def paths(stack: Stack, host: Host) -> Sequence[str]:
    """Where a host writes: the file systems that must not be full."""
    return ("/", "/var", "/var/log", "/tmp", "/boot", *data_disk.kept(host))
