"""sweep.html, made from the files of a sweep alone."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmnist_jax.report.render import missing_values_as_damage, render
from fmnist_jax.report.run import read_results
from fmnist_jax.runs import files
from fmnist_jax.studies.sweep import SWEEP, load_study


def write_sweep_report(workdir: Path) -> Path:
    """Draws history, importance and parallel coordinates and writes `sweep.html`.

    Args:
      workdir: a folder in which `sweep` has finished.

    Returns:
      The path of the page, which needs no other file.

    Raises:
      ConfigError: if Optuna is not installed.
      DamagedFileError: if `sweep` has not finished there, or a file cannot be read.
    """
    report = read_results(workdir / SWEEP)
    from optuna.visualization import matplotlib as plots

    with missing_values_as_damage(workdir), load_study(workdir) as study:
        num_complete = sum(trial["state"] == "COMPLETE" for trial in report["trials"])
        # Importances need several values of each setting.
        has_several = num_complete > 2 and len(report["space"]) > 1
        pictures = {
            "history": _draw(plots.plot_optimization_history, study),
            "parallel": _draw(plots.plot_parallel_coordinate, study),
            "importance": _draw(plots.plot_param_importances, study) if has_several else None,
        }
        counts = {"complete": num_complete}
        counts["stopped"] = sum(trial["state"] == "PRUNED" for trial in report["trials"])
        page = render("sweep", sample=report["sample"], report=report, counts=counts, **pictures)
    written = workdir / "sweep.html"
    with files.locked(workdir, wait=True):  # others may share the sweep
        files.write_bytes(written, page)
    return written


def _draw(plot: Callable[..., Any], study: Any) -> bytes:
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls these functions experimental
        axes = plot(study, target_name="Validation accuracy")
        figure = axes.figure if hasattr(axes, "figure") else axes[0].figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
