"""Headless Chromium over DevTools' pipe, with nothing but the standard library."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def find_chromium() -> str | None:
    """Its path, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. `complaints` are errors and warnings of console, log and scripts; `requests` all addresses asked for."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def open(self, address: str, width: int, height: int, *, dark: bool = False) -> None:
        """Load a page into a window of so many CSS pixels, and wait until it is there."""
        if self._session is None:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=address)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def ask(self, method: str, **params: Any) -> Any:
        """Send a command, return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, "chromium has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


@contextmanager
def running(executable: str, profile: Path) -> Iterator[Page]:
    """A browser with a profile of its own; it is gone afterwards."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def place() -> None:  # the browser reads commands from 3 and answers on 4
        first, second = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(first, 3, inheritable=True)
        os.dup2(second, 4, inheritable=True)

    command = [executable, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(
        command, preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as browser:
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Page(from_browser[0], to_browser[1])
        finally:
            os.close(to_browser[1])  # it ends when its commands do
            os.close(from_browser[0])
            try:
                browser.wait(10)
            except subprocess.TimeoutExpired:
                browser.kill()


def assert_readable(tab: Page, address: str, *, dark: bool) -> Iterator[int]:
    """Open a page at 1280 and 390 pixels, which are yielded: all of it is seen, large and dark enough, and no noise."""
    for width in (1280, 390):
        tab.open(address, width, 900, dark=dark)
        assert tab.evaluate("innerWidth") == width
        assert tab.evaluate("document.documentElement.scrollWidth") == width, "it scrolls sideways"
        assert tab.evaluate(TOO_WIDE) == []
        assert tab.evaluate(SMALLEST) >= 11
        assert tab.evaluate(HIDDEN) == []
        assert tab.evaluate(LOW_CONTRAST) == []
        yield width
    assert tab.complaints == []
    assert set(tab.requests) == {address}


# what sticks out of the window, but for what scrolls in a box of its own
TOO_WIDE = """[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll, .wide') && e.getClientRects().length)
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
  .map(e => e.outerHTML.slice(0, 80))"""
# the smallest words in pixels, with what drawings are scaled by
SMALLEST = """Math.min(...[...document.querySelectorAll('p,dd,dt,li,td,th,text,small,code')]
  .filter(e => e.getClientRects().length)
  .map(e => parseFloat(getComputedStyle(e).fontSize) * (e.ownerSVGElement ?
    e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width : 1)))"""
HIDDEN = (
    "[...document.querySelectorAll('section, h2')].filter(e => e.getBoundingClientRect().height < 5).map(e => e.id)"
)
# WCAG 2: words need 4.5 times the luminance of their ground, or the other way
LOW_CONTRAST = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = parse(c).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (parse(c)[3] !== 0) return c; } return 'rgb(255,255,255)'; };
  const weak = e => { const style = getComputedStyle(e), b = light(ground(e));
    const a = light(e.ownerSVGElement ? style.fill : style.color);
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5; };
  return [...document.querySelectorAll('h1,h2,h3,p,dd,dt,li,td,th,small,code,a,text,summary')]
    .filter(e => e.getClientRects().length && weak(e)).map(e => e.outerHTML.slice(0, 80));
})()"""
