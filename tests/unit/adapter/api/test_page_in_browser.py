"""The page in a real browser, where one is installed: one server and one browser for all tests."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from adapter_fakes import (
    HANG,
    MODEL,
    ScriptedEngine,
    denoising,
    fast_settings,
    served_app,
    until,
)

from adapter.errors import InvalidRequest
from adapter.types import Event
from tests.support.browser import BROWSER, DRIVER, VIOLATIONS, Page, open_browser
from tests.support.registries import node_packages

pytestmark = [
    pytest.mark.skipif(
        DRIVER is None or BROWSER is None, reason="no chromium with chromedriver on this machine"
    ),
    pytest.mark.asyncio(loop_scope="module"),
]

ENGINE = ScriptedEngine([list(denoising(4))])
MASK = MODEL.mask_token_id

#: JavaScript: all elements that match, and whether an answer has ended.
ALL = "const all = (css) => [...document.querySelectorAll(css)];"
OVER = "document.querySelectorAll('.thread:not([hidden]) .over').length === {}"


def sure(*confidence: float, reason: str = "length") -> Event:
    """The only event of a canvas whose positions were committed with these probabilities."""
    (*_, last) = denoising(len(confidence))
    assert last.canvas is not None
    return replace(
        last, finish_reason=reason, canvas=replace(last.canvas, confidence=list(confidence))
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A worker that is ready."""
    database = tmp_path_factory.mktemp("page") / "jobs.db"
    settings = fast_settings(f"sqlite:///{database}", engine_idle_timeout=60)
    async with served_app(settings, ENGINE) as address:
        await until_healthy(address)
        yield address


async def until_healthy(address: str) -> None:
    """Wait for the worker's first look at the engine."""
    async with httpx.AsyncClient() as http, asyncio.timeout(10):
        while (await http.get(f"{address}/v1/health")).status_code != 200:
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Page]:
    """A browser."""
    async with open_browser() as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Page, url: str) -> AsyncIterator[Page]:
    """The page as a first visitor sees it, who asks for no motion; it may break no policy."""
    ENGINE.scripts = [list(denoising(4))]
    ENGINE.requests.clear()
    ENGINE.cancels.clear()
    await browser.show_as(still=True)
    await visit(browser, url)
    if await browser.run("return localStorage.length + sessionStorage.length"):
        await browser.run("localStorage.clear(); sessionStorage.clear()")
        await visit(browser, url)
    yield browser
    assert await browser.run(VIOLATIONS) == []


async def visit(page: Page, address: str) -> None:
    """Open the address as a new visit, and wait until the model is known."""
    await page.open("about:blank")
    await page.open(address)
    await page.until("document.querySelectorAll('#examples button').length > 0")


async def choose(page: Page, mode: str) -> None:
    """Choose what to do."""
    await page.run("document.querySelector(`[name=mode][value=${arguments[0]}]`).click()", mode)


async def fill(page: Page, prompt: str, side: str = "a", **fields: Any) -> None:
    """Fill in the prompt and fields of one side."""
    script = """
      const set = (id, value) => {
        const control = document.getElementById(id);
        control.value = value;
        control.dispatchEvent(new Event("input", {bubbles: true}));
      };
      set("prompt", arguments[0]);
      for (const [name, value] of Object.entries(arguments[2])) {
        set(`${arguments[1]}-${name}`, value);
      }
    """
    await page.run(script, prompt, side, fields)


async def enter_key(page: Page) -> None:
    """Fill in the API key."""
    await page.run(
        "const key = document.getElementById('key'); key.value = 'geheim';"
        "key.dispatchEvent(new Event('change', {bubbles: true}))"
    )


async def start(page: Page) -> None:
    """Press the button."""
    await page.run("document.getElementById('start').click()")


async def ask(page: Page, prompt: str = "hello", answers: int = 1, **fields: Any) -> None:
    """Fill in the form, start, and wait until there are so many answers."""
    await fill(page, prompt, **fields)
    await start(page)
    await page.until(OVER.format(answers))


