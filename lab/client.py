"""A mail client: reads over IMAPS, submits on 587 or 465. Runs inside the lab's client namespace.

``python -m lab.client`` reads one request as JSON from standard input and prints one answer as JSON, so that
passwords stand in no argument.
"""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import http.client
import imaplib
import json
import smtplib
import socket
import ssl
import sys
import time
from collections.abc import Callable
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any

POLL_SECONDS = 0.1


def _context(request: dict[str, Any]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=request["authority"])


def fetch(request: dict[str, Any]) -> dict[str, Any]:
    """Waits until a mail with a Message-ID is in a folder, and returns it with the front end that served it.

    Raises `TimeoutError` when it does not come within ``seconds``.
    """
    with imaplib.IMAP4_SSL(request["server"], 993, ssl_context=_context(request), timeout=20) as imap:
        served_by = imap.sock.getpeername()[0]
        imap.login(request["user"], request["password"])
        deadline = time.monotonic() + request["seconds"]
        while True:
            # The folder may come into being with the mail.
            found: list[bytes] = []
            if imap.select(request.get("folder", "INBOX"))[0] == "OK":
                found = imap.search(None, "HEADER", "Message-ID", f'"{request["message_id"]}"')[1][0].split()
            if found:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{request['message_id']} is not in the mailbox after {request['seconds']} s")
            time.sleep(POLL_SECONDS)
        seen = time.time()
        body = imap.fetch(found[-1].decode(), "(RFC822)")[1][0]
        text = body[1] if isinstance(body, tuple) else b""
        return {"mail": text.decode("utf-8", "replace"), "peer": served_by, "time": seen, "copies": len(found)}


def move(request: dict[str, Any]) -> dict[str, Any]:
    """Moves a mail from one folder to another (RFC 6851), once it is there, and says how long the move itself took.

    Where ``command`` is COPY, it is in both afterwards.
    """
    fetch(request)
    with imaplib.IMAP4_SSL(request["server"], 993, ssl_context=_context(request), timeout=60) as imap:
        imap.login(request["user"], request["password"])
        imap.select(request.get("folder", "INBOX"))
        (numbers,) = imap.uid("SEARCH", "HEADER", "Message-ID", f'"{request["message_id"]}"')[1]
        started = time.monotonic()
        status, _ = imap.uid(request.get("command", "MOVE"), numbers.split()[-1].decode(), request["to"])
        return {"moved": status == "OK", "seconds": time.monotonic() - started}


def look(request: dict[str, Any]) -> dict[str, Any]:
    """What a mail program learns after its login: folders with their uses (RFC 6154), and the quota (RFC 9208)."""
    with imaplib.IMAP4_SSL(request["server"], 993, ssl_context=_context(request), timeout=20) as imap:
        imap.login(request["user"], request["password"])
        folders = [line.decode() for line in imap.list()[1] if isinstance(line, bytes)]
        quota = [line.decode() for lines in imap.getquotaroot("INBOX")[1] for line in lines if isinstance(line, bytes)]
        return {"folders": folders, "quota": quota}


def submit(request: dict[str, Any]) -> dict[str, Any]:
    """Submits a mail with TLS and a password, on 587 unless ``port`` is 465; ``original`` is what it answers."""
    message = EmailMessage(policy=email.policy.SMTP)
    message["From"], message["To"] = request["from"], request["to"]
    message["Subject"], message["Date"] = request["subject"], formatdate(localtime=False)
    message["Message-ID"] = make_msgid(domain=request["from"].split("@")[1])
    if "original" in request:
        message["In-Reply-To"] = message["References"] = request["original"]
    message["User-Agent"] = "posthorn-lab-client"
    message.set_content(request["text"])
    port, context = request.get("port", 587), _context(request)
    implicit = port == 465
    where: dict[str, Any] = {"host": request["server"], "port": port, "timeout": 20}
    with smtplib.SMTP_SSL(context=context, **where) if implicit else smtplib.SMTP(**where) as smtp:
        served_by = smtp.sock.getpeername()[0] if smtp.sock else ""
        if not implicit:
            smtp.starttls(context=context)
        smtp.login(request["user"], request["password"])
        smtp.send_message(message)
    return {"message_id": message["Message-ID"], "peer": served_by, "time": time.time()}


