"""The page on which one watches a text being denoised, in a real browser where there is one."""

import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from adapter_fakes import (
    HANG,
    ScriptedEngine,
    denoising,
    fast_settings,
    running_app,
    served_app,
    until,
)
from browser import BROWSER, DRIVER, Page, open_browser

from adapter.errors import InvalidRequest
from adapter.types import Event

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


@pytest.fixture
async def page(url: str) -> AsyncIterator[Page]:
    """The page, opened."""
    async with open_browser() as opened:
        await opened.open(url)
        yield opened


async def fill(page: Page, **fields: Any) -> None:
    """Fill in the form and press the button."""
    script = """
      for (const [name, value] of Object.entries(arguments[0])) form.elements[name].value = value;
      start.click();
    """
    await page.run(
        f"const form = document.forms[0], start = form.querySelector('#start');{script}", fields
    )


def tokens(attribute: str) -> str:
    """JavaScript for this attribute of every position."""
    return f"return [...document.querySelectorAll('#canvas span')].map((one) => one.{attribute})"


#: JavaScript for what the browser has refused so far because of the policy.
VIOLATIONS = """
  const seen = new ReportingObserver(() => {}, {types: ["csp-violation"], buffered: true});
  seen.observe();
  return seen.takeRecords().map((report) => JSON.stringify(report.body));
"""
STATUS = "document.getElementById('status').textContent"
FINAL = "return document.getElementById('final').textContent"


async def test_page_needs_nothing_from_elsewhere(database_url: str, engine: ScriptedEngine) -> None:
    """Page, script and style come from the adapter; a policy forbids everything else."""
    async with running_app(fast_settings(database_url), engine) as api:
        answer = await api.client.get("/")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        linked = re.findall(r'(?:src|href)="(static/[^"]+)"', answer.text)
        assert len(linked) == 2
        for path in linked:
            assert (await api.client.get(f"/{path}")).status_code == 200
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//", answer.text)


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


async def test_every_call_with_a_body_has_an_example_that_works(
    database_url: str, engine: ScriptedEngine
) -> None:
    """The example that /docs offers can be sent as it is."""
    async with running_app(fast_settings(database_url), engine) as api:
        await until(lambda: api.monitor.state.ok)
        described = (await api.client.get("/openapi.json")).json()
        for path, calls in described["paths"].items():
            if body := calls.get("post", {}).get("requestBody"):
                example = body["content"]["application/json"]["example"]
                answer = await api.client.post(path, json=example)
                assert answer.status_code == 200, (path, answer.text)


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


@needs_browser
async def test_denoising_is_shown_until_the_answer(page: Page, engine: ScriptedEngine) -> None:
    """The fields reach the engine; at the end every token is shown, and the final text."""
    await fill(
        page,
        prompt="hello",
        gen_length="4",
        steps="4",
        block_length="2",
        confidence_threshold="0.9",
        temperature="0.5",
        seed="7",
    )
    await page.until(f"{STATUS}.startsWith('done')")

    assert await page.run(tokens("textContent")) == ["<0>", "<1>", "<2>", "<3>"]
    assert await page.run(FINAL) == "<0><1><2><3>"
    assert await page.run(f"return {STATUS}") == "done (length): 4 tokens in 4 steps, seed 7"
    (request,) = engine.requests
    assert request == {
        "messages": '[{"role": "user", "content": "hello"}]',
        "gen_length": 4,
        "steps": 4,
        "block_length": 2,
        "confidence_threshold": 0.9,
        "temperature": 0.5,
        "seed": 7,
    }


@needs_browser
async def test_half_a_canvas_is_seen_and_can_be_stopped(page: Page, engine: ScriptedEngine) -> None:
    """While the engine works, masks are visible; Stop hangs up, which cancels."""
    engine.scripts = [[*denoising(4)[:2], HANG]]
    await fill(page, prompt="hello")
    await page.until(f"{STATUS}.startsWith('step 2')")

    assert await page.run(tokens("textContent")) == ["<0>", "<1>", "░", "░"]
    assert (await page.run(tokens("className")))[2:] == ["token masked active"] * 2
    assert await page.run(FINAL) == "<0><1>"
    await page.run("document.getElementById('stop').click()")
    await page.until(f"{STATUS} === 'stopped'")
    await until(lambda: engine.closed == 1)


@needs_browser
async def test_text_of_the_model_is_never_markup(page: Page, engine: ScriptedEngine) -> None:
    """Tokens that look like HTML are shown as they are."""
    evil = "<img src=x onerror=alert(1)>"
    last = denoising(1)[0]
    assert last.canvas is not None
    canvas = replace(last.canvas, token_texts=[evil])
    engine.scripts = [[Event(evil, "stop", last.usage, 7, canvas)]]
    await fill(page, prompt="hello")
    await page.until(f"{STATUS}.startsWith('done')")

    assert await page.run(FINAL) == evil
    assert await page.run(tokens("textContent")) == [evil]
    assert await page.run("return document.querySelectorAll('main img').length") == 0


@needs_browser
async def test_refusal_is_shown(page: Page, engine: ScriptedEngine) -> None:
    """The page names the field at fault and says what is wrong."""
    engine.scripts = [[InvalidRequest("steps: must be at least the number of blocks")]]
    await fill(page, prompt="hello")
    await page.until(f"{STATUS} === 'steps: must be at least the number of blocks'")
    await fill(page, gen_length="513")
    await page.until(f"{STATUS}.startsWith('gen_length: ')")
    assert "512" in await page.run(f"return {STATUS}")
