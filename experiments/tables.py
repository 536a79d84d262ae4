"""Writes the rows of the tables in README.md and experiments/README.md from experiments/results.

    python experiments/tables.py           # rewrites the rows
    python experiments/tables.py --check   # exits with status 1 if a table differs from the results

A table stands between `<!-- name -->` and `<!-- end name -->`; its headings are written by hand.
So are the tables that are mostly text: machines, resume, tiles and audit.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from fmnist_jax.analysis.stats import mean_interval

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = ("small_dropout", "valid_2x2", "same_3x3", "he_stack", "deep_augmented")
TARGETS = (0.9133, 0.93, 0.94)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes the rows of the tables from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    check = parser.parse_args(argv).check
    status = 0
    for path in (ROOT / "README.md", ROOT / "experiments/README.md"):
        text = path.read_text()
        filled = fill(text)
        if filled != text and check:
            print(f"{path} differs from experiments/results; run python experiments/tables.py")
            status = 1
        elif filled != text:
            path.write_text(filled)
    return status


def fill(text: str) -> str:
    """Replaces the rows of every table by those made from the results."""
    for name, make in TABLES.items():
        table = rf"(<!-- {name} -->\n\|.*\n\|[-|]+\|\n).*?(<!-- end {name} -->)"
        if found := re.search(table, text, re.DOTALL):
            rows = "".join(f"| {row} |\n" for row in make())
            text = text[: found.end(1)] + rows + text[found.start(2) :]
    return text


def results() -> Iterator[str]:
    """Yields the results of the README."""
    for name, run in projects():
        claim = f"{run.claim}; three classes" if name == "deep_augmented" else run.claim
        yield f"`{name}` | {len(run.seeds)} | {mean(run, 'test')} | | {claim}"
    for name, run in items(load("sprint").recipes):
        seconds = getattr(run, "train_seconds_text", None) or f"{median(run.train_seconds):.0f}"
        number = len(run.test_accuracy.values)
        yield f"`{name}` | {number} | {mean(run, 'test')} | {seconds} | our own"


def processors() -> Iterator[str]:
    """Yields the speeds of the README: ratios to Keras on TensorFlow by processor."""
    zen3, zen5 = (
        {run.network: vars(run.competitors) for run in load(name).results}
        for name in ("speed", "speed_zen5")
    )
    zen4 = vars(load("speed_by_processor")).pop("Zen 4").keras_tensorflow
    xeon = vars(load("versions")).pop("over keras_tensorflow")
    for name in PROJECTS:
        ours, keras = zen3[name]["fmnist_jax"], zen3[name]["keras_tensorflow"]
        speeds = f"{ours.images_per_second.median:,} | {keras.images_per_second.median:,}"
        new = join(getattr(zen4, name, ()), to=" to ")
        first, earlier = (
            spread(runs[name]["keras_tensorflow"].fmnist_jax_over_it) for runs in (zen3, zen5)
        )
        rounds = getattr(xeon, name, None)
        last = spread(np.divide(rounds.fmnist_jax, rounds.keras_tensorflow)) if rounds else ""
        yield f"`{name}` | {speeds} | {first} | {new} | {earlier} | {last}"


def accuracy() -> Iterator[str]:
    """Yields the accuracies of the projects' recipes."""
    for name, run in projects():
        images = f"{run.train_examples:,}, {run.epochs}"
        yield f"`{name}` | {len(run.seeds)} | {images} | {means(run)} | {by_seed(run)}"


def claims() -> Iterator[str]:
    """Yields the comparison with the projects' claims."""
    for name, run in projects():
        n, test = len(run.seeds), mean_interval(run.test_accuracy.values)
        interval = f"{test.mean:.2f} ({test.low:.2f} to {test.high:.2f})"
        one_run = join(run.one_run_interval, to=" to ")
        yield f"`{name}` | {run.claim} | {n} | {interval} | {one_run} | {run.verdict}"


def triples() -> Iterator[str]:
    """Yields the distribution of the accuracy over triples of classes."""
    runs = load("gpu").triples.accuracy
    values = [np.mean(run.seeds) for run in runs]
    yield f"lowest | {', '.join(runs[0].classes)} | {values[0]:.2f}"
    names = {5: "5th percentile", 25: "25th percentile", 50: "median", 75: "75th percentile"}
    for percent, name in names.items():
        yield f"{name} | | {np.percentile(values, percent):.2f}"
    yield f"highest | {', '.join(runs[-1].classes)} | {values[-1]:.2f}"


def calibration() -> Iterator[str]:
    """Yields the calibration errors."""
    for name, run in projects():
        ece = getattr(run, "ensemble_ece", None)
        interval = f"{ece.value:.2f} ({ece.ci95_low:.2f} to {ece.ci95_high:.2f})" if ece else ""
        errors = f"{join(run.ece_values)} | {join(run.ece_after_temperature_values)}"
        yield f"`{name}` | {run.ensemble_accuracy:.2f} | {interval} | {errors} | {mean(run, 'tta')}"


