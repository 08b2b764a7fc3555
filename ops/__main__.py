"""The operator's commands, one a target of the Makefile."""

from __future__ import annotations

import argparse
import base64
import getpass
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from components.platform import FIRST, WITHOUT
from components.zones import ADOPT
from model.base import StackError
from model.keys import Keys, PrivateKeys, PublicKeys
from model.load import PROJECT
from ops import keys as keymaking
from ops import name_server, records, rolling, ssh, stackfile
from ops.pulumi import (
    OperatorError,
    Project,
    anew_at_once,
    disks_as_they_were,
    excluded,
    has_machines,
    left_behind,
    locked_out,
    pushed_again,
    unlock,
    unreachable,
)
from ops.render import left_out, render_stack
from services.bundle import Conflict
from services.dovecot import hashed
from services.zones import removed_from_dmarc

WIDTH = 200
"""Columns of what goes to a file, a pipe or a mail, where COLUMNS does not say: each finding has one line."""


def _console(columns: str | None, *, is_terminal: bool) -> Console:
    """A console as wide as its terminal. Without one it would be 80 columns wide, and fold each finding."""
    return Console(highlight=False, width=None if is_terminal or columns else WIDTH)


console = _console(os.environ.get("COLUMNS"), is_terminal=sys.stdout.isatty())

TAKEN_BY = {
    # Not by down: what is left out of a removal keeps all that it depends on, and sites depend on one another.
    "without": ("up", "preview", "refresh", "check", "trace"),
    "adopt": ("up", "preview"),
    "delete": ("up", "preview"),
    "push": ("up", "preview"),
}
"""Words, and the commands that go by them. All others refuse them: whoever says one relies on it."""


def _private_keys(project: Project) -> PrivateKeys:
    if not stackfile.has_private_keys(project.stack_file):
        return PrivateKeys()
    return Keys.parse_private(project.run("config", "get", "--path", f"{PROJECT}:keys.private").strip())


def _store_private_keys(project: Project, private: PrivateKeys, file: Path) -> None:
    # Through standard input: an argument could be read by every user of the machine.
    text = json.dumps(private.model_dump(), sort_keys=True)
    path = f"{PROJECT}:keys.private"
    project.run("config", "set", "--config-file", str(file), "--secret", "--path", path, text=text)


def make_keys(project: Project, words: Sequence[str]) -> int:
    """Makes the keys that are missing, takes the next step for each that is to be replaced, and says which."""
    stack = project.load(keys_needed=False)
    project.ensure_exists()
    public, private, steps = stack.keys.public, _private_keys(project), list[rolling.Step]()
    if words:
        public, private, steps = rolling.roll(stack, words, public, private, records.state_of(project))
    ring = keymaking.complete(stack, public, private)
    if not ring.made and not steps:
        console.print(f"{project.stack}: all keys are there, nothing was made")
        return 0
    # Neither half is ever there without the other, wherever a run is cut.
    with stackfile.replaced_at_once(project.stack_file) as file:
        _store_private_keys(project, PrivateKeys.model_validate(ring.private), file)
        stackfile.set_public_keys(file, PublicKeys.model_validate(ring.public).model_dump(exclude_defaults=True))
    for line in (*(step.done for step in steps), *(f"made: {made}" for made in ring.made)):
        console.print(line, markup=False)
    console.print(f"written to {project.stack_file}: commit it")
    for step in steps:
        console.print(f"next: {step.after}", markup=False, soft_wrap=True)
    return 0


def set_tsig(project: Project, key: str) -> int:
    """Stores the TSIG secret (base64, read from standard input) that a DNS server knows a key by.

    Raises `OperatorError` where it would never be used, or could not be.
    """
    stack = project.load(keys_needed=False)
    known, key = sorted({server.key for server in stack.dns.servers.values()}), key.rstrip(".").lower()
    if key not in known:
        names = ", ".join(known) or "none"
        raise OperatorError(f"KEY={key}: no server under dns.servers takes updates by such a key (keys: {names})")
    secret = sys.stdin.readline() if not sys.stdin.isatty() else getpass.getpass(f"secret of {key}: ")
    secret = secret.strip()
    try:
        usable = bool(base64.b64decode(secret, validate=True))
    except ValueError:
        usable = False
    if not usable:
        raise OperatorError(f"that is no secret of a TSIG key: it is text in base64, as the name server has {key}")
    project.ensure_exists()
    private = _private_keys(project)
    private = private.model_copy(update={"tsig": {**private.tsig, key: secret}})
    _store_private_keys(project, private, project.stack_file)
    console.print(f"stored the secret of TSIG key {key}")
    return 0


