"""A finished run as HTML for notebooks."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT = 260, 130
_COLORS = {"train": "#2563eb", "val": "#ea7317"}


def describe_run(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """Returns the main figures and the curves of loss and accuracy.

    Args:
      report: the content of report.json.
      history: the lines of metrics.jsonl.

    Example:
      >>> lines = [{"split": "train", "epoch": 1, "loss": 0.5, "accuracy": 0.8}]
      >>> report = dict.fromkeys(["val_accuracy", "test_accuracy", "train_accuracy"], 0.8)
      >>> page = describe_run(report | {"arch": "a", "seed": 0, "sample": False}, lines)
      >>> "80.00%" in page, page.count("<svg")
      (True, 2)
    """
    figures = {
        name.replace("_", " "): "none" if report[name] is None else f"{report[name]:.2%}"
        for name in ("test_accuracy", "val_accuracy", "train_accuracy")
    }
    rows = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in figures.items())
    note = (
        "<p>Trained on the embedded sample; these are no results.</p>" if report["sample"] else ""
    )
    curves = "".join(_curve(history, metric) for metric in ("loss", "accuracy"))
    title = html.escape(f"{report['arch']}, seed {report['seed']}")
    return f"<div><b>{title}</b><table>{rows}</table>{note}{curves}</div>"


def _curve(history: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Draws a metric by epoch as SVG: training blue, validation orange."""
    values = [line[metric] for line in history]
    low, high = min(values), max(values)
    last = max(line["epoch"] for line in history)
    lines = []
    for split, color in _COLORS.items():
        points = " ".join(
            f"{_WIDTH * (line['epoch'] - 1) / max(last - 1, 1):.1f},"
            f"{_HEIGHT * (1 - (line[metric] - low) / ((high - low) or 1)):.1f}"
            for line in history
            if line["split"] == split
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    box = f"-4 -4 {_WIDTH + 8} {_HEIGHT + 8}"
    label = (
        f"{metric} by epoch, {low:.3g} to {high:.3g}: "
        f'<span style="color:{_COLORS["train"]}">training</span>, '
        f'<span style="color:{_COLORS["val"]}">validation</span>'
    )
    return (
        f'<figure style="display:inline-block;margin:4px">'
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="{box}">{"".join(lines)}</svg>'
        f"<figcaption>{label}</figcaption></figure>"
    )
