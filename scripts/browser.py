"""A real browser for tests and measurements: Debian's chromium, driven through a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def program() -> str | None:
    """The browser's path, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. What it logs and asks for is kept in ``errors`` and ``requests``."""

    def __init__(self, folder: Path) -> None:
        (theirs, ours_w), (ours_r, theirs_w) = os.pipe(), os.pipe()
        # The browser wants its pipe as file descriptors 3 and 4.
        become = f"import os, sys; os.dup2({theirs}, 3); os.dup2({theirs_w}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", become, str(program()), *OPTIONS, f"--user-data-dir={folder / 'profile'}"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=(theirs, theirs_w), stdout=quiet, stderr=quiet)
        os.close(theirs), os.close(theirs_w)
        self.write, self.read = os.fdopen(ours_w, "wb", 0), os.fdopen(ours_r, "rb")
        self.count, self.session, self.rest = 0, None, b""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.downloads = folder / "downloads"
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def close(self) -> None:
        """Ends the browser."""
        self.process.terminate()
        self.process.wait(30)
        self.write.close(), self.read.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol; its result."""
        self.count += 1
        session = {} if self.session is None or method.startswith("Browser.") else {"sessionId": self.session}
        self.write.write(
            json.dumps({"id": self.count, "method": method, "params": parameters} | session).encode() + b"\0"
        )
        while (message := self._next()).get("id") != self.count:
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.read.fileno(), 1 << 16)
            if not part:
                raise RuntimeError("the browser died")
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        what, told = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown" or (what == "Runtime.consoleAPICalled" and told["type"] == "error"):
            self.errors.append(json.dumps(told)[:500])
        elif what == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"] + str(told["entry"].get("url", "")))
        elif what == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self.requests.append(told["request"]["url"])

    def place(self, share: float) -> tuple[float, float]:
        """A point of the first canvas, at this share of its width and height."""
        x, y, width, height = self.run(
            "(b => [b.x, b.y, b.width, b.height])(document.querySelector('canvas').getBoundingClientRect())"
        )
        return x + share * width, y + share * height

    def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        """Goes there and waits until the page has settled."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=url)
        self.settle()

    def settle(self) -> None:
        """Waits until the page is loaded, its viewer is shown and has drawn."""
        self.run(
            "new Promise(done => { const look = () => document.readyState === 'complete' &&"
            " !document.querySelector('#viewer[hidden]') ? requestAnimationFrame(() => requestAnimationFrame(done))"
            " : setTimeout(look, 20); look(); })"
        )

    def arrive(self, end: str) -> None:
        """Waits until the address ends (but for its hash) like this and the page has settled."""
        for _ in range(400):
            with contextlib.suppress(RuntimeError):  # between two pages there is none to ask
                if str(self.run("location.pathname")).endswith(end):
                    return self.settle()
            time.sleep(0.05)
        raise RuntimeError(f"never arrived at {end}")

    def leave(self, expression: str, end: str) -> None:
        """Evaluates what leads to another page, which may be there before the answer is, and waits for it."""
        with contextlib.suppress(RuntimeError):
            self.run(expression)
        self.arrive(end)

    def run(self, expression: str) -> Any:
        """Evaluates JavaScript and returns its value."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def key(self, key: str, *kinds: str) -> None:
        """Presses and releases a key, or does one of both."""
        for kind in kinds or ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **text)
        self.settle()

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """One event of the mouse."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def drag(self, x: float, y: float, dx: float, dy: float) -> None:
        """Presses the left button, moves, lets go."""
        self.mouse("mousePressed", x, y, button="left", clickCount=1)
        self.mouse("mouseMoved", x + dx, y + dy, button="left")
        self.mouse("mouseReleased", x + dx, y + dy, button="left", clickCount=1)
        self.settle()

    def pdf(self) -> bytes:
        """The page as it is printed on A4."""
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True)["data"])