def talk(request: dict[str, Any]) -> dict[str, Any]:
    """One SMTP session, with every reply: for senders with good and with bad manners.

    ``source`` is the address to come from, ``tls`` one of none, starttls and implicit; ``recipients`` may be many, and
    with ``data`` (the mail as it is, lines ended as given) it is sent.
    """
    tls = request.get("tls", "none")
    source = (request["source"], 0) if "source" in request else None
    helo = request.get("helo", "client.far.example")
    options: dict[str, Any] = {"timeout": request.get("seconds", 60), "source_address": source, "local_hostname": helo}
    replies: list[list[Any]] = []

    def note(what: str, reply: tuple[int, bytes]) -> int:
        replies.append([what, reply[0], reply[1].decode(errors="replace")])
        return reply[0]

    context = _context(request)
    smtp = smtplib.SMTP_SSL(context=context, **options) if tls == "implicit" else smtplib.SMTP(**options)
    # The name that the certificate has to hold, where the server is asked for by its address.
    smtp._host = request.get("name", request["server"])  # type: ignore[attr-defined]
    try:
        _session(smtp, request, note)
    except smtplib.SMTPResponseException as refused:
        note("refused", (refused.smtp_code, _bytes(refused.smtp_error)))
    except smtplib.SMTPServerDisconnected:
        note("closed", (421, b"the server closed the connection"))
    finally:
        smtp.close()
    return {"replies": replies}


def _bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _session(smtp: smtplib.SMTP, request: dict[str, Any], note: Callable[[str, tuple[int, bytes]], int]) -> None:
    if note("connect", smtp.connect(request["server"], request.get("port", 25))) == 220:
        note("ehlo", smtp.ehlo())
        if request.get("tls") == "starttls":
            note("starttls", smtp.starttls(context=_context(request)))
            note("ehlo", smtp.ehlo())
        if "user" in request:
            plain = f"\0{request['user']}\0{request['password']}".encode()
            note("auth", smtp.docmd("AUTH", "PLAIN " + base64.b64encode(plain).decode()))
        if "from" in request:
            note("mail", smtp.docmd("MAIL", f"FROM:<{request['from']}>"))
            taken = [note("rcpt", smtp.docmd("RCPT", f"TO:<{to}>")) for to in request.get("recipients", [])]
            if "data" in request and any(code == 250 for code in taken):
                note("data", smtp.docmd("DATA"))
                smtp.send(request["data"].encode())
                note("end", smtp.getreply())
        smtp.docmd("QUIT")


def raw(request: dict[str, Any]) -> dict[str, Any]:
    """A session written byte by byte, for senders that do not keep to the rules.

    Each of ``sends`` goes out when the server has answered the one before; with ``early`` the first does not wait for
    the greeting. Returns all that the server said, reply by reply, up to its end of the connection.
    """
    source = (request["source"], 0) if "source" in request else None
    plain = socket.create_connection((request["server"], request.get("port", 25)), 20, source_address=source)
    name, context = request.get("name", request["server"]), _context(request)
    connection = context.wrap_socket(plain, server_hostname=name) if request.get("tls") == "implicit" else plain
    stream, replies = connection.makefile("rb"), []

    def reply() -> bool:
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            line = stream.readline()
            if not line:
                return False
            lines.append(line.decode(errors="replace").rstrip())
        replies.append("\n".join(lines))
        return True

    with contextlib.closing(connection):
        if not request.get("early"):
            reply()
        for text in request["sends"]:
            connection.sendall(text.encode("latin-1"))
            reply()
            if text == "STARTTLS\r\n":
                connection = context.wrap_socket(plain, server_hostname=name)
                stream = connection.makefile("rb")
        while reply():
            pass
    return {"replies": replies}


def deliver(request: dict[str, Any]) -> dict[str, Any]:
    """Many mails as they are, each in a session of its own, with all replies to each: for senders of strange mail.

    Texts hold bytes (as Latin-1). A mail is its ``mail`` and ``rcpt`` commands without their ends, and its ``data``.
    """
    greeting = ["EHLO mx.far.example"]
    if "user" in request:
        plain = f"\0{request['user']}\0{request['password']}".encode()
        greeting.append("AUTH PLAIN " + base64.b64encode(plain).decode())
    told = []
    for wanted in request["mails"]:
        source = (request["source"], 0)
        connection = socket.create_connection((request["server"], request["port"]), 60, source_address=source)
        if request.get("tls") == "implicit":
            connection = _context(request).wrap_socket(connection, server_hostname=request["server"])
        with connection, connection.makefile("rb") as stream:

            def said(text: str, connection: socket.socket = connection, stream: Any = stream) -> str:
                connection.sendall(text.encode("latin-1"))
                lines = [stream.readline().decode(errors="replace")]
                while lines[-1][3:4] == "-":
                    lines.append(stream.readline().decode(errors="replace"))
                return "".join(lines).strip()

            said("")
            replies = [said(f"{line}\r\n") for line in (*greeting, wanted["mail"], *wanted["rcpt"], "DATA")]
            if replies[-1].startswith("354"):
                replies.append(said(wanted["data"] + ".\r\n"))
            told.append(replies[len(greeting) :])
            said("QUIT\r\n")
    return {"replies": told}


