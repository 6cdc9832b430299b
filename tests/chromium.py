"""A headless Chromium for tests of pages, controlled through two pipes.

Without a Chromium, or without fonts for the scripts of the pages, such tests are skipped; with
TRMT_BROWSER=needed they fail.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NEEDED = os.environ.get("TRMT_BROWSER") == "needed"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"Home": 36, "End": 35, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}


def program() -> str | None:
    """The path of an installed browser."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


wanted = pytest.mark.skipif(program() is None and not NEEDED, reason="there is no Chromium")


class Page:
    """A page in the browser."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self.count, self.session, self.rest = 0, "", b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> Any:
        """The browser's answer to a command of the DevTools protocol."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = os.read(self.answers.fileno(), 1 << 16)
            assert more, "the browser has gone"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Load a page and wait until it is complete."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true, evaluating it in the browser at each animation frame."""
        self.eval(
            "new Promise((done, fail) => { let left = 600; const check = () => { let ok = false; "
            f"try {{ ok = {condition}; }} catch (error) {{}} "
            "if (ok) done(); else if (--left) requestAnimationFrame(check); "
            "else fail(new Error('timeout')); }; check(); })"
        )

    def press(self, key: str, *, times: int = 1, shift: bool = False) -> None:
        """Press a key of the keyboard."""
        given = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, **given)

    def resize(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Set the size of the window and the preferred colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Save a screenshot of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[str]:
        """The URLs that were requested so far."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def errors(self) -> list[dict[str, Any]]:
        """The exceptions of the page and the errors in the browser's log so far."""
        return [
            event["params"]
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
        ]


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with one empty page and its profile in `folder`."""
    found = program()
    assert found, "there is no Chromium"
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    # The browser reads commands from 3 and answers on 4: a shell puts the pipes there.
    launch = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
    options += [f"--user-data-dir={folder}", "--disable-dev-shm-usage", "--disable-background-networking"]
    process = subprocess.Popen(
        ["bash", "-c", launch, found, *options],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    page = Page(commands, answers)
    try:
        page.attach()
        yield page
    finally:
        process.terminate()
        process.wait()
        page.commands.close()
        page.answers.close()
