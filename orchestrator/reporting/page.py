"""A static HTML page: no script, no network, light and dark, printable."""

from collections.abc import Iterable

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --muted: #57606a; --line: #d5dae0;
  --card: #f6f8fa;
  --training: #a8480b; --held-out: #1a56b0; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e6e9ed; --muted:
  #a2abb6; --line: #363d46;
  --card: #1d2127; --training: #f0a060; --held-out: #7db0ff; } }
* { box-sizing: border-box; } p, dt, thead th, .exact { color: var(--muted); }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page); color:
  var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { margin: 0; font-size: 1.65rem; line-height: 1.25; } h2 { margin: 2.25rem 0 .4rem; font-size:
  1.15rem; } p { margin: .35rem 0; }
h1, p, .names tbody * { overflow-wrap: anywhere; } dd { margin: 0; } .exact { font-size: .8rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 .75rem; }
dl div { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 6px; background:
  var(--card); }
.large { font-size: 1.6rem; font-weight: 600; line-height: 1.3; } figure { margin: .75rem 0;
  overflow-x: auto; }
svg { display: block; width: 100%; min-width: 35rem; height: auto; } svg text { fill: var(--muted);
  font-size: 14px; }
svg .name { fill: var(--text); } svg .panel { font-weight: 600; } .end { text-anchor: end; } .middle
  { text-anchor: middle; }
path { fill: none; stroke-width: 1.75; stroke-linejoin: round; } .grid { stroke: var(--line);
  stroke-width: 1; }
.training { stroke: var(--training); stroke-width: 1.5; } path.training { stroke-dasharray: 6 4; }
  circle.training { fill: var(--page); }
.held-out { stroke: var(--held-out); stroke-width: 1.5; } circle.held-out, .bar { fill:
  var(--held-out); }
table { border-collapse: collapse; } .wide { width: 100%; } .wide td { white-space: nowrap; }
th, td { padding: .2rem 0 .2rem 1.25rem; border-bottom: 1px solid var(--line); text-align: right;
  font-weight: 400; }
th:first-child { padding-left: 0; } th:first-child, .wide :nth-child(2), .text * { text-align: left;
  }
@media print { :root { font-size: 12px; } body { max-width: none; padding: 0; font-size: 1rem; } h2
  { break-after: avoid; }
  svg { min-width: 0; } svg, tr { break-inside: avoid; } dl { grid-template-columns: repeat(4, 1fr);
  } * { print-color-adjust: exact; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page of these parts; what is text in them is escaped."""
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )
