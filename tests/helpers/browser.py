"""A headless Chromium, controlled over two pipes with the Chrome DevTools Protocol."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess

from tests.helpers.waiting import eventually

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATH = next((path for name in NAMES if (path := shutil.which(name))), None)
"""Path of the browser; None if none is installed."""


class Browser:
    """A page in a headless browser.

    Attributes:
        requests: URLs that the page has requested.
        complaints: exceptions and console errors, violations of the page's policy included.
    """

    def __init__(self, profile):
        assert PATH is not None
        self.requests, self.complaints = [], []
        self._rest, self._ids = b"", itertools.count(1)
        browser_in, self._out = os.pipe()
        self._in, browser_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4. Bash redirects them from numbers >= 10.
        far_in, far_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (browser_in, browser_out))

        words = ["bash", "-c", f'exec "$0" "$@" 3<&{far_in} 4>&{far_out}']
        words += [
            PATH,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ]
        words += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            words,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(far_in, far_out),
        )  # fmt: skip
        for end in (browser_in, browser_out, far_in, far_out):
            os.close(end)
        self._session = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._session = None
        try:
            self._ask("Browser.close")
        finally:
            for end in (self._in, self._out):
                os.close(end)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def open(self, url):
        """Opens a page and waits until it has loaded."""
        self._ask("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def wait_for(self, condition):
        """Waits until a JavaScript expression is true."""
        eventually(lambda: self.value(condition))

    def value(self, expression):
        """Returns the value of a JavaScript expression."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key, modifiers=0):
        """Presses and releases a key."""
        text = {"text": key} if len(key) == 1 else {}
        common = {"key": key, "modifiers": modifiers}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self._ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector, share=0.5):
        """Clicks on an element, at a fraction of its width."""
        box = self.value(
            f"(e => (e.scrollIntoView(), e = e.getBoundingClientRect(), "
            f"[e.x, e.y, e.width, e.height]))(document.querySelector({json.dumps(selector)}))"
        )
        place = {"x": box[0] + share * box[2], "y": box[1] + box[3] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def _ask(self, method, **params):
        """Sends a command and returns its result; records events received before it."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)

    def _read(self):
        """Returns the next message."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 30)
            assert ready, "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def _note(self, event):
        """Records a request or an error."""
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and params["entry"]["level"] == "error"
        ):
            self.complaints.append(params)