async def ask_step_by_step(page: Page, **fields: Any) -> None:
    """Do the same with an engine that waits until each of its four steps is seen."""
    events, gates = denoising(4), [asyncio.Event() for _ in range(3)]
    ENGINE.scripts = [[events[0], gates[0], events[1], gates[1], events[2], gates[2], events[3]]]
    await fill(page, "hello", **fields)
    await start(page)
    for count, gate in enumerate(gates, start=1):
        seen = f"startsWith('{count} of 4')"
        await page.until(f"document.querySelector('.numbers')?.textContent.{seen}")
        gate.set()
    await page.until(OVER.format(1))


async def click(page: Page, css: str, text: str = "") -> None:
    """Click the first element that matches and has this text."""
    await page.run(
        ALL + "all(arguments[0]).find((one) => one.textContent.includes(arguments[1])).click()",
        css,
        text,
    )


async def texts(page: Page, css: str) -> list[str]:
    """Text of each visible element that matches."""
    found: list[str] = await page.run(
        ALL + "return all(arguments[0]).filter((one) => one.checkVisibility())"
        ".map((one) => one.textContent)",
        css,
    )
    return found


async def kinds(page: Page) -> str:
    """First letters of the positions' kinds: mask, word, special, given."""
    classes: Sequence[str] = await page.run(
        ALL + "return all('.canvas .token').map((one) => one.classList[1][0])"
    )
    return "".join(classes)


async def test_denoising_is_shown_until_the_answer(page: Page) -> None:
    """The fields reach the engine; at the end there are tokens, numbers, and words for readers."""
    fields = {"gen_length": "4", "confidence_threshold": ".9", "seed": "9007199254740993"}
    await ask(page, **fields, stop="end\nstop now", raw="false", remasking="margin")

    assert await texts(page, ".canvas .token") == ["<0>", "<1>", "<2>", "<3>"]
    (numbers,) = await texts(page, ".numbers")
    assert numbers.startswith("4 of 4 tokens4 steps")
    assert numbers.endswith("1.00 passes per token")
    assert await texts(page, ".state") == [
        "canvas full · 3 prompt tokens, 2 of them cached · seed 7"
    ]
    assert await texts(page, "#announcer") == ["Answer: <0><1><2><3>"]
    assert ENGINE.requests == [
        {
            "messages": '[{"role": "user", "content": "hello"}]',
            "gen_length": 4,
            "confidence_threshold": 0.9,
            "seed": 9007199254740993,
            "temperature": 0.0,
            "stop": ["end", "stop now"],
            "remasking": "margin",
        }
    ]


async def test_the_model_is_introduced_with_prompts_to_try(page: Page) -> None:
    """Its name, family and sizes are there; a click on a prompt asks it."""
    assert await texts(page, "#model") == ["demo_checkpoint"]
    assert await texts(page, "#facts") == ["LLaDA · 1.1M parameters · context of 512 tokens"]
    assert "capitals" in (await texts(page, "#about"))[0]
    await click(page, "#examples button", "capital of France")
    await page.until(OVER.format(1))
    assert "What is the capital of France?" in str(ENGINE.requests[0]["messages"])
    assert await texts(page, "#model") == []


async def test_half_a_canvas_is_seen_and_can_be_stopped(page: Page) -> None:
    """While the engine works, masks are visible; Escape hangs up, and the masks left go."""
    ENGINE.scripts = [[*denoising(4)[:2], HANG]]
    closed = ENGINE.closed
    await fill(page, "hello")
    await page.run("document.getElementById('prompt').focus()")
    await page.press("Control+Enter")
    await page.until("document.querySelector('.numbers').textContent.startsWith('2 of 4')")

    assert await kinds(page) == "wwmm"
    assert await texts(page, ".canvas .mask.active") == ["", ""]
    await page.press("Escape")
    await page.until(OVER.format(1))
    await until(lambda: ENGINE.closed == closed + 1)
    assert await texts(page, ".state") == ["stopped"]
    assert await texts(page, ".canvas .token") == ["<0>", "<1>"]


