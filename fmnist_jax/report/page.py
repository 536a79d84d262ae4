"""The look of the pages that this library writes, each one a file that needs no other."""

import base64
import html
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

INK, GRID = "#1f2937", "#e5e7eb"

# For matplotlib's rc_context.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
}

CSS = """
:root { --ink: #1f2937; --soft: #5b6472; --line: #e5e7eb; --card: #fff; --page: #f6f7f9;
  --accent: #2563eb; --bad: #b91c1c; --bad-soft: #fee2e2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .9rem; }
p { margin: .3rem 0 0; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .8rem;
  padding: 1.2rem; margin-top: 1.2rem; overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .8rem;
  margin-top: 1.4rem; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: .8rem;
  padding: .8rem 1rem; }
.figure b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em; }
.figure span { color: var(--soft); font-size: .85rem; }
.figure.main b { color: var(--accent); }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
/* On a phone, pictures with small print scroll sideways rather than shrink. */
img.wide { min-width: 32rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
.facts th, .facts td { text-align: left; vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.warning { background: var(--bad-soft); color: var(--bad); border: 1px solid var(--bad);
  border-radius: .8rem; padding: .8rem 1rem; margin-bottom: 1.4rem; font-weight: 600; }
"""


def page(title: str, parts: Iterable[str], *, css: str = "") -> str:
    """The whole page.

    Args:
      title: as the browser shows it.
      parts: HTML of the body from top to bottom; empty ones are left out.
      css: added to `CSS`.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}{css}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A card with a heading; `content` is HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def figures(values: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers side by side, each of a kind ("main" or ""), the number, and what it is."""
    cards = [
        f'<div class="figure {kind}"><b>{value}</b><span>{name}</span></div>'
        for kind, value, name in values
    ]
    return "\n".join(['<div class="figures">', *cards, "</div>"])


def facts(values: dict[str, str]) -> str:
    """A table of names and texts."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="facts">{rows}</table>'


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, the first column on the left and the others on the right.

    Example:
      >>> table(["class", "images"], [["<Bag>", "1,000"]]).count("&lt;Bag&gt;")
      1
    """
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def image(png: bytes, alt: str, kind: str = "") -> str:
    """A picture inside the page; `kind` is "wide" for one with small print."""
    code = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{code}">'


def thumbnail(pixels: np.ndarray) -> bytes:
    """PNG of one image of the data, uint8[height, width], dark on white."""
    buffer = io.BytesIO()
    Image.fromarray(255 - pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()
