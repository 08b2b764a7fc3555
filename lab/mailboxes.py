"""A reader and a writer of mailboxes on one mailbox host: real mail by LMTP, real changes over IMAPS.

Runs on the host, with Python's standard library alone: reads requests as lines of JSON from standard input and answers
each with one line. `Mailboxes` is its other end, on this side.
"""

from __future__ import annotations

import email
import imaplib
import json
import os
import random
import re
import signal
import smtplib
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PASSWORD, DOMAIN = "lab", "maildrop.net.hill.example"
FOLDERS = ("INBOX", "Work", "Old")
POLL_SECONDS = 0.004
sessions: dict[str, imaplib.IMAP4_SSL] = {}


def mail(message_id: str, user: str, size: int = 0) -> bytes:
    """A small mail that no other equals, or one of about ``size`` bytes."""
    lines = (f"From: <bob@far.example>\nTo: <{user}@hill.example>\nSubject: A word\nMessage-ID: {message_id}\n\n"
             f"Words that nobody wrote before: {message_id}.\n")  # fmt: skip
    lines += f"{'x' * 70}\n" * (size // 72)
    return lines.replace("\n", "\r\n").encode()


def deliver(request: dict[str, Any]) -> list[float]:
    """Delivers one mail per Message-ID by LMTP (RFC 2033), addressed as Postfix does. Returns when each was taken.

    Raises `smtplib.SMTPException` with Dovecot's words when one is not.
    """
    taken = []
    with smtplib.LMTP("/run/dovecot/lmtp") as lmtp:
        for message_id in request["ids"]:
            words = mail(message_id, request["user"], request.get("size", 0))
            lmtp.sendmail("bob@far.example", [f"{request['user']}@{DOMAIN}"], words)
            taken.append(time.time())
            time.sleep(request.get("pause", 0))
    return taken


def put_filter(request: dict[str, Any]) -> None:
    """Gives a user a Sieve script, and activates it (doveadm-sieve(1)). Raises `OSError` with Dovecot's words."""
    command = ["doveadm", "sieve", "put", "-u", request["user"], "-a", "filter"]
    done = subprocess.run(command, input=request["script"], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())


def session(user: str) -> imaplib.IMAP4_SSL:
    """An IMAP session of a user, kept as long as it lives."""
    with suppress(KeyError, OSError, imaplib.IMAP4.error):
        sessions[user].noop()
        return sessions[user]
    # It is this host itself, on loopback; whose certificate it shows to others is tested elsewhere.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sessions[user] = imaplib.IMAP4_SSL("127.0.0.1", 993, ssl_context=context, timeout=30)
    sessions[user].login(user, PASSWORD)
    return sessions[user]


def imap(request: dict[str, Any]) -> list[Any]:
    """IMAP commands one after another, as methods of imaplib: name and arguments. Returns the answers."""
    client = session(request["user"])
    answers = []
    for name, *arguments in request["steps"]:
        status, data = getattr(client, name)(*arguments)
        words = [part.decode(errors="replace") if isinstance(part, bytes) else str(part) for part in data]
        answers.append([status, words])
    return answers


def found(client: imaplib.IMAP4_SSL, folder: str, message_id: str) -> str:
    """The UID of a mail in a folder; empty when it is not there."""
    client.select(folder)
    uids = client.uid("SEARCH", "HEADER", "Message-ID", f'"{message_id}"')[1][0].split()
    return uids[-1].decode() if uids else ""


def change(request: dict[str, Any]) -> bool:
    """Flags, moves or expunges a mail (``what``) that is known by its Message-ID. False when it is not there."""
    client = session(request["user"])
    uid = found(client, request.get("folder", "INBOX"), request["id"])
    if not uid:
        return False
    what = request["what"]
    if what == "move":
        return bool(client.uid("MOVE", uid, request["to"])[0] == "OK")
    if what == "expunge":
        client.uid("STORE", uid, "+FLAGS", r"(\Deleted)")
        return bool(client.uid("EXPUNGE", uid)[0] == "OK")
    return bool(client.uid("STORE", uid, "+FLAGS", f"({what})")[0] == "OK")


def look(request: dict[str, Any]) -> dict[str, Any]:
    """What an IMAP client sees: user to folder to UIDVALIDITY and mails (UID, Message-ID, flags)."""
    return {user: _look(session(user)) for user in request["users"]}


def _look(client: imaplib.IMAP4_SSL) -> dict[str, Any]:
    seen = {}
    for line in client.list()[1]:
        name = re.sub(rb'^\([^)]*\) (?:"[^"]*"|NIL) ', b"", line if isinstance(line, bytes) else b"").decode()
        name = name.strip('"')
        if client.select(f'"{name}"', readonly=True)[0] != "OK":
            continue
        validity = client.response("UIDVALIDITY")[1][0]
        fetched = client.uid("FETCH", "1:*", "(UID FLAGS BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])")[1]
        mails = []
        for part in fetched:
            if isinstance(part, tuple):
                uid = re.search(rb"UID (\d+)", part[0])
                flags = re.search(rb"FLAGS \(([^)]*)\)", part[0])
                header = email.message_from_bytes(part[1])["Message-ID"]
                kept = sorted(
                    flag for flag in (flags.group(1) if flags else b"").decode().split() if flag != r"\Recent"
                )
                mails.append([int(uid.group(1)) if uid else 0, header, kept])
        seen[name] = {"validity": (validity or b"").decode(), "mails": sorted(mails)}
    return seen


def arrivals(request: dict[str, Any]) -> dict[str, list[float]]:
    """Waits until the INBOX of each user has ``count`` mails more than its base, and returns when each was first seen.

    Raises `TimeoutError` when they are not there within ``seconds``.
    """
    bases: dict[str, int] = request["bases"]
    times: dict[str, list[float]] = {user: [] for user in bases}
    deadline = time.monotonic() + request["seconds"]
    while waiting := [user for user in bases if len(times[user]) < request["count"]]:
        for user in waiting:
            times[user] += [time.time()] * (_number(user) - bases[user] - len(times[user]))
        if time.monotonic() > deadline:
            raise TimeoutError(f"mails for {', '.join(waiting)} did not come in {request['seconds']} s")
        time.sleep(POLL_SECONDS)
    return times


def _number(user: str) -> int:
    """How many mails a user's INBOX has."""
    client = session(user)
    if client.state == "SELECTED":
        client.unselect()  # STATUS tells of an open folder what its client was told.
    found = re.search(rb"MESSAGES (\d+)", client.status("INBOX", "(MESSAGES)")[1][0] or b"")
    return int(found.group(1)) if found else 0


def numbers(request: dict[str, Any]) -> dict[str, int]:
    """User to how many mails his INBOX has."""
    return {user: _number(user) for user in request["users"]}


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Does at random what users do, for some seconds. Returns Message-IDs that came and that went, and a count.

    Each of the mails ``may`` (user to Message-IDs) is moved or expunged at most once, all others stay where they are:
    a mail that is moved in the moment in which both hosts agree on its number comes back (docs/replication.md).
    """
    chance = random.Random(request["seed"])
    end = time.monotonic() + request["seconds"]
    came: list[str] = []
    went: list[str] = []
    may: dict[str, list[str]] = request["may"]
    number = 0
    while time.monotonic() < end:
        user, folder = chance.choice(list(may)), chance.choice(FOLDERS)
        number += 1
        message_id = f"<{request['seed']}-{number}@soak.example>"
        client = session(user)
        what = chance.choices(("deliver", "append", "flag", "move", "expunge"), (35, 15, 25, 15, 10))[0]
        if what == "deliver":
            deliver({"user": user, "ids": [message_id]})
            came.append(message_id)
        elif what == "append":
            if client.append(folder, "", "", mail(message_id, user))[0] == "OK":
                came.append(message_id)
        elif what == "flag":
            if client.select(folder)[0] == "OK" and (uids := client.uid("SEARCH", "ALL")[1][0].split()):
                flags = chance.choice((r"(\Seen)", r"(\Flagged)"))
                client.uid("STORE", chance.choice(uids).decode(), chance.choice("+-") + "FLAGS", flags)
        elif may[user]:
            known = may[user].pop()
            if (
                change({"user": user, "id": known, "what": what, "to": chance.choice(FOLDERS[1:])})
                and what == "expunge"
            ):
                went.append(known)
    return {"came": came, "went": went, "actions": number}


def kill(request: dict[str, Any]) -> int:
    """Kills every process of this host that has one of some names (comm of proc(5)). Returns how many."""
    killed = 0
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if comm.read_text().strip() in request["names"]:
                os.kill(int(comm.parent.name), signal.SIGKILL)
                killed += 1
    return killed


def shell(request: dict[str, Any]) -> int:
    """Runs a shell command and returns its exit status."""
    return subprocess.run(["sh", "-c", request["command"]], capture_output=True).returncode


def processor_seconds(request: dict[str, Any]) -> float:
    """CPU seconds that a control group of this host has used, a unit's for instance; none where it does not run."""
    usage = Path("/sys/fs/cgroup", request["group"], "cpu.stat")
    return int(usage.read_text().split()[1]) / 1e6 if usage.exists() else 0.0


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        for last in (False, True):
            try:
                answer = {"answer": globals()[request["action"]](request)}
                break
            except (OSError, smtplib.SMTPException, imaplib.IMAP4.error) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
                sessions.clear()
                # A folder that was made anew under an open session ends it: the client comes again.
                if last or not isinstance(error, imaplib.IMAP4.abort):
                    break
        print(json.dumps(answer), flush=True)


class Refused(Exception):
    """The host did not do what was asked: in its own words."""


def taken(said: dict[str, Any]) -> Any:
    """The answer in what a host said. Raises `Refused` where it is an error."""
    if "error" in said:
        raise Refused(said["error"])
    return said["answer"]


class Mailboxes:
    """Mailboxes of one host, seen from here. Requests to several hosts can be under way at once."""

    def __init__(self, command: list[str]) -> None:
        """``command`` runs another command on the host, and is followed by it."""
        program = Path(__file__).read_text()
        self.process = subprocess.Popen(
            [*command, "python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, action: str, **request: Any) -> None:
        """Sends a request; `finish` waits for its answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"action": action, **request}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the host says: an ``answer`` or an ``error``."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"error": "the host is gone"}
        return said

    def finish(self) -> Any:
        """The answer. Raises `Refused` with the host's words."""
        return taken(self.answer())

    def ask(self, action: str, **request: Any) -> Any:
        self.start(action, **request)
        return self.finish()

    def close(self) -> None:
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait(10)


if __name__ == "__main__":
    serve()
