"""What the pages at / and /docs consist of, and what the API's description adds for them."""

import hashlib
import re
from collections.abc import AsyncIterator
from posixpath import dirname, join, normpath

import httpx
import pytest
from adapter_fakes import (
    ScriptedEngine,
    denoising,
    fast_settings,
    running_app,
    served_app,
    until,
)

from tests.support.browser import BROWSER, DRIVER, VIOLATIONS, open_browser

needs_browser = pytest.mark.skipif(
    DRIVER is None or BROWSER is None, reason="no chromium with chromedriver on this machine"
)


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that decodes a canvas of four."""
    return ScriptedEngine([list(denoising(4))])


@pytest.fixture
async def url(database_url: str, engine: ScriptedEngine) -> AsyncIterator[str]:
    """A worker that is ready."""
    settings = fast_settings(database_url, engine_idle_timeout=30)
    async with served_app(settings, engine) as address, httpx.AsyncClient() as http:
        while (await http.get(f"{address}/v1/health")).status_code != 200:
            pass
        yield address


async def test_page_needs_nothing_from_elsewhere(database_url: str, engine: ScriptedEngine) -> None:
    """Page, modules and styles come from the adapter; a policy forbids all else, and all markup."""
    async with running_app(fast_settings(database_url), engine) as api:
        answer = await api.client.get("/")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "require-trusted-types-for 'script'" in policy
        assert not re.search(r"<script(?![^>]* src=)|<style|style=|onclick=", answer.text)
        left = re.findall(r'(?:src|href)="(static/[^"]+)"', answer.text)
        seen: dict[str, str] = {}
        while left:
            path = left.pop()
            file = await api.client.get(f"/{path}")
            assert file.status_code == 200, path
            assert file.headers["cache-control"] == "no-cache"
            seen[path] = file.text
            imported = re.findall(r'from "(\./[^"]+)"', file.text)
            left += {normpath(join(dirname(path), name)) for name in imported} - seen.keys()
        assert sum(path.endswith(".js") for path in seen) > 5
        for text in (answer.text, *seen.values()):
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|@import", text)


async def test_docs_need_nothing_from_elsewhere(database_url: str, engine: ScriptedEngine) -> None:
    """Swagger UI and its start come from the adapter; a policy forbids everything else."""
    async with running_app(fast_settings(database_url), engine) as api:
        answer = await api.client.get("/docs")
        assert answer.headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self';"
        )
        assert not re.search(r"https?://", answer.text)
        assert not re.search(r"<script(?![^>]* src=)", answer.text)
        linked = re.findall(r'(?:src|href)="(static/[^"]+)"', answer.text)
        assert len(linked) == 3
        for path in linked:
            assert (await api.client.get(f"/{path}")).status_code == 200
        assert (await api.client.get("/static/swagger/core.py")).status_code in (404, 422)


async def test_docs_say_how_to_send_a_key(database_url: str, engine: ScriptedEngine) -> None:
    """Where keys are needed, each guarded call names both ways; the open ones name none."""
    keys = {"api_keys": f"me:{hashlib.sha256(b'secret').hexdigest()}", "metrics_need_key": True}
    async with running_app(fast_settings(database_url, **keys), engine) as api:
        described = (await api.client.get("/openapi.json")).json()
        schemes = described["components"]["securitySchemes"]
        for path, calls in described["paths"].items():
            for call in calls.values():
                named = [name for choice in call.get("security", ()) for name in choice]
                guarded = path not in ("/v1/health", "/v1/livez")
                assert named == (list(schemes) if guarded else []), path
        sent = {
            "http": {"Authorization": f"{schemes['Bearer']['scheme'].title()} secret"},
            "apiKey": {schemes["ApiKey"]["name"]: "secret"},
        }
        for scheme in schemes.values():
            answer = await api.client.get("/v1/models", headers=sent[scheme["type"]])
            assert answer.status_code == 200, scheme


async def test_every_call_has_an_example_that_works(
    database_url: str, engine: ScriptedEngine
) -> None:
    """The example that /docs offers can be sent as it is, in the order of the page."""
    async with running_app(fast_settings(database_url), engine) as api:
        await until(lambda: api.monitor.state.ok)
        described = (await api.client.get("/openapi.json")).json()
        for path, calls in described["paths"].items():
            for method, call in calls.items():
                required = [p for p in call.get("parameters", ()) if p.get("required")]
                address = path.format(**{p["name"]: p["example"] for p in required})
                body = call.get("requestBody", {}).get("content", {}).get("application/json", {})
                answer = await api.client.request(method, address, json=body.get("example"))
                assert answer.status_code == 200, (method, path, answer.text)


@needs_browser
async def test_docs_are_shown_under_the_policy(url: str) -> None:
    """Swagger UI lists the calls, offers to take a key, and breaks no rule of the policy."""
    async with open_browser() as page:
        await page.open(f"{url}/docs")
        await page.until("document.querySelectorAll('.opblock').length > 10")
        await page.run("document.querySelector('.btn.authorize').click()")
        await page.until("document.querySelectorAll('.auth-container').length === 2")
        await page.run("document.querySelector('.btn-done').click()")
        await page.run(
            "document.querySelector('#operations-jobs-generate_v1_generate_post button').click()"
        )
        await page.until("document.querySelector('.opblock textarea')?.value.includes('about AI')")
        await page.run("document.querySelector('.btn.execute').click()")
        await page.until(
            "document.querySelector('.live-responses-table')?.innerText.includes('request_ids')"
        )
        assert await page.run(VIOLATIONS) == []
        await page.run("document.body.append(Object.assign(new Image(), {src: 'http://a.test/'}))")
        assert len(await page.run(VIOLATIONS)) == 1
