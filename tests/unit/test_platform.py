"""The resources of a stack, with Pulumi mocked."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pulumi
import pytest
from pulumi.runtime import mocks, settings

from model.load import parse
from model.stack import Stack
from ops.pulumi import excluded


class Recorder(mocks.Mocks):
    """Remembers every resource that is asked for."""

    def __init__(self) -> None:
        self.made: list[mocks.MockResourceArgs] = []

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict[Any, Any]]:
        self.made.append(args)
        return f"{args.name}-id", dict(args.inputs)

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        return {}, None

    def of_type(self, part: str) -> dict[str, mocks.MockResourceArgs]:
        return {args.name: args for args in self.made if part in args.typ}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setenv("PULUMI_ERROR_OUTPUT_STRING", "1")
    # Hooks call back into the program, for which mocks have no server.
    monkeypatch.setattr(pulumi, "ResourceHook", lambda *_: None)
    monkeypatch.setattr(pulumi, "ResourceHookBinding", lambda **_: None)
    # Mocks make resources in the thread's own event loop, which tests before may have closed.
    asyncio.set_event_loop(asyncio.new_event_loop())
    recorder = Recorder()
    mocks.set_mocks(recorder, project="posthorn", stack="lab", preview=False)
    yield recorder
    settings.reset_options()


def build(stack: Stack) -> None:
    from components.platform import Platform

    @pulumi.runtime.test  # type: ignore[untyped-decorator]
    def run() -> pulumi.Output[Any]:
        Platform(stack)
        return pulumi.Output.from_input(None)

    run()


def existing(keyed_config: dict[str, Any]) -> Stack:
    config = json.loads(json.dumps(keyed_config))
    for host in config["hosts"].values():
        del host["machine"]
        host["existing"] = {"host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ", "generation": "1"}
    return parse("lab", "Pulumi.lab.yaml", config)


def test_a_host_is_pushed_with_two_commands(recorder: Recorder, keyed_config: dict[str, Any]) -> None:
    stack = existing(keyed_config)
    build(stack)
    commands = recorder.of_type("remote:Command")
    assert set(commands) == {f"{host}-{part}" for host in stack.hosts for part in ("secrets", "files")}


def test_every_connection_pins_the_host_key_and_nothing_is_ever_deleted(
    recorder: Recorder, keyed_config: dict[str, Any]
) -> None:
    build(existing(keyed_config))
    for args in recorder.of_type("remote:Command").values():
        connection = args.inputs["connection"]
        connection = connection.get("value", connection) if isinstance(connection, dict) else connection
        assert connection["hostKey"].startswith("ssh-ed25519")
        assert "delete" not in args.inputs
        assert args.inputs["triggers"] == ["1"]
        assert args.inputs["addPreviousOutputInEnv"] is False


def test_no_secret_is_in_the_clear_half(recorder: Recorder, keyed_config: dict[str, Any]) -> None:
    stack = existing(keyed_config)
    build(stack)
    assert stack.keys.private
    for name, args in recorder.of_type("remote:Command").items():
        if name.endswith("-files"):
            assert "PRIVATE KEY" not in json.dumps(args.inputs)


def test_every_rrset_is_a_resource_of_its_own(recorder: Recorder, keyed_config: dict[str, Any]) -> None:
    from services.zones import rrsets

    stack = existing(keyed_config)
    build(stack)
    assert set(recorder.of_type("RRset")) == {f"{rrset.name}-{rrset.type}" for rrset in rrsets(stack)}


def test_an_rrset_is_taken_over_only_where_it_was_said(
    recorder: Recorder, keyed_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTHORN_ADOPT", "hill.example/MX,dale.example/TXT")
    build(existing(keyed_config))
    adopted = {name for name, args in recorder.of_type("RRset").items() if args.inputs["adopt"]}
    assert adopted == {"hill.example-MX", "dale.example-TXT"}


def test_machines_are_made_on_their_sites_hypervisor_and_their_data_is_apart(
    recorder: Recorder, keyed_config: dict[str, Any]
) -> None:
    stack = parse("lab", "Pulumi.lab.yaml", copy.deepcopy(keyed_config))
    build(stack)
    assert set(recorder.of_type("domain:Domain")) == set(stack.hosts)
    volumes = recorder.of_type("volume:Volume")
    assert {f"{host}-data" for host in stack.hosts} <= set(volumes)
    assert all(volumes[f"{host}-data"].inputs["name"] == f"{host}-data" for host in stack.hosts)


def test_no_machine_is_touched_before_the_step_before_serves_again(
    recorder: Recorder, keyed_config: dict[str, Any]
) -> None:
    from components.platform import steps

    stack = parse("lab", "Pulumi.lab.yaml", copy.deepcopy(keyed_config))
    build(stack)
    when = {args.name: index for index, args in enumerate(recorder.made) if args.custom}
    taken = [[host.name for host in hosts] for _, hosts in steps(stack)]
    for before, after in itertools.pairwise(taken):
        assert max(when[f"{host}-files"] for host in before) < min(when[f"{host}-system"] for host in after)


def test_the_first_machines_of_a_stack_are_made_at_all_sites_at_once(
    recorder: Recorder, keyed_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.machine import Machine
    from components.platform import FIRST

    waited_for: dict[str, int] = {}

    class Noting(Machine):
        def make(self, waits_for: Sequence[pulumi.Resource]) -> pulumi.Output[str]:
            waited_for[self._name] = len(waits_for)
            return super().make(waits_for)

    monkeypatch.setattr("components.platform.Machine", Noting)
    monkeypatch.setenv(FIRST, "yes")
    stack = parse("lab", "Pulumi.lab.yaml", copy.deepcopy(keyed_config))
    build(stack)
    assert waited_for == dict.fromkeys(stack.hosts, 0)


def test_a_data_disk_depends_on_other_data_disks_alone(
    recorder: Recorder, keyed_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pulumi_libvirt as libvirt

    waits_for: dict[str, list[str]] = {}

    class Noting(libvirt.Volume):
        def __init__(self, name: str, args: libvirt.VolumeArgs, opts: pulumi.ResourceOptions) -> None:
            before: Any = opts.depends_on
            waits_for[name] = [resource._name for resource in before]
            super().__init__(name, args, opts)

    monkeypatch.setattr("components.machine.libvirt.Volume", Noting)
    build(parse("lab", "Pulumi.lab.yaml", copy.deepcopy(keyed_config)))
    others = [other for name, found in waits_for.items() if name.endswith("-data") for other in found]
    assert others and all(other.endswith("-data") for other in others)


def test_no_site_waits_for_one_that_is_left_out(
    recorder: Recorder, keyed_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.host import HostConfiguration
    from components.platform import WITHOUT

    waited_for: dict[str, set[str]] = {}

    class Noting(HostConfiguration):
        def __init__(self, name: str, **arguments: Any) -> None:
            waited_for[name] = {resource._name for resource in arguments["opts"].depends_on}
            super().__init__(name, **arguments)

    monkeypatch.setattr("components.platform.HostConfiguration", Noting)
    monkeypatch.setenv(WITHOUT, "elm")
    stack = existing(keyed_config)
    build(stack)
    ash = {host.name for host in stack.hosts_at("ash")}
    assert all(waited_for[name] == {"maildrop-oak"} for name in ash)
    others = [host.name for host in stack.hosts_at("oak") if not host.has("maildrop")]
    assert all(waited_for[name] == ash for name in others)


def test_whoever_delivers_is_told_before_whoever_accepts_and_the_preferred_site_last(stack: Stack) -> None:
    from components.platform import steps

    taken = [(site, {host.name for host in hosts}) for site, hosts in steps(stack)]
    assert [site for site, _ in taken] == ["elm", "oak", "ash", "elm", "oak"]
    assert [hosts for _, hosts in taken[:2]] == [{"maildrop-elm"}, {"maildrop-oak"}]
    assert set().union(*(hosts for _, hosts in taken)) == set(stack.hosts)


def test_a_machine_that_was_switched_off_is_pushed_to_again(recorder: Recorder, keyed_config: dict[str, Any]) -> None:
    build(parse("lab", "Pulumi.lab.yaml", copy.deepcopy(keyed_config)))
    pushed = recorder.of_type("remote:Command")["smtp-in-oak-files"]
    # The ids that mocks give to its system disk and to itself.
    assert pushed.inputs["triggers"] == ["smtp-in-oak-system-id smtp-in-oak-id"]


def matches(urn: str, exclusions: list[str]) -> bool:
    """Whether arguments leave a resource out, by Pulumi's globs: ** is any text, * any without a colon."""
    globs = [argument.removeprefix("--exclude=") for argument in exclusions]
    parts = ([re.escape(part).replace(r"\*", "[^:]*") for part in glob.split("**")] for glob in globs)
    return any(re.fullmatch(".*".join(part), urn) for part in parts)


