"""seeds.html from the files of several seeds."""

from pathlib import Path
from typing import Any

from fmnist_jax.analysis import plots
from fmnist_jax.report.render import missing_values_as_damage, write_page
from fmnist_jax.report.run import read_history
from fmnist_jax.runs import files
from fmnist_jax.studies.seeds import MACRO_FIGURES


def write_seeds_report(workdir: Path) -> Path:
    """Draws the curve of each seed, writes `seeds.html` and returns its path.

    Raises:
      DamagedFileError: if `fit_seeds` has not finished there, or a file cannot be read.
    """
    summary: dict[str, Any] = dict.fromkeys(MACRO_FIGURES) | files.read_results(
        workdir / files.SEEDS
    )
    with missing_values_as_damage(workdir):
        histories = [read_history(workdir / run) for run in summary["runs"]]
        split = "train" if summary["val_accuracy"] is None else "val"
        figure = plots.seeds_curves(histories, split)
        image = plots.encode(figure, sample=summary["sample"])
        page = workdir / "seeds.html"
        write_page(page, "seeds", sample=summary["sample"], summary=summary, curves=image)
    (workdir / "seeds.png").write_bytes(image)
    return page