def time_to_accuracy(name: str) -> Iterator[str]:
    """Yields the seconds until the mean accuracy reaches each target."""
    for label, curves in items(load(name).curves):
        seconds, accuracies = np.mean(curves, axis=0).T
        reached = [seconds[accuracies >= target] for target in TARGETS]
        cells = " | ".join(f"{times[0]:,.0f}" if len(times) else "" for times in reached)
        last = f"{100 * accuracies[-1]:.2f} ({join(100 * curve[-1][1] for curve in curves)})"
        yield f"{label} | {len(curves)} | {last} | {seconds[-1]:,.0f} | {cells}"


def sprint() -> Iterator[str]:
    """Yields the results of our own recipes."""
    for name, run in items(load("sprint").recipes):
        size = f"{getattr(run, 'aim', '')} | {run.parameters:,} | {run.epochs}"
        seconds = getattr(run, "train_seconds_text", None) or spread(run.train_seconds, ".0f")
        number, values = len(run.test_accuracy.values), means(run, "test", "val", "tta")
        yield f"`{name}` | {size} | {number} | {values} | {seconds} | {by_seed(run)}"


def ablation() -> Iterator[str]:
    """Yields the differences by one change of `sprint_91`."""
    for _, run in items(load("ablation")):
        test, d = 100 * run.b.test_accuracy.mean, run.difference
        interval = f"{100 * d.mean:+.2f} ({100 * d.low:+.2f} to {100 * d.high:+.2f})"
        seeds = join((100 * value for value in d.values), "+.2f")
        p = run.mcnemar.p
        p_text = f"{p:.2g}" if p > 1e-3 else f"{p:.0e}".replace("e-0", "e-")
        yield f"{run.change} | {test:.2f} | {interval} | {seeds} | {run.sign_flip_p} | {p_text}"


def sprint_settings() -> Iterator[str]:
    """Yields the validation accuracies by settings."""
    last = None
    for run in load("sprint").settings:
        filters = "" if run.filters == last else join(run.filters, "d")
        last = run.filters
        values = f"{run.val_accuracy:.2f} | {run.val_loss:.3f}"
        yield f"{filters} | {run.epochs} | {run.change} | {values}"


def gpu() -> Iterator[str]:
    """Yields the accuracies on a GPU."""
    recipes = vars(load("gpu").recipes)
    for name, run in ((name, recipes[name]) for name in PROJECTS):
        values = f"{means(run)} | {run.ensemble_accuracy:.2f} | {by_seed(run)}"
        yield f"`{name}` | {len(run.seeds)} | {values}"


def variance() -> Iterator[str]:
    """Yields the variance by random stream."""
    for name, run in items(load("variance").streams):
        share = " | "
        if name != "all":
            low, high = run.variance_share_ci95
            share = f"{run.variance_share_percent}% | {low}% to {high}%"
        yield f"{name} | {run.std:.3f} | {join(run.ci95, '.3f', ' to ')} | {share}"


def hashes() -> Iterator[str]:
    """Yields the hashes by layout of devices and processes."""
    for name, digest in items(load("layouts").params_sha256):
        yield f"`{name}` | `{digest}` | the same | the same"


def shards() -> Iterator[str]:
    """Yields the speeds by number of shards."""
    runs = [run for run in load("scaling").images_per_second if run.num_devices == 1]
    runs = [run for run in runs if run.num_processes == 1 and run.batch_size == 1024]
    for run in runs:
        speed = f"{run.batch_size:,} | {run.shards} | {median(run.rounds):,.0f}"
        yield f"1 | 1 | {speed} | {over(run, runs[0])}"


def devices() -> Iterator[str]:
    """Yields the speeds by number of devices: a fixed batch, and a fixed batch of each device."""
    runs = {
        (run.num_processes, run.num_devices, run.batch_size): run
        for run in load("scaling").images_per_second
        if run.shards == 8
    }
    for processes, count in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)):
        cells = [str(processes), str(count)]
        for size, first in ((1024, 1024), (256 * processes * count, 256)):
            run = runs[processes, count, size]
            ratio = over(run, runs[1, 1, first])
            cells += [f"{size:,}", f"{median(run.rounds):,.0f}", ratio]
        yield " | ".join(cells)


def exports() -> Iterator[str]:
    """Yields the times of exported programs."""
    for name, run in items(load("exports").programs):
        yield f"{name} | {' | '.join(spread(size, '.3g') for _, size in items(run))}"


def speed(name: str) -> Iterator[str]:
    """Yields the speeds of all frameworks."""
    for result in load(name).results:
        label = f"`{result.network}`, {result.batch_size}"
        for framework, run in items(result.competitors):
            ratio = spread(run.fmnist_jax_over_it) if framework != "fmnist_jax" else ""
            cost = f"{run.share_of_matmul_rate_percent}% | {run.peak_mib:,}"
            cells = f"{framework} | {spread(run.images_per_second, ',')} | {ratio} | {cost}"
            yield f"{label} | {cells} | {run.first_step_seconds}"
            label = ""


def limits() -> Iterator[str]:
    """Yields the distances to the limit."""
    for name, run in items(load("speed").limits):
        defined, d_limit, d_reached, compiled, c_limit, c_reached = vars(run).values()
        yield (
            f"`{name}` | {defined:,} | {d_limit:,} | {d_reached}%"
            f" | {compiled:,} | {c_limit:,} | {c_reached}%"
        )


