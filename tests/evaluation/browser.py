"""A headless Chromium in the hands of a test: trusted mouse and touch, and all that a page says, fetches and draws."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class OpenPage:
    """A page as a window of some size shows it, driven through pipes in the protocol of Chromium's own tools.

    Attributes:
        told: What the page wrote to the console, threw, or was refused.
        fetched: The addresses that it asked for, its own among them.
    """

    def __init__(self, profile: Path, page: Path, *, width: int, height: int, dark: bool = False) -> None:
        self.told: list[dict] = []
        self.fetched: list[str] = []
        self._calls = 0
        self._session: dict[str, str] = {}
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._commands, self._answers = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def __enter__(self) -> "OpenPage":
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.close()
        self._answers.close()
        self._process.terminate()
        self._process.wait()

    def evaluated(self, expression: str):
        """The value of an expression in the page, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def drag_mouse(self, path: Sequence[tuple[float, float]]) -> None:
        """Press the left button at the first place, move to the others and let it go at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(path) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*path, path[-1]], strict=True):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def drag_finger(self, path: Sequence[tuple[float, float]]) -> None:
        """Put a finger on the first place, move it to the others and lift it."""
        kinds = ["touchStart", *["touchMove"] * (len(path) - 1)]
        for kind, (x, y) in zip(kinds, path, strict=True):
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, code: int) -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def drawn(self, canvas: str) -> np.ndarray:
        """The pixels of a canvas, rows x columns x RGBA, when it has settled."""
        self.evaluated("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        address = self.evaluated(f"document.getElementById({canvas!r}).toDataURL()")
        return np.asarray(Image.open(BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGBA"))

    def screenshot(self) -> Image.Image:
        """What the window shows."""
        return Image.open(BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"])))

    def call(self, method: str, **parameters: object) -> dict:
        """Call the browser and wait for the answer."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters, **self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._message()).get("id") != self._calls:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self) -> dict:
        """The next message of the browser; of events what matters is noted."""
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser is gone"
            text += byte
        message = json.loads(text)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.told.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            self.fetched.append(message["params"]["request"]["url"])
        return message