async def test_certainty_has_a_shape_and_a_colour(page: Page) -> None:
    """Sure, fairly sure and unsure words differ in the style of their line, not only in colour."""
    ENGINE.scripts = [[sure(0.95, 0.7, 0.2)]]
    await ask(page)
    looks = await page.run(
        ALL + "return all('.canvas .token').map((one) => getComputedStyle(one))"
        ".map((look) => [look.textDecorationStyle, look.textDecorationColor])"
    )
    assert [style for style, _ in looks] == ["solid", "dashed", "wavy"]
    assert len({colour for _, colour in looks}) == 3
    await page.run("document.querySelector('.canvas').focus()")
    await page.press("Right", "Right")
    (detail,) = await texts(page, ".detail")
    assert detail == "Position 3: “<2>”, token 102, committed in step 3 at 20.0% (unsure)"


async def test_each_mode_runs_by_itself(page: Page) -> None:
    """While an answer is written, another mode can be used; Stop is there where the answer is."""
    ENGINE.scripts = [[*denoising(4)[:2], HANG], list(denoising(4))]
    await fill(page, "one")
    await start(page)
    await page.until("document.querySelector('.numbers')?.textContent.startsWith('2 of 4')")
    await choose(page, "chat")
    await ask(page, "two")
    await choose(page, "jobs")
    assert await texts(page, "#stop, #start") == ["Submit"]
    await choose(page, "prompt")
    assert await texts(page, "#stop, #start") == ["Stop Esc"]
    await click(page, "#stop")
    await page.until(OVER.format(1))
    assert await texts(page, ".state") == ["stopped"]


async def test_the_focus_stays_on_the_button_that_starts_and_stops(page: Page) -> None:
    """Both are one place for the keyboard: neither leaves the focus nowhere."""
    ENGINE.scripts = [[*denoising(4)[:2], HANG]]
    await fill(page, "hello")
    await page.run("document.getElementById('start').focus()")
    await page.press("Enter")
    await page.until("document.querySelector('.numbers')?.textContent.startsWith('2 of 4')")
    assert await page.run("return document.activeElement.id") == "stop"
    await page.press("Enter")
    await page.until(OVER.format(1))
    await page.until("document.activeElement.id === 'start'")


async def test_text_of_the_model_is_never_markup(page: Page) -> None:
    """Tokens that look like HTML are shown as they are."""
    evil = "<img src=x onerror=alert(1)>"
    last = sure(0.9)
    assert last.canvas is not None
    ENGINE.scripts = [[replace(last, text=evil, canvas=replace(last.canvas, token_texts=[evil]))]]
    await ask(page, "<b>bold</b>")
    assert await texts(page, ".canvas .token") == [evil]
    assert await texts(page, ".asked") == ["You asked: <b>bold</b>"]
    assert await page.run("return document.querySelectorAll('main img, main b b').length") == 0


async def test_errors_stand_beside_the_field_they_name(page: Page) -> None:
    """The field is marked, described by the error, focused, unfolded; the next try clears it."""
    await page.show_as(width=390, height=700, still=True)
    ENGINE.scripts = [[InvalidRequest("pool_kernel: must be odd")]]
    await fill(page, "hello", pool_kernel="4")
    await start(page)
    await page.until("document.getElementById('a-pool_kernel-error').checkVisibility()")
    assert await texts(page, ".error:not(:empty)") == ["must be odd"]
    field = await page.run(
        "const one = document.activeElement;"
        "return [one.id, one.getAttribute('aria-invalid'), one.getAttribute('aria-describedby')]"
    )
    assert field[:2] == ["a-pool_kernel", "true"]
    seen = "const {top, bottom} = document.activeElement.getBoundingClientRect();"
    assert await page.run(f"{seen} return 0 < top && bottom < innerHeight")
    assert "a-pool_kernel-error" in field[2]
    assert await texts(page, ".turn") == []

    await fill(page, "hello", gen_length="513", pool_kernel="")
    await start(page)
    await page.until("document.getElementById('a-gen_length-error').checkVisibility()")
    assert "512" in (await texts(page, "#a-gen_length-error"))[0]
    assert await texts(page, "#a-pool_kernel-error") == []
    await fill(page, " ", gen_length="")
    await start(page)
    assert await texts(page, "#prompt-error") == ["write something first"]
    ENGINE.scripts = [[InvalidRequest("no such thing")]]
    await fill(page, "hello")
    await start(page)
    await page.until("document.getElementById('problem').checkVisibility()")
    assert await texts(page, ".error:not(:empty)") == ["no such thing"]


