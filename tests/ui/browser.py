"""A real Chromium without a screen, spoken to through its pipe."""

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


class Browser:
    """One tab.

    Attributes:
      said(list): what the browser found wrong: errors, and what a page's policy forbade.
    """

    def __init__(self, directory: Path) -> None:
        program = shutil.which("chromium")
        assert program is not None, "install chromium"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def pipes() -> None:
            # As --remote-debugging-pipe has it: 3 is read, 4 is written.
            first, second = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [
                program,
                *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"),
                *("--disable-dev-shm-usage", f"--user-data-dir={directory}", "about:blank"),
            ],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number = 0
        self._buffer = b""
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.said: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Ask the browser for something; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 20)
            assert part, "the browser is gone"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("method") == "Log.entryAdded":
            self.said.append(answer["params"]["entry"]["text"])
        elif answer.get("method") in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
            self.said.append(json.dumps(answer["params"]))
        return answer

    def loaded(self) -> None:
        """Wait until the page that is on its way is there."""
        while True:
            event = self._events.pop(0) if self._events else self._next()
            if event.get("method") == "Page.loadEventFired":
                return

    def go(self, url: str) -> None:
        """Open a page."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        self.loaded()

    def ask(self, expression: str) -> Any:
        """What an expression of JavaScript is, in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, text: str | None = None) -> None:
        """Press a key."""
        codes = {"Tab": 9, "Enter": 13}
        more = {"windowsVirtualKeyCode": codes[key], "key": key, "code": key}
        if text is not None:
            more["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown", **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    def look(self, width: int, dark: bool) -> None:
        """How wide the window is, and which colours its owner likes."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Keep what is seen, from top to bottom."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A browser, until the end of the block."""
    opened = Browser(directory)
    try:
        yield opened
    finally:
        opened.close()
