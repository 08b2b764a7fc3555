"""The README's first commands, as an operator types them on a machine that has never seen the project.

One after the other, each going on where the one before ended.
"""

from __future__ import annotations

import re

from tests.plain.conftest import Plain
from tools.setup import PULUMI_VERSION, archives

SETUP = "python3 tools/setup.py"
VARIABLES = {
    # Root's, given away: it takes a minute to fill another one.
    "XDG_CACHE_HOME": "/root/.cache",
    "PULUMI_BACKEND_URL": "file:///home/olga/state",
    "PULUMI_CONFIG_PASSPHRASE_FILE": "/home/olga/passphrase",
}


def test_whoever_is_not_root_is_told_what_root_has_to_install(plain: Plain) -> None:
    status, said = plain.run(f"{SETUP} run -- true", user="olga")
    assert status == 1
    assert re.fullmatch(
        r"Debian packages are missing, which only root can install: apt-get update && apt-get install "
        r"--no-install-recommends ca-certificates openssh-client python3-venv\n",
        said,
    )


def test_without_a_network_the_mirrors_of_debian_are_named(plain: Plain) -> None:
    status, said = plain.run(f"{SETUP} run -- true", network=False)
    assert status == 1 and "see whether the mirrors below /etc/apt are reached" in said


def test_an_archive_that_is_not_the_pinned_one_is_refused_and_nothing_else_is_taken(
    plain: Plain, mirror: tuple[str, str]
) -> None:
    plain.write("tools/sums.txt", f"{'0' * 64}  {archives()['sdk/pulumi']}\n")
    status, said = plain.run(f"umask 077; {SETUP} run -- true")
    assert status == 1 and "was downloaded, and is not what tools/sums.txt says" in said and "build" not in said
    plain.write("tools/sums.txt", mirror[1])


def test_the_first_command_downloads_pulumi_and_runs_what_was_asked_for(plain: Plain) -> None:
    status, said = plain.run(f"umask 077; {SETUP} run -- pulumi version")
    assert status == 0, said
    assert said.endswith(f"v{PULUMI_VERSION}\n") and "build" not in said and "has no sum" not in said
    status, said = plain.run(f"{SETUP} run -- python -m pytest -q tests/unit/test_setup.py tests/unit/test_model.py")
    assert status == 0 and re.search(r"\d+ passed", said), said


def test_what_the_lab_needs_is_installed_by_another_command(plain: Plain) -> None:
    status, said = plain.run(f"{SETUP} run --machines containers -- mmdebstrap --version")
    assert status == 0 and "mmdebstrap 1." in said, said
    # Nothing started, nothing is to start, and services of the machine's own may again.
    status, said = plain.run("ls /usr/sbin/policy-rc.d /etc/systemd/system/multi-user.target.wants")
    assert "policy-rc.d': No such file" in said and ".service" not in said


def test_an_operator_is_led_from_the_readme_to_a_preview(plain: Plain, mirror: tuple[str, str]) -> None:
    plain.write("tools/sums.txt", "")
    packages = "genisoimage libvirt-clients xsltproc"
    script = f"chown -R olga . /root/.cache && chmod 711 /root && apt-get install -q -y {packages}"
    status, said = plain.run(script)
    assert status == 0, said
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    existing = f's/machine: {{.*}}/existing: {{host_key: "{key}"}}/'
    status, said = plain.run(f"sed '{existing}' stacks/Pulumi.example.yaml > stacks/Pulumi.mine.yaml", user="olga")
    assert status == 0, said
    # A plugin that no sum is pinned for is told.
    status, said = plain.run("XDG_CACHE_HOME=/root/.cache make keys STACK=mine", user="olga")
    assert status == 2 and "PULUMI_BACKEND_URL is not set" in said and "step 4" in said
    assert "pulumi-resource-libvirt" in said and "has no sum in tools/sums.txt" in said
    status, said = plain.run("make keys STACK=mine", VARIABLES, user="olga")
    assert status == 2 and "mkdir -p -m 700 '/home/olga/state'" in said
    assert plain.run("mkdir -m 700 ~/state && echo secret > ~/passphrase", user="olga")[0] == 0
    status, said = plain.run("make keys STACK=mine", VARIABLES, user="olga")
    assert status == 0 and "commit it" in said, said
    status, said = plain.run("echo c2VjcmV0 | make tsig STACK=mine KEY=posthorn", VARIABLES, user="olga")
    assert status == 0, said
    status, said = plain.run(f"{SETUP} run -- pulumi preview --stack mine", VARIABLES, user="olga")
    assert status == 0 and re.search(r"\+ \d+ to create", said), said


def test_whoever_has_no_home_is_told_where_else_it_can_be(plain: Plain) -> None:
    status, said = plain.run(f"{SETUP} run -- true", user="nobody")
    assert status == 1
    assert "/nonexistent/.cache/posthorn cannot be written: say XDG_CACHE_HOME=FOLDER" in said
    assert "/nonexistent/.local/state/posthorn cannot be written: say XDG_STATE_HOME=FOLDER" in said
