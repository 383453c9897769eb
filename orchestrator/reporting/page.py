"""A static HTML page: no script, no network, light and dark, printable."""

from collections.abc import Iterable, Sequence

from rayprune.orchestrator.reporting.tables import html_table, text

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --muted: #57606a; --line: #d5dae0;
  --card: #f6f8fa; --warning: #fff8e5; --edge: #b7791f;
  --training: #a8480b; --held-out: #1a56b0; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e6e9ed;
  --muted: #a2abb6; --line: #3c444e; --card: #1d2127; --warning: #2b2415; --edge: #d9a441;
  --training: #f0a060; --held-out: #7db0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { margin: 0; font-size: 1.65rem; line-height: 1.25; }
h2 { margin: 2.25rem 0 .4rem; font-size: 1.15rem; } h3 { margin: 1.25rem 0 .3rem; font-size: 1rem; }
p { margin: .35rem 0; } .note, dt, thead th, .exact { color: var(--muted); }
h1, p, dd, .names tbody * { overflow-wrap: anywhere; }
.verdict { font-size: 1.1rem; margin: .5rem 0; }
.warning { margin: .6rem 0; padding: .5rem .9rem; border-left: 4px solid var(--edge);
  background: var(--warning); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0 .75rem; }
dl div { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
dd { margin: 0; }
.large { font-size: 1.35rem; font-weight: 600; line-height: 1.4; white-space: nowrap; }
.exact { font-size: .8rem; }
.drawings { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
  gap: 1rem; margin: .75rem 0; }
figure { margin: 0; max-width: 36rem; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); }
table { border-collapse: collapse; } .wide { width: 100%; } .wide td { white-space: nowrap; }
/* a shade on the side where there is more */
.scroll { overflow-x: auto; background:
  linear-gradient(90deg, var(--page) 40%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(270deg, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) left / .9rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) right / .9rem 100% no-repeat scroll; }
th, td { padding: .2rem 0 .2rem 1.25rem; border-bottom: 1px solid var(--line); text-align: right;
  font-weight: 400; vertical-align: top; }
th:first-child { padding-left: 0; }
th:first-child, .text * { text-align: left; }
pre { margin: .4rem 0; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote { margin: 0; padding: .5rem .9rem; border: 1px solid var(--line); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
@media (max-width: 30rem) { th, td { padding-left: .6rem; } table { font-size: .85rem; } }
@media print { :root { font-size: 12px; } body { max-width: none; padding: 0; font-size: 1rem; }
  h2, h3 { break-after: avoid; } svg, tr, dl div, .warning { break-inside: avoid; }
  dl { grid-template-columns: repeat(4, 1fr); } * { print-color-adjust: exact; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page of these parts; what is text in them is escaped."""
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of a page under a heading; nothing where nothing is in it."""
    inside = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{inside}</section>" if inside else ""


def note(words: object) -> str:
    """A line that explains."""
    return f'<p class="note">{text(words)}</p>'


def drawings(parts: Iterable[str]) -> str:
    """Drawings, beside each other where there is room."""
    inside = "".join(parts)
    return f'<div class="drawings">{inside}</div>' if inside else ""


def wide_table(label: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as wide as the page, which is moved by itself where it is wider, also by keys."""
    table = html_table(label, "wide", columns, rows)
    inside = f'class="scroll" tabindex="0" role="region" aria-label="{text(label)}, whole"'
    return f"<div {inside}>{table}</div>"


def folded(title: str, inside: str) -> str:
    """What only some want to see; `title` says what."""
    return f"<details><summary>{text(title)}</summary>{inside}</details>"


def code(lines: str) -> str:
    """Something to copy."""
    return f"<pre><code>{text(lines)}</code></pre>"
