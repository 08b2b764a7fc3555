"""What `make trace` says of mails that came, that were refused, and that wait."""

from __future__ import annotations

import secrets
import subprocess

from lab import foreign
from tests.lab.conftest import Lab
from tests.lab.steps import MX, eventually, id_of, log, mail, stopped, submission, talk, tried_again

GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"


def trace(lab: Lab, what: str, *more: str) -> subprocess.CompletedProcess[str]:
    return lab.ops("trace", lab.stack_name, f"--what={what}", *more)


def told(lab: Lab, what: str, *words: str) -> list[str]:
    """The story of one mail, once it has an end with all these words: it is on its way for a moment."""

    def story() -> list[str]:
        done = trace(lab, what)
        ends = [line for line in done.stdout.splitlines() if "→" in line and all(word in line for word in words)]
        return done.stdout.splitlines() if done.returncode == 0 and ends else []

    return list(eventually(story))


def test_a_mail_that_was_delivered_is_followed_to_its_mailbox(lab: Lab) -> None:
    message_id = foreign.send(lab.state, sender="bob@far.example", to="postmaster@hill.example", subject="A word")
    lines = told(lab, message_id, "delivered to mailbox INBOX of ann at maildrop-")
    assert lines[0].startswith(message_id) and "from bob@far.example" in lines[0]
    hosts = [line.split()[2] for line in lines if line.startswith("  ") and "→" not in line]
    assert hosts[0].startswith("smtp-in-") and {host.partition("-")[0] for host in hosts} >= {"frontend", "maildrop"}
    assert any("rspamd: no action" in line for line in lines)
    assert message_id in trace(lab, "POSTMASTER@hill.example", "--since", "10m").stdout
    queue_id = lines[1].partition("postfix/smtpd: ")[2].partition(":")[0]
    assert message_id in trace(lab, queue_id).stdout


def test_a_mail_that_was_put_off_is_told_with_what_the_scanner_found(lab: Lab) -> None:
    # A stranger writes as somebody whom no scanner knows: SPF and DMARC fail, and it is to come again.
    sender = f"{secrets.token_hex(6)}@far.example"
    text = mail(sender=sender, to="ben@hill.example")
    sent = {"from": sender, "recipients": ["ben@hill.example"], "data": text}
    assert talk(lab, server=MX["elm"], **sent)["end"][0] == 451
    lines = told(lab, id_of(text), "put off by smtp-in-elm for ben@hill.example", "4.7.1 Try again later")
    assert any("rspamd: soft reject" in line and "R_SPF_FAIL" in line for line in lines), lines


def test_a_mail_that_was_refused_is_told_with_the_reason(lab: Lab) -> None:
    sent = {"from": "bob@far.example", "recipients": ["nobody.at.all@hill.example"]}
    assert talk(lab, server=MX["ash"], **sent)["rcpt"][0] == 550
    told(lab, "nobody.at.all@hill.example", "refused by smtp-in-ash", "550 5.1.1", "User unknown")


def test_spam_that_was_refused_is_told_with_the_scanner_s_word(lab: Lab) -> None:
    text = mail(body=GTUBE)
    sent = {"from": "bob@far.example", "recipients": ["ann@hill.example"], "data": text}
    assert talk(lab, **sent)["end"][0] == 554
    lines = told(lab, id_of(text), "refused by smtp-in-oak for ann@hill.example", "Gtube pattern")
    assert any("rspamd: reject, 15.00/15.00" in line for line in lines), lines


def test_a_mail_that_waits_is_told_with_its_queue_and_then_with_its_end(lab: Lab) -> None:
    text = mail(sender="ann@hill.example", to="bob@far.example")
    sent = {"from": "ann@hill.example", "recipients": ["bob@far.example"], "data": text}
    with stopped(lab, "postfix@-", "foreign"):
        assert submission(lab, user="ann", **sent)["end"][0] == 250
        told(lab, id_of(text), "waits in the queue of smtp-out-", "for bob@far.example", "refused")
    pattern = "to=<bob@far.example>.*status=sent"
    tried_again(lab, [f"smtp-out-{site}" for site in MX], lambda: log(lab, "smtp-out-oak", pattern))
    told(lab, id_of(text), "handed over for bob@far.example to mx.far.example")


def test_what_a_host_writes_itself_is_followed_through_smtp_out(lab: Lab) -> None:
    to = "bob+trace@far.example"
    done = lab.run("frontend-elm", "sendmail", "-i", to, text=f"To: {to}\nSubject: Cron\n\nDone.\n")
    assert done.returncode == 0, done.stderr
    lines = told(lab, to, "handed over for", "mx.far.example")
    hosts = {line.split()[2] for line in lines if line.startswith("  ") and "→" not in line}
    assert "frontend-elm" in hosts and any(host.startswith("smtp-out-") for host in hosts), lines


def test_what_is_not_known_is_said_so(lab: Lab) -> None:
    done = trace(lab, "nothing.of.this@far.example")
    assert done.returncode == 1 and "0 mails since 2d ago" in done.stdout
    done = trace(lab, "x; reboot")
    assert done.returncode == 1 and "WHAT: say an address" in done.stdout and "Traceback" not in done.stdout


def test_an_operator_goes_to_a_host_with_its_pinned_key(lab: Lab) -> None:
    done = lab.ops("ssh", lab.stack_name, "--host", "smtp-in-ash", "--run=hostname; echo 'a  b'")
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == ["smtp-in-ash", "a  b"], done.stdout
    # Another host in its place is not gone to.
    file = lab.stack_file.read_text()
    try:
        lab.change(lambda c: c["hosts"]["smtp-in-ash"].update(existing=c["hosts"]["smtp-in-elm"]["existing"]))
        done = lab.ops("ssh", lab.stack_name, "--host", "smtp-in-ash", "--run=hostname")
    finally:
        lab.stack_file.write_text(file)
    assert done.returncode == 255 and "Host key verification failed" in done.stdout, done.stdout