def test_a_site_that_is_left_out_takes_every_resource_with_it_and_no_other_sites(
    recorder: Recorder, keyed_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.platform import WITHOUT

    # The stack is called like a site, and another site begins like it.
    renamed = json.dumps(copy.deepcopy(keyed_config)).replace("-ash", "-elm-b").replace('"ash"', '"elm-b"')
    config = json.loads(renamed)
    for site in config["sites"].values():
        site["hypervisor"]["images"]["12"] |= {"kernel": "/k", "initrd": "/i"}
    stack = parse("elm", "Pulumi.elm.yaml", config)
    build(stack)
    urns = [f"urn:pulumi:elm::posthorn::posthorn:index:Platform${args.typ}::{args.name}" for args in recorder.made]
    left_out = {site: [urn for urn in urns if matches(urn, excluded(stack, [site]))] for site in stack.sites}
    placed = re.compile("libvirt|remote:Command|:(Hypervisor|Machine|HostConfiguration)::")
    assert sorted(itertools.chain(*left_out.values())) == sorted(urn for urn in urns if placed.search(urn))
    assert all("elm-b" in urn.rpartition("::")[2] for urn in left_out["elm-b"])
    # What the program does not name and Pulumi is not told to leave would be deleted.
    monkeypatch.setenv(WITHOUT, "elm")
    recorder.made.clear()
    build(stack)
    named = [f"urn:pulumi:elm::posthorn::posthorn:index:Platform${args.typ}::{args.name}" for args in recorder.made]
    assert sorted([*named, *left_out["elm"]]) == sorted(urns)


def test_renumbering_a_host_replaces_no_machine(recorder: Recorder, keyed_config: dict[str, Any]) -> None:
    config = json.loads(json.dumps(keyed_config))
    build(parse("lab", "Pulumi.lab.yaml", config))
    before = recorder.of_type("domain:Domain")["smtp-in-oak"].inputs
    config["hosts"]["smtp-in-oak"]["addresses"]["local"][0] = "198.18.1.99"
    recorder.made.clear()
    build(parse("lab", "Pulumi.lab.yaml", config))
    assert recorder.of_type("domain:Domain")["smtp-in-oak"].inputs == before


def test_a_machine_is_shut_down_by_the_libvirt_that_the_provider_goes_by() -> None:
    from components.machine import shut_down_command

    far = "qemu+tls://hv.example.org/system?pkipath=/etc/pki/our keys"
    assert f"export LIBVIRT_DEFAULT_URI='{far}';" in shut_down_command(far, "smtp-in-oak")[-1]
    by_ssh = shut_down_command("qemu+ssh://root@hv.example.org/system?knownhosts=/k", "smtp-in-oak")
    assert by_ssh[0] == "ssh"
    assert "LIBVIRT_DEFAULT_URI=qemu:///system;" in by_ssh[-1]