def startup() -> Iterator[str]:
    """Yields the seconds to the first step."""
    for name, run in items(vars(load("startup"))["run.py"]):
        first, cached = (spread(times, ".1f") for times in (run.nothing_cached, run.jax_cache))
        yield f"`{name}` | {run.starts} | {first} | {cached}"


def startup_frameworks() -> Iterator[str]:
    """Yields the seconds to the first step of other frameworks."""
    starts = vars(load("startup"))["bench.py"]
    for name, run in (("first", starts.first_start), ("second", starts.second_start)):
        yield f"{name} start, s | {join(vars(run).values(), '', ' | ')}"


def batch_size() -> Iterator[str]:
    """Yields the speeds by batch size."""
    last = ""
    for run in load("batch_size").results:
        label = "" if run.network == last else f"`{run.network}`"
        last = run.network
        speeds = join(vars(run.images_per_second).values(), ",", " | ")
        memory = join(vars(run.peak_mib).values(), ",")
        ratio = spread(run.fmnist_jax_over_keras)
        yield f"{label} | {run.batch_size:,} | {speeds} | {ratio} | {memory}"


def versions() -> Iterator[str]:
    """Yields the speeds by version of JAX."""
    for name, run in items(load("versions").networks):
        _, old, new, ratio = vars(run).values()
        yield f"`{name}` | {old:,} | {new:,} | {spread(ratio)}"


def growth() -> Iterator[str]:
    """Yields the times of one image as one quantity grows."""
    data = load("growth")
    for name, points in items(data.zen5):
        cells = [
            ", ".join(f"{point.value:,}: {point.us_per_image:,}" for point in machine)
            for machine in (points, getattr(data.zen3, name))
        ]
        pixels = ", pixels" if name == "image_size" else ""
        yield f"{name.replace('_', ' ')}{pixels} | {' | '.join(cells)}"


def load(name: str) -> Any:
    """Reads a file of results; its objects have attributes."""
    text = (ROOT / "experiments/results" / f"{name}.json").read_text()
    return json.loads(text, object_hook=lambda values: SimpleNamespace(**values))


def items(record: Any) -> Iterable[tuple[str, Any]]:
    """Returns the entries of an object."""
    return vars(record).items()


def projects() -> Iterator[tuple[str, Any]]:
    """Returns the results of the projects' recipes: `deep_augmented` ran on a GPU."""
    runs = vars(load("accuracy").networks) | {"deep_augmented": load("gpu").recipes.deep_augmented}
    return ((name, runs[name]) for name in PROJECTS)


def join(values: Iterable[float], digits: str = ".2f", to: str = ", ") -> str:
    """Formats numbers."""
    return to.join(f"{value:{digits}}" for value in values)


def spread(record: Any, digits: str = ".2f") -> str:
    """Formats the median with the smallest and the largest; two values as they are."""
    if hasattr(record, "median"):
        return f"{record.median:{digits}} ({record.min:{digits}} to {record.max:{digits}})"
    if isinstance(record, SimpleNamespace):
        return join(record.values, digits)
    low, high = min(record), max(record)
    return f"{median(record):{digits}} ({low:{digits}} to {high:{digits}})"


def over(run: Any, first: Any) -> str:
    """Formats the ratio of two speeds, round by round."""
    return "1" if run is first else spread(np.divide(run.rounds, first.rounds))


def mean(run: Any, name: str) -> str:
    """Formats an accuracy: mean and half width of its interval, or the value of a single run."""
    accuracy = getattr(run, f"{name}_accuracy", None)
    if accuracy is None:
        return ""
    if not hasattr(accuracy, "mean"):
        return join(accuracy.values)
    return f"{accuracy.mean:.2f} ± {accuracy.ci95_half_width:.2f}"


def means(run: Any, *names: str) -> str:
    """Formats several accuracies as cells."""
    return " | ".join(mean(run, name) for name in names or ("test", "val", "train"))


def by_seed(run: Any) -> str:
    """Formats the test accuracy of each seed."""
    return join(run.test_accuracy.values)


TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "results": results,
    "processors": processors,
    "accuracy": accuracy,
    "claims": claims,
    "triples": triples,
    "calibration": calibration,
    "time to accuracy": lambda: time_to_accuracy("time_to_accuracy"),
    "time to accuracy zen3": lambda: time_to_accuracy("time_to_accuracy_zen3"),
    "sprint": sprint,
    "ablation": ablation,
    "sprint settings": sprint_settings,
    "gpu": gpu,
    "variance": variance,
    "hashes": hashes,
    "shards": shards,
    "devices": devices,
    "exports": exports,
    "speed": lambda: speed("speed"),
    "speed zen5": lambda: speed("speed_zen5"),
    "limits": limits,
    "startup": startup,
    "startup frameworks": startup_frameworks,
    "batch size": batch_size,
    "versions": versions,
    "growth": growth,
}

if __name__ == "__main__":
    sys.exit(main())
