"""Two mailbox hosts with one set of mailboxes: what users find after every mishap."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab import containers, faults
from lab import pair as lab_pair
from lab.mailboxes import PASSWORD, Refused
from lab.pair import HOSTS, PROGRAM, Pair, eventually, ids, mails, pair_of, soak
from services import identity
from sync.sync import FILLING
from tests.lab.conftest import Lab

A, B = HOSTS
SERVICE = "posthorn-sync.service"
STORE = "/var/vmail"
ADDRESS = "198.18.1.13"
"""Of host A, on the backbone."""


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[Pair]:
    with pair_of(lab.state) as both:
        yield both


@contextmanager
def cut(pair: Pair, *, black_hole: bool = False) -> Iterator[None]:
    """The hosts do not reach one another. Each has noticed it when this begins."""
    with lab_pair.cut(pair, black_hole=black_hole):
        eventually(lambda: not any(pair.status(host)["peer"]["up"] for host in HOSTS))
        yield


def once(seen: dict[str, Any], user: str, wanted: list[str]) -> None:
    """Every mail is there, and none of them twice."""
    counted = Counter(mails(seen, user))
    assert {message_id: counted[message_id] for message_id in wanted} == dict.fromkeys(wanted, 1)


def converged(pair: Pair, users: list[str], seconds: float = 15) -> dict[str, Any]:
    """Waits until both hosts show the same, and says how long that took."""
    started = time.monotonic()
    seen = pair.alike(users, seconds)
    print(f"alike after {time.monotonic() - started:.1f} s")
    return seen


# What happens at both sides of a cut


@pytest.fixture(scope="module")
def split(pair: Pair) -> dict[str, Any]:
    """Changes at both sides of a cut, each kind with two users, one whose initiator is either host. What came of it."""
    of_a, of_b = pair.initiated_by(A), pair.initiated_by(B)
    kinds = ("equal", "only-a", "only-b", "folder", "rename", "delete", "flag", "move", "script", "inbox")
    users = {kind: (of_a[number], of_b[number]) for number, kind in enumerate(kinds)}
    sent: dict[str, list[str]] = {}
    a, b = pair.a, pair.b
    for user in (*users["rename"], *users["delete"]):
        a.ask("imap", user=user, steps=[["create", "Project"], ["create", "Shed"]])
        a.ask("deliver", user=user, ids=(note := ids(1)))
        a.ask("change", user=user, id=note[0], what="move", to="Shed")
    for user in users["equal"]:
        for name in ("old", "new"):
            a.ask("shell", command=f"printf 'keep;\\n' | doveadm sieve put -u {user} -a {name}")
    for kind in ("flag", "move"):
        for user in users[kind]:
            sent[user] = ids(2)
            a.ask("deliver", user=user, ids=sent[user])
    for user in users["inbox"]:
        # As if he had never had any mail: no host knows his INBOX.
        pair.both("sh", "-c", f"doveadm kick {user}; rm -rf {STORE}/users/{user}")
    pair.alike([user for kind in kinds if kind != "inbox" for user in users[kind]])
    with cut(pair):
        for host, side in ((a, 0), (b, 1)):
            for kind in ("equal", "inbox"):
                for user in users[kind]:
                    sent.setdefault(user, [])
                    sent[user] += (new := ids(1))
                    host.ask("deliver", user=user, ids=new)
            for user in users[("only-a", "only-b")[side]]:
                sent[user] = ids(2)
                host.ask("deliver", user=user, ids=sent[user])
            for user in users["folder"]:
                host.ask("imap", user=user, steps=[["create", "Garden"]])
                sent.setdefault(user, [])
                sent[user] += (new := ids(1))
                host.ask("deliver", user=user, ids=new)
                host.ask("change", user=user, id=new[0], what="move", to="Garden")
        for user in users["rename"]:
            a.ask("imap", user=user, steps=[["rename", "Project", "Done"]])
            sent[user] = ids(1)
            b.ask("deliver", user=user, ids=sent[user])
            b.ask("change", user=user, id=sent[user][0], what="move", to="Project")
            for host, name in ((a, "Barn"), (b, "Cellar")):
                host.ask("imap", user=user, steps=[["rename", "Shed", name]])
        for user in users["delete"]:
            a.ask("imap", user=user, steps=[["delete", "Project"]])
            for host in (a, b):
                host.ask("imap", user=user, steps=[["delete", "Shed"]])
        for user in users["flag"]:
            a.ask("change", user=user, id=sent[user][0], what="expunge")
            b.ask("change", user=user, id=sent[user][0], what=r"\Flagged")
            b.ask("change", user=user, id=sent[user][1], what="expunge")
            a.ask("change", user=user, id=sent[user][1], what=r"\Flagged")
        for user in users["move"]:
            a.ask("change", user=user, id=sent[user][0], what="move", to="Sent")
            b.ask("change", user=user, id=sent[user][1], what="move", to="Trash")
        for user in users["equal"]:
            a.ask("shell", command=f"doveadm sieve activate -u {user} old && doveadm sieve delete -u {user} new")
        for user in users["script"]:
            put = f"printf 'keep;\\n' | doveadm sieve put -u {user} -a holiday"
            assert pair.run(B, "sh", "-c", put).returncode == 0
    everybody = [user for both in users.values() for user in both]
    return {"users": users, "sent": sent, "seen": converged(pair, everybody)}


@pytest.mark.parametrize("kind", ["equal", "only-a", "only-b", "inbox", "folder", "rename", "move"])
def test_what_came_at_either_side_of_a_cut_is_at_both_once(split: dict[str, Any], kind: str) -> None:
    for user in split["users"][kind]:
        once(split["seen"], user, split["sent"][user])


def test_a_folder_made_at_both_sides_is_one(split: dict[str, Any]) -> None:
    for user in split["users"]["folder"]:
        assert len(split["seen"][user]["Garden"]["mails"]) == 2


def test_a_folder_renamed_at_one_side_takes_along_what_the_other_put_into_it(split: dict[str, Any]) -> None:
    for user in split["users"]["rename"]:
        assert "Project" not in split["seen"][user] and len(split["seen"][user]["Done"]["mails"]) == 1


def test_a_folder_deleted_at_one_side_is_gone(split: dict[str, Any]) -> None:
    for user in split["users"]["delete"]:
        assert "Project" not in split["seen"][user]


def test_a_folder_renamed_at_both_sides_has_one_name_and_all_that_was_in_it(split: dict[str, Any]) -> None:
    for user in split["users"]["rename"]:
        folders = split["seen"][user]
        assert "Shed" not in folders
        assert [len(folders[name]["mails"]) for name in ("Barn", "Cellar") if name in folders] == [1]


def test_a_folder_deleted_at_both_sides_is_gone(split: dict[str, Any]) -> None:
    for user in split["users"]["delete"]:
        assert "Shed" not in split["seen"][user]


def test_a_deletion_wins_over_a_flag(split: dict[str, Any]) -> None:
    for user in split["users"]["flag"]:
        assert not set(mails(split["seen"], user)) & set(split["sent"][user])


def test_a_script_put_at_one_side_is_active_at_the_other(pair: Pair, split: dict[str, Any]) -> None:
    for user in split["users"]["script"]:
        listed = lambda user=user: pair.run(A, "doveadm", "sieve", "list", "-u", user).stdout  # noqa: E731
        eventually(lambda listed=listed: "holiday ACTIVE" in listed())  # type: ignore[misc]


def test_another_script_made_active_and_one_deleted_at_one_side_are_so_at_the_other(
    pair: Pair, split: dict[str, Any]
) -> None:
    for user in split["users"]["equal"]:
        listed = lambda user=user: pair.run(B, "doveadm", "sieve", "list", "-u", user).stdout  # noqa: E731
        eventually(lambda listed=listed: listed().split() == ["old", "ACTIVE"])  # type: ignore[misc]


# Everyday life


def test_a_mail_is_at_the_other_host_in_a_moment(pair: Pair) -> None:
    for user in (*pair.initiated_by(A)[:2], *pair.initiated_by(B)[:2]):
        pair.alike([user])
        pair.b.start("arrivals", bases=pair.b.ask("numbers", users=[user]), count=1, seconds=5)
        taken = pair.a.ask("deliver", user=user, ids=ids(1))
        print(f"{user}: {pair.b.finish()[user][0] - taken[0]:.3f} s")


def test_what_a_user_does_at_one_host_is_soon_done_at_the_other(pair: Pair) -> None:
    for user in (pair.initiated_by(A)[0], pair.initiated_by(B)[0]):
        sent = ids(3)
        pair.a.ask("deliver", user=user, ids=sent)
        pair.alike([user])
        pair.b.ask("change", user=user, id=sent[0], what=r"\Answered")
        pair.b.ask("change", user=user, id=sent[1], what="move", to="Trash")
        pair.b.ask("change", user=user, id=sent[2], what="expunge")
        # To read a mail marks it as seen.
        read = [["select", "Trash"], ["fetch", "1", "(BODY[TEXT])"], ["create", "Garden"], ["subscribe", "Garden"]]
        pair.b.ask("imap", user=user, steps=read)
        seen = converged(pair, [user], 5)
        ((_, subscribed),) = pair.a.ask("imap", user=user, steps=[["lsub"]])
        assert any("Garden" in line for line in subscribed)
        assert [flags for _, found, flags in seen[user]["INBOX"]["mails"] if found == sent[0]] == [[r"\Answered"]]
        assert [flags for _, found, flags in seen[user]["Trash"]["mails"] if found == sent[1]] == [[r"\Seen"]]
        assert sent[2] not in mails(seen, user)


def test_whatever_happens_to_a_user_one_host_syncs_it(pair: Pair) -> None:
    user = pair.initiated_by(A)[1]
    pair.alike([user])
    eventually(pair.quiet)
    before = pair.status(B)["syncs"]["done"]
    for host in (pair.a, pair.b):
        host.ask("deliver", user=user, ids=(sent := ids(1)))
        host.ask("change", user=user, id=sent[0], what=r"\Flagged")
    converged(pair, [user], 5)
    eventually(pair.quiet)
    assert pair.status(B)["syncs"]["done"] == before


def test_a_user_whom_one_host_does_not_know_yet_is_told_and_comes_when_it_does(pair: Pair) -> None:
    user = "pairnew"
    line = f"echo '{user}:{{PLAIN}}{PASSWORD}::::::' | tee -a {' '.join(lab_pair.FILES)}"
    try:
        pair.run(A, "sh", "-c", line)
        eventually(lambda: pair.run(A, "doveadm", "user", user).returncode == 0)
        pair.a.ask("deliver", user=user, ids=(sent := ids(1)))
        # It is the host that syncs him which says so, whichever of the two knows him.
        eventually(lambda: not all(pair.status(host)["ok"] for host in HOSTS))
        assert "not known at maildrop.elm" in "".join(pair.run(host, PROGRAM, "status").stdout for host in HOSTS)
        pair.run(B, "sh", "-c", line)
        eventually(lambda: pair.run(B, "doveadm", "user", user).returncode == 0)
        # The first look at each host makes Drafts and the like there, and nothing tells of that.
        pair.look([user])
        pair.both(PROGRAM, "now", user)
        once(converged(pair, [user]), user, sent)
    finally:
        for host in HOSTS:
            for file in lab_pair.FILES:
                pair.run(host, "sh", "-c", f"grep -v '^{user}:' {file} > /tmp/users; cat /tmp/users > {file}")
            pair.run(host, "rm", "-rf", f"{STORE}/users/{user}")
        eventually(lambda: all(done.returncode for done in pair.both("doveadm", "user", user)))
        pair.both(PROGRAM, "now", user)
    eventually(pair.quiet)


def test_folders_keep_their_names_and_mails_whatever_signs_are_in_them(pair: Pair) -> None:
    names = ("100%", "a%20b", "tax 25%25", "lists/old", "lists%2fold", "x^7fy", "2^", "R&-D", "&AH8-7f")
    for user in (pair.initiated_by(A)[0], pair.initiated_by(B)[0]):
        pair.alike([user])
        sent = dict(zip(names, ids(len(names)), strict=True))
        pair.a.ask("imap", user=user, steps=[["create", f'"{name}"'] for name in names])
        pair.a.ask("deliver", user=user, ids=list(sent.values()))
        for name, message_id in sent.items():
            pair.a.ask("change", user=user, id=message_id, what="move", to=f'"{name}"')
        pair.alike([user])
        # The second sync is the one that finds other names than it left. One change at a time: what is deleted while a
        # sync runs may come back, whatever it is called (docs/replication.md).
        for step in (["rename", '"100%"', '"60% off"'], ["delete", '"tax 25%25"']):
            eventually(pair.quiet)
            pair.b.ask("imap", user=user, steps=[step])
            seen = converged(pair, [user], 5)[user]
        del sent["tax 25%25"]
        sent["60% off"] = sent.pop("100%")
        made = {name: [mail[1] for mail in folder["mails"]] for name, folder in seen.items() if name in {*sent, *names}}
        assert made == {name: [message_id] for name, message_id in sent.items()}
    eventually(pair.quiet)


def test_clients_that_only_look_cause_no_sync(pair: Pair) -> None:
    user = pair.initiated_by(A)[0]
    eventually(pair.quiet)
    before = pair.status(A)["syncs"]
    look = [
        ["select", "INBOX"],
        ["noop"],
        ["fetch", "1:*", "(UID FLAGS BODY.PEEK[])"],
        ["status", "Trash", "(MESSAGES)"],
    ]
    for _ in range(20):
        pair.a.ask("imap", user=user, steps=look)
    assert pair.status(A)["syncs"] == before


def test_both_hosts_may_sync_the_same_user_at_once(pair: Pair) -> None:
    users = pair.initiated_by(A)[:2]
    sent = {user: ids(6) for user in users}
    for round_ in range(3):
        for user in users:
            pair.a.ask("deliver", user=user, ids=sent[user][2 * round_ : 2 * round_ + 1])
            pair.b.ask("deliver", user=user, ids=sent[user][2 * round_ + 1 : 2 * round_ + 2])
        command = " & ".join(f"doveadm sync -u {user} -l 10 -T 15 -f tcp:127.0.0.1:12346" for user in users)
        here, there = (pair.open(host) for host in HOSTS)
        for side in (here, there):
            side.start("shell", command=f"{command}; wait")
        assert not here.finish() and not there.finish()
        here.close()
        there.close()
    seen = converged(pair, users)
    for user in users:
        once(seen, user, sent[user])


# Mishaps in a burst


def burst(pair: Pair, mishap: Callable[[], object], seconds: float = 20) -> None:
    """Mails for four users at one host, a mishap in the middle of it: all are at both hosts afterwards, once."""
    users = [*pair.initiated_by(A)[2:4], *pair.initiated_by(B)[2:4]]
    sent = {user: ids(20) for user in users}
    writer = pair.open(A)
    for half in (slice(0, 10), slice(10, 20)):
        for user in users:
            writer.start("deliver", user=user, ids=sent[user][half], pause=0.01)
        if half.start:
            mishap()
        for _ in users:
            writer.finish()
    writer.close()
    seen = converged(pair, users, seconds)
    for user in users:
        once(seen, user, sent[user])


@pytest.mark.parametrize("host", HOSTS)
def test_a_service_killed_in_a_burst_loses_nothing(pair: Pair, host: str) -> None:
    burst(pair, lambda: pair.run(host, "systemctl", "kill", "-s", "KILL", SERVICE))


def test_dovecot_killed_in_a_burst_loses_nothing(pair: Pair) -> None:
    burst(pair, lambda: pair.run(B, "systemctl", "kill", "-s", "KILL", "dovecot"))


def test_syncs_killed_in_a_burst_lose_nothing(pair: Pair) -> None:
    def kill() -> None:
        for _ in range(5):
            pair.a.ask("kill", names=["doveadm"])
            pair.b.ask("kill", names=["doveadm", "doveadm-server"])

    burst(pair, kill)


def test_a_black_hole_in_a_burst_loses_nothing(pair: Pair) -> None:
    def hole() -> None:
        with cut(pair, black_hole=True):
            pass

    burst(pair, hole)


def test_a_host_that_loses_its_power_without_a_word_holds_up_nobody_when_it_is_back(pair: Pair) -> None:
    def lose_power() -> None:
        # Its last words are swallowed: the other host's connections stay open, with nobody at their ends.
        with lab_pair.cut(pair, black_hole=True):
            containers.kill(B)
            eventually(lambda: containers.leader(pair.state, B) is None)
        faults.heal(pair.state, "host", B)
        containers.wait_for_ssh(pair.state, {B: "198.18.2.13"})
        pair.b = pair.open(B)

    burst(pair, lose_power, 60)
    eventually(pair.quiet)


def test_with_one_service_dead_the_other_works_for_all(pair: Pair) -> None:
    user = pair.initiated_by(B)[4]
    pair.run(B, "systemctl", "stop", SERVICE)
    try:
        sent = ids(2)
        pair.a.ask("deliver", user=user, ids=sent[:1])
        seen = converged(pair, [user])
        assert sent[0] in mails(seen, user) and pair.status(A)["peer"]["taken_over"]
        pair.a.ask("deliver", user=user, ids=sent[1:])
        once(converged(pair, [user], 5), user, sent)
    finally:
        pair.run(B, "systemctl", "start", SERVICE)
    eventually(pair.quiet)


def test_changes_made_while_dovecot_is_down_at_the_other_host_come_when_it_is_back(pair: Pair) -> None:
    users = [pair.initiated_by(A)[5], pair.initiated_by(B)[5]]
    sent = {user: ids(2) for user in users}
    pair.run(B, "systemctl", "stop", "dovecot")
    try:
        for user in users:
            pair.a.ask("deliver", user=user, ids=sent[user])
        eventually(lambda: pair.status(A)["pending"]["users"])
    finally:
        pair.run(B, "systemctl", "start", "dovecot")
    seen = converged(pair, users)
    for user in users:
        once(seen, user, sent[user])


# The disk


def refuses(pair: Pair, word: str) -> None:
    """B takes no mail, shows none, and nothing is copied: and both hosts say why."""
    eventually(lambda: word in (pair.status(B).get("refused") or ""))
    eventually(lambda: word in (pair.status(A)["refused"] or ""))
    with pytest.raises(Refused):
        pair.b.ask("deliver", user=pair.users[0], ids=ids(1))


def stays(pair: Pair, before: dict[str, Any]) -> None:
    """Nothing is deleted at A, whatever B is asked to do."""
    pair.run(B, PROGRAM, "now")
    pair.run(A, PROGRAM, "now")
    pair.a.start("look", users=list(before))
    assert pair.a.finish() == before


def test_a_lost_disk_deletes_nothing_and_is_filled_again_when_the_operator_says_so(pair: Pair) -> None:
    before = pair.alike()
    pair.run(B, "sh", "-c", f"rm -rf {STORE}/*")
    try:
        refuses(pair, "empty or lost")
        assert pair.run(B, "systemctl", "restart", "dovecot").returncode
        stays(pair, before)
    finally:
        done = pair.run(B, PROGRAM, "reseed")
    assert done.returncode == 0, done.stdout + done.stderr
    # Whoever looks now finds all that he had, under the same numbers.
    assert pair.look() == (before, before)


def test_a_host_made_anew_with_a_blank_disk_serves_nobody_before_the_operator_s_word(pair: Pair) -> None:
    before = pair.alike()
    pair.run(B, "systemctl", "stop", SERVICE, "dovecot")
    pair.run(B, "sh", "-c", f"rm -rf {STORE}/* /var/lib/posthorn-sync/*")
    try:
        assert pair.run(B, "systemctl", "start", "dovecot", SERVICE).returncode == 0
        refuses(pair, "reseed")
        # What a push to it would say.
        assert "serves no user yet: say posthorn-sync reseed on it" in pair.run(B, "cat", str(FILLING)).stdout
        stays(pair, before)
    finally:
        done = pair.run(B, PROGRAM, "reseed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert pair.look() == (before, before)


def test_a_host_that_is_well_is_not_emptied_by_a_word_said_at_the_wrong_one(pair: Pair) -> None:
    before = pair.alike()
    done = pair.run(A, PROGRAM, "reseed")
    assert done.returncode == 1 and "is well" in done.stdout
    assert pair.look() == (before, before)


def test_a_disk_that_is_not_mounted_takes_no_mail_and_goes_on_when_it_is_back(pair: Pair) -> None:
    before = pair.alike()
    disk = "/srv/mail-disk"
    mount = f"mount --bind {disk} {STORE}"
    prepare = f"systemctl stop dovecot; mkdir -p {disk} && cp -a {STORE}/. {disk}/ && rm -rf {STORE}/* && {mount}"
    assert pair.run(B, "sh", "-c", f"{prepare} && {PROGRAM} reseed --anyway").returncode == 0
    try:
        assert converged(pair, list(pair.users)) == before
        pair.run(B, "umount", "--lazy", STORE)
        refuses(pair, "not mounted")
        assert pair.run(B, "ls", STORE).stdout == ""
        stays(pair, before)
        pair.run(B, "sh", "-c", f"{mount}; systemctl start dovecot")
        pair.a.ask("deliver", user=pair.users[0], ids=(sent := ids(1)))
        once(converged(pair, list(pair.users)), pair.users[0], sent)
    finally:
        back = f"systemctl stop dovecot; umount {STORE}; cp -a {disk}/. {STORE}/ && rm -rf {disk} && {PROGRAM} reseed"
        assert pair.run(B, "sh", "-c", back).returncode == 0
    eventually(pair.quiet)


def test_a_foreign_disk_is_refused(pair: Pair) -> None:
    before = pair.alike()
    marker = f"{STORE}/store.json"
    pair.run(B, "sh", "-c", f'cp {marker} /root/marker; echo \'{{"id": "another"}}\' > {marker}')
    try:
        eventually(lambda: "foreign" in (pair.status(A)["refused"] or ""))
        assert pair.run(B, "systemctl", "restart", "dovecot").returncode
        stays(pair, before)
    finally:
        pair.run(B, "sh", "-c", f"cat /root/marker > {marker}; systemctl start dovecot")
    assert converged(pair, list(pair.users)) == before


@pytest.mark.parametrize("part", ["mdbox/mailboxes", "mdbox/storage", ""])
def test_a_user_s_part_of_the_disk_that_is_lost_comes_back(pair: Pair, part: str) -> None:
    users = [pair.initiated_by(A)[6], pair.initiated_by(B)[6]]
    sent = {user: ids(3) for user in users}
    for user in users:
        pair.a.ask("deliver", user=user, ids=sent[user])
    pair.alike(users)
    for user in users:
        pair.run(B, "sh", "-c", f"doveadm kick {user}; rm -rf {STORE}/users/{user}/{part}")
    for user in users:
        audit = pair.run(A, PROGRAM, "audit", user)
        assert audit.returncode == 0, audit.stdout + audit.stderr
    seen = converged(pair, users)
    for user in users:
        once(seen, user, sent[user])
        read = pair.run(B, "doveadm", "fetch", "-u", user, "text", "all")
        assert read.returncode == 0 and all(f"before: {message_id}" in read.stdout for message_id in sent[user])


def test_the_room_of_a_deleted_mail_is_given_back_at_both_hosts(pair: Pair) -> None:
    user = pair.users[3]
    gone, kept = ids(2)
    pair.a.ask("deliver", user=user, ids=[gone, kept])
    pair.alike([user])
    pair.a.ask("change", user=user, id=gone, what="expunge")
    before = pair.alike([user])
    for host in HOSTS:
        done = pair.run(host, "systemctl", "start", "posthorn-purge.service")
        assert done.returncode == 0, pair.run(host, "journalctl", "-u", "posthorn-purge", "-n", "20").stdout
        for message_id, found in ((gone, 1), (kept, 0)):
            storage = f"{STORE}/users/{user}/mdbox/storage"
            assert pair.run(host, "grep", "-rqF", f"before: {message_id}", storage).returncode == found
    assert pair.alike([user]) == before
    eventually(pair.quiet)


def test_no_two_mails_share_a_file_that_one_reads_while_another_writes(pair: Pair) -> None:
    user = pair.users[3]
    pair.a.ask("deliver", user=user, ids=ids(3))
    pair.b.ask("deliver", user=user, ids=ids(3))
    pair.alike([user])
    for host in HOSTS:
        search = f"grep -c 'Words that nobody wrote before' {STORE}/users/{user}/mdbox/storage/m.*"
        found = pair.run(host, "sh", "-c", search).stdout.split()
        assert len(found) >= 6 and all(line.endswith(":1") for line in found), found


# All at once


def test_writers_at_both_hosts_end_with_the_same_mailboxes(pair: Pair) -> None:
    users = [*pair.initiated_by(A)[7:10], *pair.initiated_by(B)[7:10]]
    soaked = soak(pair, users, 60)
    print(soaked)
    assert not soaked.lost and not soaked.came_back and not soaked.doubled


# The tunnel


@pytest.mark.parametrize(
    ("port", "hello"), [(12345, r"VERSION\tdoveadm-server\t1\t2\n"), (12348, r"GET /metrics HTTP/1.1\r\n\r\n")]
)
def test_the_tunnel_takes_nobody_but_the_peer(pair: Pair, port: int, hello: str) -> None:
    for part, path in (("crt", identity.CERTIFICATE), ("key", identity.KEY)):
        text = pair.run("smtp-in-oak", "cat", path).stdout
        pair.state.run_in(B, ["sh", "-c", f"umask 077; cat > /root/other.{part}"], input=text, text=True, check=True)
    own = (f"-cert {identity.CERTIFICATE} -key {identity.KEY}", True)
    others = ("-cert /root/other.crt -key /root/other.key", False)
    nobody = ("", False)
    try:
        for words, welcome in (own, others, nobody):
            # Whoever is not welcome is told so after the handshake, and nothing that he says is read.
            client = f"openssl s_client -quiet -connect {ADDRESS}:{port} -CAfile {identity.AUTHORITY} {words}"
            said = pair.run(B, "sh", "-c", f"printf '{hello}' | timeout 3 {client} 2>/dev/null").stdout
            assert bool(said) == welcome, said
    finally:
        pair.run(B, "sh", "-c", "rm -f /root/other.*")


def test_the_services_have_complained_of_nothing_at_the_end(pair: Pair) -> None:
    eventually(pair.quiet)
    for host in HOSTS:
        state = pair.status(host)
        assert state["ok"], state
        metrics = pair.run(host, "python3", "-c", METRICS).stdout
        assert "posthorn_sync_ok 1" in metrics and "posthorn_sync_lag_seconds_count" in metrics


METRICS = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:12350/metrics').read().decode())"