async def test_chat_sends_all_turns_and_prompts_none(page: Page) -> None:
    """A chat goes on where it stopped, until a new one; single prompts stand alone."""

    def roles() -> list[tuple[str, str]]:
        messages = json.loads(str(ENGINE.requests[-1]["messages"]))
        return [(message["role"], message["content"]) for message in messages]

    first = [("user", "one"), ("assistant", "<0><1><2><3>"), ("user", "two")]
    await choose(page, "chat")
    await ask(page, "one")
    await ask(page, "two", answers=2)
    assert roles() == first
    await click(page, "#clear", "New chat")
    await ask(page, "three")
    assert roles() == [("user", "three")]
    await choose(page, "prompt")
    await ask(page, "four")
    await ask(page, "five", answers=2)
    assert roles() == [("user", "five")]


async def test_an_answer_is_replayed(page: Page) -> None:
    """The scrubber shows any moment, the buttons go step by step, and playing ends at the end."""
    await ask_step_by_step(page)
    scrub = """
      const scrubber = document.querySelector(".scrubber");
      scrubber.value = 1;
      scrubber.dispatchEvent(new Event("input", {bubbles: true}));
      return [scrubber.max, scrubber.getAttribute("aria-valuetext")];
    """
    assert await page.run(scrub) == ["4", "step 1, 1 of 4 tokens"]
    assert await kinds(page) == "wmmm"
    await click(page, "[title='One step on']")
    await click(page, "[title='One step on']")
    assert await kinds(page) == "wwwm"
    await click(page, "[title='One step back']")
    assert await kinds(page) == "wwmm"
    await page.run(
        "const speed = document.querySelector('.player select');"
        "speed.value = '8 steps a second'; speed.dispatchEvent(new Event('change'))"
    )
    await click(page, "[title='Play']")
    await page.until("document.querySelector('[title=Pause]') !== null")
    await page.until("document.querySelector('[title=Play]') !== null")
    assert await kinds(page) == "wwww"


async def test_two_settings_stand_side_by_side(page: Page) -> None:
    """Each answer has its own settings; an error goes to its side; both are replayed together."""
    await choose(page, "pair")
    await fill(page, "hello", side="b", top_k="5", confidence_threshold="")
    await ask(page, answers=2, top_k="", gen_length="4")
    assert [request.get("top_k") for request in ENGINE.requests] == [None, 5]
    titles = await texts(page, ".answer h2")
    assert [title[0] for title in titles] == ["A", "B"]
    assert "top_k 5" in titles[1]
    await click(page, ".both")
    await page.until("document.querySelectorAll('[title=Pause]').length === 2")
    await page.until("document.querySelectorAll('[title=Play]').length === 2")
    await fill(page, "hello", side="b", top_k="0")
    await start(page)
    await page.until("document.getElementById('b-top_k-error').checkVisibility()")