def everything(request: dict[str, Any]) -> dict[str, Any]:
    """Every mail of every folder that has a header, as it is (as Latin-1): folder and text."""
    found = []
    with imaplib.IMAP4_SSL(request["server"], 993, ssl_context=_context(request), timeout=60) as imap:
        imap.login(request["user"], request["password"])
        folders = [line.decode().rpartition(' "/" ')[2] for line in imap.list()[1] if isinstance(line, bytes)]
        for folder in folders:
            if imap.select(folder, readonly=True)[0] != "OK":
                continue
            numbers = imap.search(None, "HEADER", request["header"], f'"{request["value"]}"')[1][0].split()
            if numbers:
                parts = imap.fetch(b",".join(numbers).decode(), "(BODY.PEEK[])")[1]
                found += [[folder, part[1].decode("latin-1")] for part in parts if isinstance(part, tuple)]
    return {"mails": found}


def sieve(request: dict[str, Any]) -> dict[str, Any]:
    """Puts and activates a Sieve script over ManageSieve (RFC 5804), with STARTTLS and a password."""
    said: list[str] = []

    def until_done(stream: Any) -> bool:
        lines: list[str] = []
        while not lines or (lines[-1] and not lines[-1].startswith(("OK", "NO", "BYE"))):
            lines.append(stream.readline().decode().rstrip())
        said.append(" ".join(lines))
        return lines[-1].startswith("OK")

    with socket.create_connection((request["server"], 4190), timeout=20) as plain:
        stream = plain.makefile("rwb")
        if not until_done(stream):
            return {"said": said}
        stream.write(b"STARTTLS\r\n")
        stream.flush()
        until_done(stream)
        with _context(request).wrap_socket(plain, server_hostname=request["server"]) as secure:
            stream = secure.makefile("rwb")
            until_done(stream)
            login = base64.b64encode(f"\0{request['user']}\0{request['password']}".encode()).decode()
            script = request["script"].encode()
            for command in (
                f'AUTHENTICATE "PLAIN" "{login}"\r\n'.encode(),
                f'PUTSCRIPT "{request["name"]}" {{{len(script)}+}}\r\n'.encode() + script + b"\r\n",
                f'SETACTIVE "{request["name"]}"\r\n'.encode(),
            ):
                stream.write(command)
                stream.flush()
                if not until_done(stream):
                    break
    return {"said": said}


def web(request: dict[str, Any]) -> dict[str, Any]:
    """Gets a document over HTTPS, or posts ``body`` to it, and returns status, headers and text.

    Redirections are not followed. With ``tls`` false it asks in clear; ``address`` and ``source`` choose where to go
    and where to come from. ``protocol`` is what both ends would rather speak (RFC 7301).
    """
    tls, source = request.get("tls", True), (request["source"], 0) if "source" in request else None
    where = (request.get("address", request["server"]), 443 if tls else 80)
    connection, protocol = http.client.HTTPConnection(request["server"], timeout=20), ""
    connection.sock = socket.create_connection(where, 20, source)
    try:
        if tls:
            connection.sock = _context(request).wrap_socket(connection.sock, server_hostname=request["server"])
            protocol = _protocol(request, where, source)
        method = "POST" if "body" in request else "GET"
        connection.request(method, request.get("path", "/"), request.get("body"), {"Content-Type": "text/xml"})
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    finally:
        connection.close()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return {"status": answer.status, "headers": headers, "text": text, "protocol": protocol}


def _protocol(request: dict[str, Any], where: tuple[str, int], source: tuple[str, int] | None) -> str:
    context = _context(request)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(where, 20, source) as plain,
        context.wrap_socket(plain, server_hostname=request["server"]) as secure,
    ):
        return secure.selected_alpn_protocol() or ""


def main() -> int:
    """Answers one request. Exit status 1 and a sentence where it could not be done."""
    request = json.load(sys.stdin)
    try:
        answer = ACTIONS[request["action"]](request)
    except (OSError, smtplib.SMTPException, imaplib.IMAP4.error, http.client.HTTPException) as error:
        print(f"{request['action']} at {request['server']}: {error}", file=sys.stderr)
        return 1
    json.dump(answer, sys.stdout)
    return 0


ACTIONS = {
    "fetch": fetch,
    "look": look,
    "move": move,
    "submit": submit,
    "talk": talk,
    "raw": raw,
    "deliver": deliver,
    "everything": everything,
    "sieve": sieve,
    "web": web,
}

if __name__ == "__main__":
    sys.exit(main())
