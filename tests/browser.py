"""A headless Chromium for tests, driven over a pipe by its DevTools protocol: no packages, no ports.

One browser serves many pages and sizes; the colour scheme is set as the system would set it. As a program it takes the picture in
the README, the page down to the end of a section:

    python tests/browser.py ./small/report.html docs/report.png "Ranks and widths by layer"
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60


def find_browser() -> str | None:
    """Path of the first browser that is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab. ``events`` holds what the browser has told on its own."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest = commands, answers, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run one command and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path, *, width: int, height: int = 844, dark: bool = False) -> None:
        """Load a file into a window of that size, on a phone where it is narrower than 600 pixels."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, f"{path} was not loaded within {SECONDS} seconds"
            self.run("0")
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression in the page, as JSON has it."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """The whole page, or its first ``height`` pixels, as PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        image = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._answers, 2**20)
            if not block:
                raise RuntimeError("the browser has ended")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_browser(executable: str, profile: Path) -> Iterator[Browser]:
    """A browser that reads commands from its descriptor 3 and answers on 4, with an empty profile."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    options += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    # The pipes are moved to where the browser looks for them.
    mover = (
        f"import os, sys; os.dup2({command_read}, 3); os.dup2({answer_write}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", mover, executable, *options],
        pass_fds=(command_read, answer_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Browser(command_write, answer_read)
    finally:
        os.close(command_write)
        os.close(answer_read)
        process.terminate()
        process.wait(SECONDS)


def main(page: str, picture: str, heading: str) -> None:
    """Take a picture of ``page``, 1280 pixels wide and light, down to the end of the charts under a heading."""
    from PIL import Image

    executable = find_browser()
    if executable is None:
        raise SystemExit(f"no browser: none of {', '.join(NAMES)} is on PATH")
    with tempfile.TemporaryDirectory() as profile, open_browser(executable, Path(profile)) as browser:
        browser.open(Path(page), width=1280)
        section = (
            f"[...document.querySelectorAll('section')].find(one => one.innerText.startsWith({json.dumps(heading)}))"
        )
        bottom = browser.run(f"{section}.querySelector('.charts').getBoundingClientRect().bottom + 16")
        browser.screenshot(Path(picture), height=round(bottom))
    # A page has few colours: a third of the bytes.
    Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