async def test_kept_words_are_fixed_when_the_rest_is_redone(page: Page) -> None:
    """Selected tokens return as `canvas_ids`, with the mask elsewhere, and are shown as given."""
    await ask(page)
    await page.run("document.querySelector('.canvas').focus()")
    await page.press("Right", "Space", "Right", "Right", "Space")
    await page.run("document.activeElement.blur()")
    ENGINE.scripts = [denoising(4, given={1: 101, 3: 103})]
    await click(page, ".redo", "Keep these 2 tokens")
    await page.until(OVER.format(2))
    assert ENGINE.requests[1]["canvas_ids"] == [MASK, 101, MASK, 103]
    assert ENGINE.requests[1]["gen_length"] == 4
    assert (await kinds(page))[4:] == "wgwg"


async def test_every_published_field_can_be_set(page: Page, url: str) -> None:
    """The form has the fields of the OpenAPI document under their names, and no others."""
    async with httpx.AsyncClient() as http:
        described = (await http.get(f"{url}/openapi.json")).json()
    published = described["components"]["schemas"]["GenerateRequest"]["properties"]
    named = await page.run(ALL + "return all('[id^=a-][name]').map((one) => one.name)")
    assert sorted(named) == sorted(published.keys() - {"prompt", "messages", "input_ids"})
    choices = await page.run(ALL + "return all('#a-cache option').map((one) => one.value)")
    assert choices == ["", *published["cache"]["examples"]]
    assert "dual" in choices


async def test_a_link_holds_the_settings_and_never_the_key(page: Page) -> None:
    """The address has mode, prompt and settings; opening it brings them back."""
    await choose(page, "pair")
    await fill(page, "what & why?", side="b", top_p="0.5")
    await enter_key(page)
    await fill(page, "what & why?", stop="x\ny")
    await page.until("location.hash.includes('a.stop=x')")
    address = await page.run("return location.href")
    assert "geheim" not in address
    await visit(page, address)
    controls = "['prompt', 'b-top_p', 'a-stop', 'a-top_p']"
    read = f"return {controls}.map((id) => document.getElementById(id).value)"
    assert await page.run(read) == ["what & why?", "0.5", "x\ny", ""]
    assert await page.run("return document.body.dataset.mode") == "pair"


async def test_an_answer_is_copied_linked_and_exported(page: Page, tmp_path: Path) -> None:
    """The text, a link that repeats it, and a file with each step."""
    await page.grant("clipboardReadWrite")
    await page.download_to(tmp_path)
    await ask_step_by_step(page, top_k="3")
    await click(page, ".actions button", "Copy text")
    await page.until("document.querySelector('#announcer').textContent === 'Copied'")
    assert await page.resolved("navigator.clipboard.readText()") == "<0><1><2><3>"
    await page.run("document.querySelector('#announcer').textContent = ''")
    await click(page, ".actions button", "Copy link")
    await page.until("document.querySelector('#announcer').textContent === 'Copied'")
    link = await page.resolved("navigator.clipboard.readText()")
    assert "a.seed=7" in link
    assert "a.top_k=3" in link
    await click(page, ".actions button", "Export JSON")
    file = tmp_path / "denoising-7.json"
    await until(file.exists)
    held = json.loads(file.read_text())
    assert held["request"]["top_k"] == 3
    assert [step["committed"][0]["text"] for step in held["steps"]] == ["<0>", "<1>", "<2>", "<3>"]
    assert held["answer"]["text"] == "<0><1><2><3>"


async def test_jobs_are_listed_cancelled_and_kept(page: Page, url: str) -> None:
    """Jobs show state and text, also in the next visit; a running one can be cancelled."""
    ENGINE.scripts = [list(denoising(4)), list(denoising(4)), [HANG]]
    await choose(page, "jobs")
    await page.run("document.getElementById('lines').checked = true")
    await fill(page, "one\n\ntwo")
    await start(page)
    await page.until("document.querySelectorAll('.job[data-status=finished]').length === 2")
    assert await texts(page, ".job-prompt") == ["two", "one"]
    assert await texts(page, ".job-text") == ["<0><1><2><3>"] * 2
    await fill(page, "three")
    await start(page)
    await page.until("document.querySelectorAll('.job[data-status=running]').length === 1")
    await click(page, ".job button", "Cancel")
    await page.until("document.querySelectorAll('.job[data-status=cancelled]').length === 1")
    await visit(page, f"{url}/#mode=jobs")
    assert await texts(page, ".badge") == ["– cancelled", "✓ finished", "✓ finished"]
    await click(page, ".job[data-status=finished] button", "Show")
    await page.until("document.querySelector('.job-text') !== null")
    await click(page, "button", "Forget finished jobs")
    await page.until("document.querySelectorAll('.job').length === 0")


