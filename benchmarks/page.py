"""A page in a real browser: pictures of it, and what axe finds.

python -m benchmarks.page RUN/report.html --axe node_modules/axe-core/axe.min.js --out shots

Needs `pip install playwright`, `npm install axe-core` and Chromium (Debian's package will do). Ends
with 1 where axe finds something serious, or the page is wider than the window.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

SEEN = {"1280": (1280, "light"), "390": (390, "light"), "dark": (1280, "dark")}
"""Width and colour scheme, by the name of the picture."""
SERIOUS = {"serious", "critical"}


def looked_at(page: Any, axe: str) -> list[str]:
    """What is wrong with a page that is open."""
    too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    found = ["wider than the window"] if page.evaluate(too_wide) else []
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.evaluate(axe)
    return found + [
        f"{rule['id']}: {node['html'][:120]}"
        for rule in page.evaluate("axe.run()")["violations"]
        if rule["impact"] in SERIOUS
        for node in rule["nodes"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--axe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    axe, wrong = options.axe.read_text(), []
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=options.chromium, args=["--no-sandbox"]
        )
        for name, (width, scheme) in SEEN.items():
            size = {"width": width, "height": 900}
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(options.page.absolute().as_uri())
            page.screenshot(path=options.out / f"{name}.png", full_page=True)
            wrong += [f"{name}: {words}" for words in looked_at(page, axe)]
    print("\n".join(wrong) or "axe finds nothing serious")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
