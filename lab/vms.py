"""The lab's hypervisors, one a site, on which ``make up`` makes the machines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lab import image
from lab.hypervisor import Hypervisor, HypervisorError
from lab.network import BACKBONE4
from lab.state import CACHE, FOLDER, LabError, State, namespace, stack
from lab.vm_image import ImageError
from lab.vm_image import image as vm_image

if TYPE_CHECKING:
    from lab.up import Phases


def hypervisors(folder: Path = FOLDER) -> dict[str, Hypervisor]:
    """The hypervisor of each site, whether it runs or not."""
    return {
        site: Hypervisor(site, namespace(site), f"{BACKBONE4}.{index}", folder / "hypervisors" / site)
        for index, site in enumerate(stack().sites, 1)
    }


def start(phases: Phases, state: State) -> None:
    """Makes the images and starts the hypervisors, where they are not there yet, and notes both in the state.

    Raises `LabError` with what failed.
    """
    all_of_them = hypervisors(state.folder)
    made = {}
    try:
        for release in sorted({state.release_of(host) for host in state.virtual}):
            with phases.phase(f"Debian {release} image of the virtual machines"):
                found = vm_image(image.folder(release) / "root", CACHE / "images")
                image.note_use(found.folder)
                made[str(release)] = found.settings()
        if not all(one.running() for one in all_of_them.values()):
            with phases.phase(f"{len(all_of_them)} hypervisors"), ThreadPoolExecutor() as pool:
                list(pool.map(lambda one: one.start(state.operator_public_key), all_of_them.values()))
    except (ImageError, HypervisorError) as error:
        raise LabError(str(error)) from None
    for site, one in all_of_them.items():
        # An image that a running lab has stays: its machines were made of it.
        known = state.hypervisors.get(site, {}).get("images", {})
        state.hypervisors[site] = {**one.settings(), "images": made | known}
    state.save()


def stop(state: State) -> None:
    """Ends all hypervisors with their machines, and removes their disks."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(Hypervisor.stop, hypervisors(state.folder).values()))


def states(state: State) -> dict[str, str]:
    """Every machine that a hypervisor knows, with its state in libvirt's words."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda one: one.machines() if one.running() else {}, hypervisors(state.folder).values())
        return {name: machine for machines in found for name, machine in machines.items()}
