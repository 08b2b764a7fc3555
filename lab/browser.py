"""A real browser in the lab: Chromium in the client's network, driven by WebDriver (W3C).

The driver listens on loopback of the client's namespace. This process reaches it by opening its socket there: a socket
stays in the namespace that it was made in.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab.state import LabError, State, namespace

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's reference (WebDriver section 12.1)."""
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,800 --lang=en"
).split()
NETWORK = 0x40000000
"""CLONE_NEWNET of setns(2)."""
START_SECONDS, COMMAND_SECONDS, POLL_SECONDS = 30.0, 90.0, 0.1


class BrowserError(Exception):
    """The browser could not do what it was asked, in the driver's words."""


def _connect(path: Path, port: int) -> socket.socket:
    """A connection to a port on loopback of another network namespace, made by a thread that goes there and ends."""
    made: list[socket.socket | OSError] = []

    def go() -> None:
        with path.open() as there:
            if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), NETWORK):
                made.append(OSError(ctypes.get_errno(), f"{path}: cannot be entered"))
                return
        try:
            made.append(socket.create_connection(("127.0.0.1", port), COMMAND_SECONDS))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


class Browser:
    """One window. Elements are named by CSS selectors, and waited for."""

    def __init__(self, network: Path, port: int, profile: Path) -> None:
        self._network, self._port = network, port
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=COMMAND_SECONDS)
        connection.sock = _connect(self._network, self._port)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            answer = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise BrowserError(f"{answer['error']}: {answer.get('message', '').splitlines()[0]}")
        return answer

    def _do(self, path: str, **body: Any) -> Any:
        return self._ask("POST", self._session + path, body)

    # Pages

    def open(self, url: str) -> None:
        self._do("/url", url=url)

    @property
    def url(self) -> str:
        return str(self._ask("GET", f"{self._session}/url"))

    @property
    def source(self) -> str:
        return str(self._ask("GET", f"{self._session}/source"))

    def frame(self, selector: str | None) -> None:
        """Goes into a frame of the whole page, or back out of all."""
        self._do("/frame", id=None)
        if selector:
            self._do("/frame", id={ELEMENT: self.find(selector)})

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript in the page; what it returns comes back."""
        return self._do("/execute/sync", script=script, args=list(arguments))

    def picture(self, file: Path) -> None:
        """Writes what is seen, as PNG."""
        file.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def complaints(self) -> list[str]:
        """What the page has made the browser complain of since this was asked last."""
        entries = self._do("/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def wait(self, true: Callable[[], Any], seconds: float = 20) -> Any:
        """Waits for a condition, and returns what it was. Raises `BrowserError` with the page's address."""
        deadline, last = time.monotonic() + seconds, ""
        while True:
            try:
                if found := true():
                    return found
            except BrowserError as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise BrowserError(f"waited in vain at {self.url}: {last}")
            time.sleep(POLL_SECONDS)

    # Elements

    def find(self, selector: str) -> str:
        """The first element of a selector that can be seen, else the first at all."""
        found = [str(each[ELEMENT]) for each in self._do("/elements", using="css selector", value=selector)]
        if not found:
            raise BrowserError(f"there is no {selector}")
        return next((element for element in found if self._visible(element)), found[0])

    def _visible(self, element: str) -> bool:
        return bool(self._ask("GET", f"{self._session}/element/{element}/displayed"))

    def shows(self, selector: str) -> bool:
        """Whether an element is there and can be seen."""
        try:
            return self._visible(self.find(selector))
        except BrowserError:
            return False

    def click(self, selector: str) -> None:
        """Clicks, as soon as that is possible: an element may be covered or still be on its way."""

        def clicked() -> bool:
            self._do(f"/element/{self.find(selector)}/click")
            return True

        self.wait(clicked)

    def type(self, selector: str, text: str) -> None:
        """Types into an element, in place of what stands there."""

        def typed() -> bool:
            element = self.find(selector)
            self._do(f"/element/{element}/clear")
            self._do(f"/element/{element}/value", text=text)
            return True

        self.wait(typed)

    def text(self, selector: str) -> str:
        """What an element says, once it is there."""
        return str(self.wait(lambda: self._ask("GET", f"{self._session}/element/{self.find(selector)}/text")))


@contextlib.contextmanager
def browser(state: State, *, where: str = "client") -> Iterator[Browser]:
    """A fresh browser in a part of the lab, which believes the authority of the lab's world.

    Raises `LabError` where it does not start.
    """
    home = Path(tempfile.mkdtemp(prefix="posthorn-browser-"))
    driver = None
    try:
        _believe(state, home)
        command = state.command_in(where, ["chromedriver", "--port=0", f"--log-path={home / 'driver.log'}"])
        # What Chromium leaves in its temporary folder when it is killed goes with the rest.
        env = {**os.environ, "HOME": str(home), "TMPDIR": str(home)}
        driver = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
        yield Browser(Path("/run/netns", namespace(where)), _port(driver), home / "profile")
    finally:
        if driver:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            if driver.stdout:
                driver.stdout.close()
        shutil.rmtree(home, ignore_errors=True)


def _believe(state: State, home: Path) -> None:
    """Chromium takes further authorities from the user's NSS database."""
    store = home / ".pki" / "nssdb"
    store.mkdir(parents=True)
    where = ["certutil", "-d", f"sql:{store}"]
    for step in (["-N", "--empty-password"], ["-A", "-t", "C,,", "-n", "lab", "-i", str(state.world_file)]):
        done = subprocess.run([*where, *step], capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"certutil: {done.stderr.strip()}")


def _port(driver: subprocess.Popen[str]) -> int:
    """The port that the driver says it listens on."""
    assert driver.stdout
    for line in driver.stdout:
        if "started successfully on port" in line:
            return int(line.rstrip(".\n").rpartition(" ")[2])
    raise LabError("chromedriver ended before it listened")
