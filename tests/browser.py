"""A headless Chromium for tests of pages, spoken to over the pipe of its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol: JSON messages, a zero byte behind each. No package is
needed for the little that the tests ask.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
_PATIENCE = 60.0  # seconds for one answer or one page, on a busy machine


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page, opened again and again; `requests` and `complaints` are those since it was opened last."""

    def __init__(self, chromium: str, profile: Path):
        its_in, ours = _pipe()
        answers, its_out = _pipe()
        flags = [
            "--headless",
            "--disable-gpu",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
        ]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}", "about:blank"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # no test leaves the machine
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
        actions: list[Any] = [(os.POSIX_SPAWN_DUP2, its_in, 3), (os.POSIX_SPAWN_DUP2, its_out, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        self._pid = os.posix_spawn(
            chromium, [chromium, *flags], os.environ, file_actions=actions, setpgroup=0
        )
        os.close(its_in)
        os.close(its_out)
        self._ours, self._answers, self._read, self._number = ours, answers, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._ours)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers.

        Raises:
            RuntimeError: it refuses, or says nothing.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._ours, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _PATIENCE
        while (answer := self._next(deadline)).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, page: Path, width: int = 1200, dark: bool = False) -> None:
        """Load a file at a width in CSS pixels, light or dark."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + _PATIENCE
        while not self._told("Page.loadEventFired"):
            self.events.append(self._next(deadline))
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The plain value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself included; not those that its policy held back."""
        held = {one["requestId"] for one in self._told("Network.loadingFailed") if one.get("blockedReason")}
        sent = self._told("Network.requestWillBeSent")
        return [one["request"]["url"] for one in sent if one["requestId"] not in held]

    @property
    def complaints(self) -> list[str]:
        """What stands in the console: errors, warnings, refused requests, thrown exceptions."""
        names = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [json.dumps(told) for told in self._told(*names)]

    def _told(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise RuntimeError("the browser does not answer")
            piece = os.read(self._answers, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._read += piece
        message, self._read = self._read.split(b"\0", 1)
        return json.loads(message)


def _pipe() -> tuple[int, int]:
    """Its two ends, above the descriptors 3 and 4 that the browser's own take."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