async def test_what_the_browser_stores_breaks_no_list(page: Page, url: str) -> None:
    """Jobs are listed though no room is left for them, and though others have stored something."""
    await choose(page, "jobs")
    await page.run("localStorage.setItem('other', 'x'.repeat(5 * 2 ** 20 - 60))")
    await fill(page, "one " * 40)
    await start(page)
    await page.until("document.querySelectorAll('.job[data-status=finished]').length === 1")
    assert await page.run("return document.getElementById('prompt').value") == ""
    assert "no room for more jobs" in (await texts(page, "#problem"))[0]
    job_id = int((await texts(page, ".job-id"))[0].removeprefix("job "))

    unseen = {"id": job_id, "prompt": "old", "created": 0, "status": "expired"}
    odd = [None, 5, {"id": 1}, unseen | {"created": 1e99}, unseen | {"id": "../models"}]
    store = "localStorage.clear(); localStorage.setItem('dllm.jobs', arguments[0])"
    await page.run(store, json.dumps([*odd, unseen]))
    await visit(page, f"{url}/#mode=jobs")
    assert await texts(page, ".badge") == ["– expired"]
    await click(page, ".job button", "Look again")
    await page.until("document.querySelectorAll('.job[data-status=finished]').length === 1")


async def test_keys_are_asked_for_where_they_are_needed(page: Page, tmp_path: Path) -> None:
    """Without one the error stands beside its field; with one everything works, for this tab."""
    assert await texts(page, "#key-row") == []
    keys = {"api_keys": f"me:{hashlib.sha256(b'geheim').hexdigest()}"}
    settings = fast_settings(f"sqlite:///{tmp_path}/jobs.db", engine_idle_timeout=60, **keys)
    async with served_app(settings, ScriptedEngine([list(denoising(4))])) as address:
        await until_healthy(address)
        await page.open(address)
        await page.until("document.getElementById('key').checkVisibility()")
        await page.until("document.getElementById('about').textContent.includes('API key')")
        await fill(page, "hello")
        await start(page)
        await page.until("document.getElementById('key-error').checkVisibility()")
        assert await page.run("return document.activeElement.id") == "key"
        await enter_key(page)
        await page.until("document.getElementById('model').textContent === 'demo_checkpoint'")
        await ask(page)
        assert await page.run("return Object.keys(localStorage).length") == 0

        forgotten = {"id": 999, "prompt": "old", "created": 0, "status": "running"}
        remember = "localStorage.setItem('dllm.jobs', arguments[0]); sessionStorage.clear()"
        await page.run(remember, json.dumps([forgotten]))
        await page.open("about:blank")
        await page.open(f"{address}/#mode=jobs")
        await page.until("document.getElementById('key-error').checkVisibility()")
        await enter_key(page)
        await page.until("document.querySelectorAll('.job[data-status=expired]').length === 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_borders_of_controls_can_be_seen(page: Page, scheme: str) -> None:
    """What shows a control, or a mask, has a contrast of 3:1 with what is around (WCAG 1.4.11)."""
    await page.show_as(scheme=scheme, still=True)
    ENGINE.scripts = [[*denoising(4)[:2], HANG]]
    await fill(page, "hello")
    await start(page)
    await page.until("document.querySelectorAll('.token.mask').length > 2")
    script = """
      const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
      const light = (colour) => {
        const [r, g, b] = numbers(colour).map((c) => c / 255)
          .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = (one) => {
        for (let up = one.parentElement; up; up = up.parentElement) {
          const colour = getComputedStyle(up).backgroundColor;
          if (numbers(colour)[3] !== 0) return colour;
        }
      };
      const controls = all(
        "button:not(.primary), input[type=text], select, #composer, .token.mask, progress");
      return controls.filter((one) => one.checkVisibility()).map((one) => {
        const [a, b] = [light(getComputedStyle(one).borderTopColor), light(behind(one))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 80)];
      });
    """
    contrasts = await page.run(ALL + script)
    assert len(contrasts) > 10
    assert min(contrasts)[0] >= 3, min(contrasts)
    await page.press("Escape")


async def test_nothing_moves_where_stillness_is_asked_for(page: Page) -> None:
    """With `prefers-reduced-motion`, no animation runs while a canvas is denoised."""
    ENGINE.scripts = [[*denoising(4)[:2], HANG]]
    await fill(page, "hello")
    await start(page)
    await page.until("document.querySelectorAll('.token.mask').length > 1")
    assert await page.run("return document.getAnimations().length") == 0
    await page.show_as(still=False)
    await page.until("document.getAnimations().length > 0")
    await page.press("Escape")


@pytest.mark.parametrize(
    "mode", ["prompt", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("pair", "jobs"))]
)
async def test_a_phone_needs_no_scrolling_sideways(page: Page, mode: str) -> None:
    """At 320 pixels everything fits the width (WCAG 1.4.10)."""
    await page.show_as(width=320, height=640, still=True)
    await choose(page, mode)
    await page.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    if mode != "jobs":
        await ask(page, "a prompt", answers=2 if mode == "pair" else 1)
    assert await page.run("return document.documentElement.scrollWidth") <= 320


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    """The source of axe-core, which checks pages for accessibility."""
    folder = node_packages(pytestconfig, Path(__file__).parents[3] / "page/package.json")
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
async def test_axe_finds_no_violation(page: Page, axe: str, scheme: str, width: int) -> None:
    """In every state, the page meets what axe can check of WCAG 2.2 AA, and its best practices."""
    await page.show_as(width=width, scheme=scheme, still=True)
    await page.run(f"{axe}; window.axe = axe")
    check = """axe.run(document, {resultTypes: ["violations"]}).then(({violations}) =>
      violations.flatMap(({id, nodes}) => nodes.map((one) => [id, one.html, one.any])))"""

    async def check_state(state: str) -> None:
        assert await page.resolved(check) == [], state

    await check_state("empty")
    ENGINE.scripts = [[*denoising(4)[:2], HANG]]
    await fill(page, "hello")
    await start(page)
    await page.until("document.querySelectorAll('.token.mask').length > 1")
    await check_state("streaming")
    await page.press("Escape")
    await page.until(OVER.format(1))
    await check_state("stopped")
    ENGINE.scripts = [[sure(0.95, 0.7, 0.2, 0.95)]]
    await ask(page, answers=2)
    await page.run("document.querySelectorAll('.canvas .token')[3].click()")
    await check_state("finished, with a word kept")
    await click(page, "[title='One step back']")
    await check_state("replay")
    await choose(page, "pair")
    await ask(page, answers=2)
    await check_state("side by side")
    await page.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    await fill(page, "hello", pool_kernel="x", gen_length="0")
    await start(page)
    await page.until("document.getElementById('a-gen_length-error').checkVisibility()")
    await check_state("errors")
    ENGINE.scripts = [[HANG]]
    await choose(page, "jobs")
    await check_state("no jobs")
    await fill(page, "one", pool_kernel="", gen_length="")
    await start(page)
    await page.until("document.querySelectorAll('.job[data-status=running]').length === 1")
    await check_state("a running job")
    await click(page, ".job button", "Cancel")
    await page.until("document.querySelectorAll('.job[data-status=cancelled]').length === 1")
    await check_state("a cancelled job")
    await page.run("document.getElementById('key-row').hidden = false")
    await check_state("a key is needed")
