"""How operators come in, and that nobody else does."""

from __future__ import annotations

from typing import Any

import pytest

from check import look
from model.base import StackError
from model.load import parse
from model.stack import Stack
from services.bundle import bundle

FOLDER = "/etc/ssh/sshd_config.d/"


def test_no_file_of_an_image_says_anything_before_the_stack_s_own(keyed_stack: Stack) -> None:
    for host in keyed_stack.all_hosts.values():
        (own,) = (path for path in bundle(keyed_stack, host)["files"] if path.startswith(FOLDER))
        assert own == min(own, f"{FOLDER}50-cloud-init.conf", f"{FOLDER}10-hardening.conf")


@pytest.mark.parametrize("kind", ["ssh-rsa AAAAB3Nz", "ecdsa-sha2-nistp256 AAAAE2Vj", "AAAAC3Nz"])
def test_a_host_key_that_the_host_will_not_show_is_refused(config: dict[str, Any], kind: str) -> None:
    host = config["hosts"]["smtp-in-oak"]
    del host["machine"]
    host["existing"] = {"host_key": kind}
    with pytest.raises(StackError) as caught:
        parse("lab", "Pulumi.lab.yaml", config)
    (said,) = caught.value.problems
    assert said.path == "hosts.smtp-in-oak.existing.host_key"
    assert said.message.startswith("must be the key of type ssh-ed25519: /etc/ssh/ssh_host_ed25519_key.pub")


def test_the_check_asks_sshd_for_what_counts_for_its_own_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(*command: str) -> str:
        asked.append(" ".join(command))
        return "port 22\npasswordauthentication yes\nkbdinteractiveauthentication no\nprintmotd\n"

    monkeypatch.setenv("SSH_CONNECTION", "198.18.0.5 40000 198.18.1.11 22")
    monkeypatch.setattr(look, "run", run)
    assert look.logins({}) == {"passwordauthentication": "yes", "kbdinteractiveauthentication": "no"}
    connection = "user=root,host=198.18.0.5,addr=198.18.0.5,laddr=198.18.1.11,lport=22"
    assert asked == [f"/usr/sbin/sshd -T -C {connection}"]