def print_update_keys(project: Project, server: str) -> int:
    """Prints what the name server has to be told, with secrets: for a file that it alone reads."""
    stack = project.load()
    if not name_server.asking_hosts(stack):
        raise OperatorError("no host asks an ACME authority: the stack names none (acme), or no zone with a server")
    keys = stack.keys.model_copy(update={"private": _private_keys(project)})
    sys.stdout.write(name_server.told(stack.model_copy(update={"keys": keys}), server))
    return 0


def print_password_hash() -> int:
    """Prints the hash of a password, in the notation of Dovecot, for an account in the stack file."""
    if sys.stdin.isatty():
        password = getpass.getpass("password: ")
        if getpass.getpass("once more: ") != password:
            console.print("these were two passwords: nothing was hashed", style="red")
            return 1
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        console.print("an empty password is none: nothing was hashed", style="red")
        return 1
    # Not by the console, which would fold it where a terminal is narrow.
    print(hashed(password))
    return 0


def render(project: Project, out: Path) -> int:
    """Writes all files of all hosts and all zones below a folder."""
    stack = project.load(keys_needed=False)
    written = render_stack(stack, out)
    console.print(f"{written} files of {project.stack} written below {out}")
    if missing := left_out(stack):
        print(missing, file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Words:
    """What an operator says beside the stack: sites that are lost, RRsets to take over, zones to delete from, hosts to
    push to again."""

    without: Sequence[str] = ()
    adopt: Sequence[str] = ()
    delete: Sequence[str] = ()
    push: Sequence[str] = ()


def _checked(project: Project, words: Words) -> tuple[list[str], dict[str, str]]:
    """Arguments and variables for Pulumi. Raises `OperatorError` with every reason not to start."""
    stack = project.load()
    for account in stack.without_address:
        console.print(f"accounts.{account}: gets no mail, as no alias of any domain leads to it", style="yellow")
    for remark in removed_from_dmarc(stack.dns.dmarc):
        console.print(f"dns.dmarc: {remark}", style="yellow")
    flags = [*excluded(stack, words.without), *pushed_again(stack, words.push, words.without)]
    project.ensure_exists()
    exported = records.state_of(project)
    adopted = records.adopted(stack, words.adopt)
    problems = [*left_behind(project, exported), *anew_at_once(stack, exported)]
    problems += [*locked_out(stack), *unreachable(stack, words.without)]
    problems += records.too_many_deletions(stack, records.published(exported), words.delete)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise OperatorError(f"{project.stack}: not started, nothing was changed:\n{listed}")
    for line in disks_as_they_were(stack, exported):
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    first = "" if has_machines(stack, exported) else "yes"
    return flags, {ADOPT: adopted, WITHOUT: ",".join(words.without), FIRST: first}


def up(project: Project, words: Words, yes: bool) -> int:
    """Brings the stack to what its file says."""
    started = time.monotonic()
    flags, variables = _checked(project, words)
    status = project.show("up", *(["--yes", "--skip-preview"] if yes else []), *flags, **variables)
    console.print(f"make up {'ended' if status == 0 else 'failed'} after {time.monotonic() - started:.1f} s")
    return status


def preview(project: Project, words: Words) -> int:
    """Shows what would change: host, file and lines."""
    flags, variables = _checked(project, words)
    return project.show_changes("preview", "--diff", *flags, **variables)


def refresh(project: Project, without: Sequence[str], yes: bool) -> int:
    """Compares the state with what is there."""
    stack = project.load()
    # First-boot data counts once, and is ignored afterwards (components/machine.py). The provider of libvirt downloads
    # it to compare, which has been seen to stop for ever: go-libvirt waits for its own lock when a stream ends.
    unread = ["--exclude=**::*-first-boot"] if any(host.machine for host in stack.all_hosts.values()) else []
    return project.show("refresh", *(["--yes"] if yes else []), *unread, *excluded(stack, without))


def check(project: Project, without: Sequence[str], as_json: bool, metrics: Path | None) -> int:
    """Compares what is published, served and running with the stack. 0: good, 1: wrong, 2: could not be told."""
    # The other commands do without these: they take a while to load.
    from check import report
    from check.finding import status
    from check.run import Progress
    from check.run import check as look_at

    stack = project.load()
    excluded(stack, without)
    started = time.monotonic()
    told = Console(stderr=True, highlight=False)
    with told.status(f"{project.stack}: asking …") as line:

        def tell(progress: Progress) -> None:
            waiting = ", ".join(sorted(progress.waiting)[:4])
            line.update(f"{project.stack}: {progress.answered} of {progress.asked} done, waiting for {waiting}")

        findings = look_at(stack, without, tell)
    seconds = time.monotonic() - started
    if metrics:
        stackfile.write_atomically(metrics, report.as_metrics(project.stack, findings, seconds))
    if as_json:
        print(report.as_json(project.stack, findings, seconds))
    else:
        console.print(report.table(project.stack, findings, seconds))
    return status(findings)


def trace(project: Project, what: str, since: str, without: Sequence[str]) -> int:
    """Tells what became of the mails of an address, a Message-ID or a queue ID. 0 when any was found."""
    from check import trace as tracing

    stack = project.load()
    excluded(stack, without)
    try:
        found, silent = tracing.trace(stack, what, since or tracing.SINCE, without)
    except tracing.TraceError as error:
        raise OperatorError(str(error)) from None
    within = tracing.inside(stack)
    for story in found:
        for line in tracing.told(story, within):
            console.print(line, markup=False, soft_wrap=True)
        console.print()
    for host, why in silent.items():
        console.print(f"{host} {why}: its part is missing", style="red", markup=False)
    mails = f"{len(found)} mails" if len(found) != 1 else "1 mail"
    console.print(f"{project.stack}: {mails} since {since or tracing.SINCE} ago")
    return 0 if found else 1


def go_to(project: Project, host: str, run: str) -> int:
    """Becomes ssh to a host, with the key that the stack pins."""
    command = ssh.command(project.load(), host, run)
    os.execvp(command[0], command)


def print_known_hosts(project: Project) -> int:
    """Prints the pinned keys of all hosts, for ~/.ssh/known_hosts."""
    for line in ssh.known_hosts(project.load()):
        print(line)
    return 0


def down(project: Project, yes: bool) -> int:
    """Removes all but what is protected, and says how to remove that."""
    # The program has to run: machines are shut down by it before they are deleted.
    status = project.show("destroy", "--run-program", "--exclude-protected", *(["--yes"] if yes else []))
    exported = json.loads(project.run("stack", "export"))
    kept = [r for r in exported["deployment"].get("resources", []) if r.get("protect")]
    if kept:
        table = Table(title="Kept, because it holds data")
        table.add_column("resource")
        table.add_column("to remove it for good, with all that is in it", overflow="fold")
        for resource in kept:
            name = resource["urn"].rpartition("::")[2]
            table.add_row(name, f"make unprotect STACK={project.stack} NAME={name}")
        console.print(table)
        console.print(f"then make down STACK={project.stack} once more")
    return status


def unprotect(project: Project, name: str) -> int:
    """Lets the next ``down`` remove what holds data. Removes nothing itself."""
    resources = (records.state_of(project).get("deployment") or {}).get("resources") or []
    protected = [r["urn"] for r in resources if r.get("protect")]
    chosen = [urn for urn in protected if urn.rpartition("::")[2] == name]
    if not chosen:
        names = ", ".join(urn.rpartition("::")[2] for urn in protected)
        raise OperatorError(f"NAME={name}: nothing protected is called so (protected: {names or 'nothing'})")
    for urn in chosen:
        project.run("state", "unprotect", urn, "--yes")
    console.print(f"{name} is not protected any more: make down STACK={project.stack} removes it for good")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status; expected errors are sentences on standard error."""
    parser = argparse.ArgumentParser(prog="python -m ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("password", help="print the hash of a password")
    for name, words in (
        ("keys", "make the keys that are missing, and replace others step by step"),
        ("update-keys", "print what the name server has to be told about the hosts' keys"),
        ("tsig", "store the secret of a TSIG key"),
        ("render", "write all files of all hosts and zones"),
        ("up", "bring the stack to what its file says"),
        ("preview", "show what would change"),
        ("refresh", "compare the state with what is there"),
        ("check", "compare what is published, served and running with the stack"),
        ("trace", "tell what became of a mail"),
        ("ssh", "go to a host, or run something there"),
        ("known-hosts", "print the SSH keys of all hosts"),
        ("unlock", "clear the lock and the plugins that a killed run left"),
        ("down", "remove all but what is protected"),
        ("unprotect", "let the next down remove what holds data"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("stack")
        command.add_argument("--without", default="", help="sites that are lost, joined by commas")
        command.add_argument("--adopt", default="", help="RRsets to take over, as name/TYPE, joined by commas")
        command.add_argument("--delete", default="", help="zones to delete from, however much it is")
        command.add_argument("--push", default="", help="hosts to push to again, joined by commas")
        command.add_argument("--roll", default="", help="keys: what is to be replaced, joined by commas")
        command.add_argument("--yes", action="store_true", help="do not ask")
        command.add_argument("--out", type=Path, default=Path("out"))
        command.add_argument("--key", default="")
        command.add_argument("--what", default="", help="trace: an address, a Message-ID or a queue ID")
        command.add_argument("--since", default="", help="trace: how long ago to begin, as 3h or 2d")
        command.add_argument("--host", default="", help="ssh: where to go")
        command.add_argument("--run", default="", help="ssh: what to run there, for its shell")
        command.add_argument("--name", default="", help="unprotect: what down named")
        command.add_argument("--json", action="store_true", help="check: everything that was found, for a machine")
        command.add_argument("--metrics", type=Path, help="check: a file for the node exporter of Prometheus")
        command.add_argument("--server", choices=name_server.SERVERS, default=name_server.SERVERS[0])
    options = parser.parse_args(arguments)
    if options.command == "password":
        return print_password_hash()
    project = Project.of(options.stack)
    texts = (options.roll, options.without, options.adopt, options.delete, options.push)
    rolled, *lists = ([word for word in text.split(",") if word] for text in texts)
    said = Words(*lists)
    try:
        for word, takers in TAKEN_BY.items():
            if (value := getattr(options, word)) and options.command not in takers:
                known = ", ".join(f"make {taker}" for taker in takers)
                raise OperatorError(
                    f"{word.upper()}={value}: make {options.command} does not go by it, only {known} do;"
                    " nothing was changed"
                )
        match options.command:
            case "keys":
                return make_keys(project, rolled)
            case "tsig":
                return set_tsig(project, options.key)
            case "update-keys":
                return print_update_keys(project, options.server)
            case "render":
                return render(project, options.out)
            case "up":
                return up(project, said, options.yes)
            case "preview":
                return preview(project, said)
            case "check":
                return check(project, said.without, options.json, options.metrics)
            case "trace":
                return trace(project, options.what, options.since, said.without)
            case "ssh":
                return go_to(project, options.host, options.run)
            case "known-hosts":
                return print_known_hosts(project)
            case "unlock":
                for line in unlock(project):
                    console.print(line)
                return 0
            case "refresh":
                return refresh(project, said.without, options.yes)
            case "unprotect":
                return unprotect(project, options.name)
            case _:
                return down(project, options.yes)
    except (StackError, Conflict, OperatorError, FileExistsError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    except BrokenPipeError:
        # Whoever read along has seen enough; the interpreter is not to write the rest either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
