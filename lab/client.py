"""A mail client: reads over IMAPS, submits on 587. Runs inside the lab's client namespace.

``python -m lab.client`` reads one request as JSON from standard input and prints one answer as JSON, so that
passwords stand in no argument.
"""

from __future__ import annotations

import email
import email.policy
import imaplib
import json
import smtplib
import ssl
import sys
import time
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
        imap.select(request.get("folder", "INBOX"))
        deadline = time.monotonic() + request["seconds"]
        while True:
            found = imap.search(None, "HEADER", "Message-ID", f'"{request["message_id"]}"')[1][0].split()
            if found:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{request['message_id']} is not in the mailbox after {request['seconds']} s")
            time.sleep(POLL_SECONDS)
            imap.noop()
        seen = time.time()
        body = imap.fetch(found[-1].decode(), "(RFC822)")[1][0]
        text = body[1] if isinstance(body, tuple) else b""
        return {"mail": text.decode("utf-8", "replace"), "peer": served_by, "time": seen, "copies": len(found)}


def submit(request: dict[str, Any]) -> dict[str, Any]:
    """Submits a mail with STARTTLS and a password on 587; an answer to another mail when ``original`` is given."""
    message = EmailMessage(policy=email.policy.SMTP)
    message["From"], message["To"] = request["from"], request["to"]
    message["Subject"], message["Date"] = request["subject"], formatdate(localtime=False)
    message["Message-ID"] = make_msgid(domain=request["from"].split("@")[1])
    if "original" in request:
        message["In-Reply-To"] = message["References"] = request["original"]
    message["User-Agent"] = "posthorn-lab-client"
    message.set_content(request["text"])
    with smtplib.SMTP(request["server"], 587, timeout=20) as smtp:
        served_by = smtp.sock.getpeername()[0] if smtp.sock else ""
        smtp.starttls(context=_context(request))
        smtp.login(request["user"], request["password"])
        smtp.send_message(message)
    return {"message_id": message["Message-ID"], "peer": served_by, "time": time.time()}


def main() -> int:
    """Answers one request. Exit status 1 and a sentence where it could not be done."""
    request = json.load(sys.stdin)
    try:
        answer = {"fetch": fetch, "submit": submit}[request["action"]](request)
    except (OSError, smtplib.SMTPException, imaplib.IMAP4.error, TimeoutError) as error:
        print(f"{request['action']} at {request['server']}: {error}", file=sys.stderr)
        return 1
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
