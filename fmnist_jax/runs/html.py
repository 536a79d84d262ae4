"""A finished run as HTML for notebooks."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fmnist_jax.config import short_name
from fmnist_jax.nn.summary import format_rows


def render_result(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """Returns the accuracies, the learning curves and the layers of a run.

    Args:
      report: the content of report.json.
      history: the lines of metrics.jsonl.

    Example:
      >>> lines = [{"split": "train", "epoch": 1, "loss": 0.5, "accuracy": 0.8}]
      >>> report = dict.fromkeys(["val_accuracy", "test_accuracy", "train_accuracy"], 0.8)
      >>> page = render_result(report | {"arch": "a", "seed": 0, "sample": False}, lines)
      >>> "80.00%" in page, page.count("<img")
      (True, 2)
    """
    from fmnist_jax.analysis import plots  # matplotlib takes a second to import

    rows = images = ""
    for name in ("test_accuracy", "val_accuracy", "train_accuracy"):
        value = "none" if report[name] is None else f"{report[name]:.2%}"
        rows += f"<tr><td>{name.replace('_', ' ')}</td><td>{value}</td></tr>"
    for metric in ("loss", "accuracy"):
        png = plots.encode(plots.learning_curve(history, metric), sample=report["sample"])
        images += f'<img width="330" alt="{metric} by epoch" src="{plots.data_url(png)}"/>'
    if report["sample"]:
        images += "<p>Trained on the embedded sample; these accuracies are not results.</p>"
    layers = ""
    for cells in format_rows(report["network"]) if "network" in report else ():
        layers += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    title = html.escape(f"{short_name(report['arch'])}, seed {report['seed']}")
    return f"<div><b>{title}</b><table>{rows}</table>{images}<table>{layers}</table></div>"
