"""A real browser without a window, spoken to as the W3C's WebDriver protocol has it."""

import asyncio
import shutil
import tempfile
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from launcher.ports import free_port

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
#: The browser asks nothing of the network by itself.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: JavaScript for what the browser has refused so far because of the policy.
VIOLATIONS = """
  const seen = new ReportingObserver(() => {}, {types: ["csp-violation"], buffered: true});
  seen.observe();
  return seen.takeRecords().map((report) => JSON.stringify(report.body));
"""
#: WebDriver's code points for keys.
KEYS = {
    "Control": "\ue009",
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "Tab": "\ue004",
    "Left": "\ue012",
    "Right": "\ue014",
    "Space": " ",
}


class Page:
    """The one page of a session."""

    def __init__(self, driver: httpx.AsyncClient, session: str) -> None:
        self._driver = driver
        self._session = session

    async def open(self, url: str) -> None:
        """Go there and wait until it is loaded."""
        await self._call("url", {"url": url})

    async def run(self, script: str, *arguments: Any) -> Any:
        """What a function with this body returns."""
        return await self._call("execute/sync", {"script": script, "args": list(arguments)})

    async def resolved(self, expression: str) -> Any:
        """The value of the promise that this expression makes."""
        script = f"({expression}).then(arguments[0], (e) => arguments[0](`failed: ${{e}}`))"
        return await self._call("execute/async", {"script": script, "args": []})

    async def until(self, condition: str, seconds: float = 60) -> None:
        """Wait until the expression is true; the error shows what the page says instead."""
        try:
            async with asyncio.timeout(seconds):
                while not await self.run(f"return Boolean({condition})"):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            shown = await self.run("return document.body.innerText")
            raise AssertionError(f"not true: {condition}\n{shown}") from None

    async def show_as(
        self, *, width: int = 1280, height: int = 900, scheme: str = "light", still: bool = False
    ) -> None:
        """Take this size, in CSS pixels, and the scheme and motion that a system would ask for."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.develop("Emulation.setDeviceMetricsOverride", size)
        motion = "reduce" if still else "no-preference"
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        wanted = [{"name": name, "value": value} for name, value in features.items()]
        await self.develop("Emulation.setEmulatedMedia", {"features": wanted})

    async def press(self, *keys: str) -> None:
        """Press and release keys one by one; `Control+Enter` holds the first one meanwhile."""
        for chord in keys:
            codes = [KEYS.get(name, name) for name in chord.split("+")]
            down = [{"type": "keyDown", "value": code} for code in codes]
            up = [{"type": "keyUp", "value": code} for code in reversed(codes)]
            actions = [{"type": "key", "id": "keyboard", "actions": down + up}]
            await self._call("actions", {"actions": actions})

    async def grant(self, *permissions: str) -> None:
        """Give the page these permissions, which a user would be asked for."""
        await self.develop("Browser.grantPermissions", {"permissions": permissions})

    async def download_to(self, folder: Path) -> None:
        """Save files there."""
        wanted = {"behavior": "allow", "downloadPath": str(folder)}
        await self.develop("Browser.setDownloadBehavior", wanted)

    async def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        async with asyncio.timeout(30):
            return b64decode(await self._get("screenshot"))

    async def develop(self, command: str, parameters: Any) -> Any:
        """A command of Chrome's DevTools."""
        return await self._call("goog/cdp/execute", {"cmd": command, "params": parameters})

    async def _get(self, command: str) -> Any:
        return (await self._driver.get(f"/session/{self._session}/{command}")).json()["value"]

    async def _call(self, command: str, body: Any) -> Any:
        path = f"/session/{self._session}/{command}"
        answer = (await self._driver.post(path, json=body)).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(answer["message"])
        return answer


@asynccontextmanager
async def open_browser() -> AsyncIterator[Page]:
    """Start a browser with an empty profile, which is removed afterwards."""
    assert DRIVER is not None
    port = free_port()
    profile = tempfile.TemporaryDirectory(prefix="dllm-browser-", ignore_cleanup_errors=True)
    process = await asyncio.create_subprocess_exec(
        DRIVER,
        f"--port={port}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as driver:
            await _ready(driver)
            options = {"binary": BROWSER, "args": [*ARGUMENTS, f"--user-data-dir={profile.name}"]}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            session = (await driver.post("/session", json=wanted)).json()["value"]
            assert "sessionId" in session, session
            try:
                yield Page(driver, session["sessionId"])
            finally:
                await driver.delete(f"/session/{session['sessionId']}")
    finally:
        process.terminate()
        await process.wait()
        profile.cleanup()


async def _ready(driver: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                if (await driver.get("/status")).json()["value"]["ready"]:
                    return
            except httpx.ConnectError:
                await asyncio.sleep(0.05)
