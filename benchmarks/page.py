"""A page in a real browser: what is wrong with it, and pictures of it.

python -m benchmarks.page RUN/report.html --out docs/images --height 1100

Needs `pip install "rayprune[browser]"` and Chromium (Debian's package `chromium`). Ends with 1
where axe finds something serious, the page is wider than window or paper, or asks for a file.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

SEEN = {"1280": (1280, "light"), "390": (390, "light"), "dark": (1280, "dark")}
"""Width in pixels and colour scheme, by the name of the picture."""
SERIOUS = {"serious", "critical"}
PAPER = 718
"""Pixels of 1/96 inch between the margins of A4."""
TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
UNFOLD = "document.querySelectorAll('details').forEach(each => each.open = true)"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def chromium() -> str | None:
    """The command of Chromium, where there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # its sandbox refuses root; the pages are our own
        yield playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])


def opened(browser: Any, file: Path, seen: str, height: int = 900) -> tuple[Any, list[str]]:
    """A page, and what it asks for beside itself, and says on the console, from then on."""
    width, scheme = SEEN[seen]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    address, heard = file.absolute().as_uri(), list[str]()
    page.on("console", lambda message: heard.append(message.text))
    page.on("request", lambda asked: heard.append(asked.url) if asked.url != address else None)
    page.goto(address)
    return page, heard


def wrong_with(page: Any) -> list[str]:
    """What is wrong with a page that is open, with all that is folded, and on paper."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(UNFOLD)
    found = ["wider than the window"] if page.evaluate(TOO_WIDE) else []
    found += [
        f"{rule['id']}: {node['html'][:120]}"
        for rule in Axe().run(page).response["violations"]
        if rule["impact"] in SERIOUS
        for node in rule["nodes"]
    ]
    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER, "height": 900})
    found += ["wider than paper"] if page.evaluate(TOO_WIDE) else []
    if (colour := page.evaluate(BACKGROUND)) != "rgb(255, 255, 255)":
        found.append(f"printed on {colour}")
    return found


def take_picture(page: Any, file: Path, whole: bool) -> None:
    """Write what is in the window, or the whole page, as WebP."""
    from PIL import Image

    shot = Image.open(BytesIO(page.screenshot(full_page=whole)))
    shot.convert("RGB").save(file, lossless=True, method=6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--height", type=int, help="pixels from the top; default: the whole page")
    options = parser.parse_args()
    wrong = []
    options.out.mkdir(parents=True, exist_ok=True)
    with browser() as started:
        for seen in SEEN:
            page, heard = opened(started, options.page, seen, options.height or 900)
            file = options.out / f"{options.page.stem}-{seen}.webp"
            take_picture(page, file, whole=options.height is None)
            print(f"{file}: {file.stat().st_size / 1000:,.0f} kB")
            wrong += [f"{seen}: {words}" for words in (*wrong_with(page), *heard)]
    print("\n".join(wrong) or "axe finds nothing serious")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
