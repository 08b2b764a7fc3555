"""What several unit tests need: the lab's stack, with and without its keys."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from model.keys import PrivateKeys, PublicKeys
from model.load import load, parse, read_file
from model.stack import Stack
from ops.keys import complete

STACKS = Path(__file__).parents[2] / "stacks"
LAB = STACKS / "Pulumi.lab.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    """The lab's configuration, to be spoilt."""
    return copy.deepcopy(read_file(LAB))


@pytest.fixture(scope="session")
def stack() -> Stack:
    """The lab's stack as rendering sees it: without keys."""
    return load(LAB)


@pytest.fixture(scope="session")
def keyed_config(stack: Stack) -> dict[str, Any]:
    """The lab's configuration as Pulumi hands it over: with keys, and every map sorted."""
    config = copy.deepcopy(read_file(LAB))
    ring = complete(stack, PublicKeys(), PrivateKeys())
    ring.private["tsig"] |= {"posthorn-lab": "c2VjcmV0"}
    config["keys"] = {"public": ring.public, "private": json.dumps(ring.private)}
    config["access"]["operators"] = [
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJJ operator"
    ]
    # Keys of maps are texts in JSON.
    result: dict[str, Any] = json.loads(json.dumps(config, sort_keys=True))
    return result


@pytest.fixture(scope="session")
def keyed_stack(keyed_config: dict[str, Any]) -> Stack:
    return parse("lab", "Pulumi.lab.yaml", copy.deepcopy(keyed_config))
