"""Headless Chromium with one page, driven over a pipe by its DevTools protocol.

The protocol: messages of JSON that end with a NUL byte, to file descriptor 3 of the browser and
from its 4. So no port, no driver and no library are needed.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

# Debian's name, and those of other systems
NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60.0


def find_chromium() -> str | None:
    """Path of an installed Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with one tab; a context manager that ends it."""

    def __init__(self, program: str, profile: Path) -> None:
        """Start ``program`` with the empty folder ``profile``."""
        read_commands, self._commands = _high_pipe()
        self._answers, write_answers = _high_pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--hide-scrollbars", "about:blank"]
        # a shell, because Popen cannot choose the numbers of what a child inherits
        command = ["bash", "-c", f'exec "$@" 3<&{read_commands} 4>&{write_answers}', "bash"]
        with (profile / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, program, *options],
                pass_fds=(read_commands, write_answers),
                stdout=log,
                stderr=log,
            )
        os.close(read_commands)
        os.close(write_answers)
        self._number = 0
        self._received = b""
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        self.resize()

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol and its result; events are left out.

        Raises:
            RuntimeError: if the browser refuses it, ends or does not answer.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while True:
            answer = self._next_message(method, until)
            if answer.get("id") == self._number:
                break
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next_message(self, method: str, until: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, until - time.monotonic()))
            received = os.read(self._answers, 1 << 20) if ready else b""
            if not received:
                raise RuntimeError(f"no answer to {method} from Chromium")
            self._received += received
        message, _, self._received = self._received.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def resize(self, width: int = 1100) -> None:
        """Give the window a width."""
        size = {"width": width, "height": 780, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.frame()

    def open(self, page: Path) -> None:
        """Show a file, and wait until its script has drawn it."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + _SECONDS
        while not self.run("location.protocol === 'file:' && document.readyState === 'complete'"):
            assert time.monotonic() < until, f"{page} did not load"
            time.sleep(0.02)
        self.frame()

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited.

        Raises:
            RuntimeError: with what the expression threw.
        """
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]["exception"].get("description")))
        return answer["result"].get("value")

    def frame(self) -> None:
        """Wait until what was asked for before is drawn."""
        self.run(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def press(self, key: str, times: int = 1) -> None:
        """Press and release a key with a name, such as ``PageDown``."""
        codes = {"PageUp": 33, "PageDown": 34, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                code = codes[key]
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    windowsVirtualKeyCode=code,
                )
            self.frame()

    def click(self, x: float, y: float) -> None:
        """Click at a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.frame()

    def prefer(self, scheme: str) -> None:
        """Ask pages for ``light`` or ``dark`` colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.frame()

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def _high_pipe() -> tuple[int, int]:
    """A pipe whose numbers are not those that the browser uses."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
