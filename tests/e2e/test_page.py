"""The page at / over the whole service, in a real browser, where one is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import BROWSER, DRIVER, open_browser
from tests.support.servers import REPOSITORY, AdapterServer, triton_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DRIVER is None or BROWSER is None, reason="no chromium with chromedriver on this machine"
    ),
]

DEMO = REPOSITORY / "dllm/1/demo_checkpoint"
TEXT = "return document.querySelector('.turn:last-child .canvas').textContent"


async def test_every_prompt_to_try_is_answered_and_words_can_be_kept(tmp_path: Path) -> None:
    """The demo checkpoint answers what the page offers; kept words stay where they were."""
    with (
        triton_server(DEMO, log_file=tmp_path / "triton.log") as triton,
        AdapterServer(triton, tmp_path / "jobs.db") as adapter,
    ):
        async with open_browser() as page:
            await page.show_as(still=True)
            await page.open(adapter.url)
            offered = "[...document.querySelectorAll('#examples button')]"
            await page.until(f"{offered}.length > 5")
            prompts = await page.run(f"return {offered}.map((one) => one.textContent)")
            answers = {}
            for count, prompt in enumerate(prompts, start=1):
                await page.run(
                    f"document.querySelectorAll('#examples button')[{count - 1}].click()"
                )
                await page.until(f"document.querySelectorAll('.over').length === {count}", 60)
                answers[prompt] = (await page.run(TEXT)).rstrip("·")
            assert answers["What is 17 + 25?"] == "42"
            assert "Paris" in answers["What is the capital of France?"]
            assert all(answers.values())

            words = "document.querySelectorAll('.turn:last-child .token.word')"
            await page.run(f"for (const i of [1, 3]) {words}[i].click()")
            kept = await page.run(f"return [1, 3].map((i) => {words}[i].textContent)")
            await page.run("document.querySelector('.turn:last-child .redo').click()")
            await page.until(f"document.querySelectorAll('.over').length === {count + 1}", 60)
            given = "[...document.querySelectorAll('.turn:last-child .token.given')]"
            assert await page.run(f"return {given}.map((one) => one.textContent)") == kept
            assert await page.run(TEXT)
