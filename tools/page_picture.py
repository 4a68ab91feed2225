"""Makes the moving picture of the page for the README, from a service that runs.

    make serve
    python -m tools.page_picture [http://localhost:8000]

It needs chromium and chromedriver. An answer of the demo checkpoint is replayed a few tokens at a
time, and each moment is a frame of docs/images/page.gif; docs/images/page.png is one of them.
"""

import asyncio
import io
import sys
from pathlib import Path

from PIL import Image

from tests.support.browser import Page, open_browser

IMAGES = Path(__file__).parents[1] / "docs/images"
WIDTH, HEIGHT = 1120, 830
PROMPT = "Write a paragraph about rain."
LINK = "#mode=prompt&a.gen_length=96&a.temperature=0"
TOKENS_PER_FRAME = 2
FRAME_MILLISECONDS = 110
LAST_MILLISECONDS = 4000
COLOURS = 64
#: The frame of the still picture, as a share of all.
STILL = 0.45

SCRUB = """
  const scrubber = document.querySelector(".scrubber");
  scrubber.value = arguments[0];
  scrubber.dispatchEvent(new Event("input", {bubbles: true}));
"""


async def frames(page: Page, url: str) -> list[Image.Image]:
    """Pictures of the first visit, and then of an answer from its masks to its words."""
    await page.show_as(width=WIDTH, height=HEIGHT, still=True)
    await page.open(f"{url}/{LINK}")
    await page.until("document.querySelectorAll('#examples button').length > 0")
    await page.run("document.getElementById('prompt').value = arguments[0]", PROMPT)
    taken = [await picture(page)]
    await page.run("document.getElementById('start').click()")
    await page.until("document.querySelector('.over') !== null")
    last = int(await page.run("return document.querySelector('.scrubber').max"))
    for count in [*range(0, last, TOKENS_PER_FRAME), last]:
        await page.run(SCRUB, count)
        taken.append(await picture(page))
    return taken


async def picture(page: Page) -> Image.Image:
    """What is seen now."""
    return Image.open(io.BytesIO(await page.screenshot())).convert("RGB")


async def main(url: str) -> None:
    """Write both files."""
    async with open_browser() as page:
        taken = await frames(page, url)
    IMAGES.mkdir(exist_ok=True)
    taken[int(STILL * len(taken))].save(IMAGES / "page.png", optimize=True)
    palette = taken[len(taken) // 2].quantize(COLOURS, dither=Image.Dither.NONE)
    first, *others = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in taken]
    shown = [LAST_MILLISECONDS // 3, *[FRAME_MILLISECONDS] * (len(others) - 1), LAST_MILLISECONDS]
    gif = IMAGES / "page.gif"
    first.save(gif, save_all=True, append_images=others, duration=shown, loop=0, optimize=True)
    print(f"{gif}: {len(taken)} frames, {gif.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"))
