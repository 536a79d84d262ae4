"""Writes the rows of the tables in README.md and experiments/README.md from experiments/results.

    python experiments/tables.py           # rewrites the rows
    python experiments/tables.py --check   # exits with status 1 if a table differs from the results

A table stands between `<!-- name -->` and `<!-- end name -->`; its headings are written by hand.
So are the tables that are mostly text (machines, resume, tiles, audit), and those that only earlier
versions can measure.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fmnist_jax.analysis.stats import mean_interval

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = ("small_dropout", "valid_2x2", "same_3x3", "he_stack", "deep_augmented")
# Of the benchmark, in float32 and in bfloat16.
PEERS = ("keras_tensorflow", "torch_channels_last", "torch_compile_float32")
HALF_PEERS = ("keras_tensorflow_bf16", "torch_channels_last_bf16", "torch_compile")
TARGETS = (0.9133, 0.93, 0.94)
LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))
PERCENTILES = {5: "5th percentile", 25: "25th percentile", 50: "median", 75: "75th percentile"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes the rows of the tables from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    check = parser.parse_args(argv).check
    status = 0
    for path in (ROOT / "README.md", ROOT / "experiments/README.md"):
        text = filled = path.read_text()
        for name, rows in tables().items():
            table = rf"(<!-- {name} -->\n\|.*\n\|[-|]+\|\n).*?(<!-- end {name} -->)"
            if found := re.search(table, filled, re.DOTALL):
                lines = "".join(f"| {row} |\n" for row in rows)
                filled = filled[: found.end(1)] + lines + filled[found.start(2) :]
        if filled != text and check:
            print(f"{path} differs from experiments/results; run python experiments/tables.py")
            status = 1
        elif filled != text:
            path.write_text(filled)
    return status


class Values(list[Any]):
    """A list of the results, formatted with commas, as `to.2f`, or as `spread.2f`."""

    def __format__(self, spec: str) -> str:
        if spec.startswith("spread"):
            return _spread(median(self), min(self), max(self), spec[6:]) if self else ""
        separator = " to " if spec.startswith("to") else ", "
        return separator.join(f"{value:{spec.removeprefix('to')}}" for value in self)


class Record(dict[str, Any]):
    """An object of the results; a field that is missing is empty."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name, Values())

    def __format__(self, spec: str) -> str:
        if "median" in self:
            return _spread(self.median, self.min, self.max, spec)
        if "ci95_low" in self:
            return _spread(self.value, self.ci95_low, self.ci95_high, spec)
        if "mean" in self:
            return f"{self.mean:{spec}} ± {self.ci95_half_width:{spec}}"
        return f"{self['values']:{spec}}"


def load(name: str) -> Record:
    """Reads a file of results."""

    def convert(record: dict[str, Any]) -> Record:
        return Record({k: Values(v) if isinstance(v, list) else v for k, v in record.items()})

    text = (ROOT / "experiments/results" / f"{name}.json").read_text()
    return json.loads(text, object_hook=convert)


def tables() -> dict[str, Iterable[str]]:
    """Returns the rows of every table by its name."""
    gpu = load("gpu")
    networks = load("accuracy").networks | {"deep_augmented": gpu.recipes.deep_augmented}
    projects = [(name, Record(networks[name])) for name in PROJECTS]
    recipes = load("sprint").recipes.items()
    triples = gpu.triples.accuracy
    accuracies = [np.mean(triple.seeds) for triple in triples]
    layouts = {tuple(r.values())[:4]: r.rounds for r in load("scaling").images_per_second}
    return {
        "results": [
            f"`{n}` | {len(r.seeds)} | {r.test_accuracy:.2f} | | {r.claim}"
            + ("; three classes" if n == "deep_augmented" else "")
            for n, r in projects
        ]
        + [
            f"`{n}` | {len(r.test_accuracy['values'])} | {r.test_accuracy:.2f}"
            f" | {r.train_seconds_text or format(median(r.train_seconds), '.0f')} | our own"
            for n, r in recipes
        ],
        "processors": _processors(),
        "accuracy": (
            f"`{n}` | {len(r.seeds)} | {r.train_examples:,}, {r.epochs} | {_accuracies(r)}"
            for n, r in projects
        ),
        "claims": (
            f"`{n}` | {r.claim} | {t.n} | {t.mean:.2f} ({t.low:.2f} to {t.high:.2f})"
            f" | {r.one_run_interval:to.2f} | {r.verdict}"
            for n, r in projects
            for t in [mean_interval(r.test_accuracy["values"])]
        ),
        "triples": [
            f"lowest | {triples[0].classes} | {accuracies[0]:.2f}",
            *(f"{n} | | {np.percentile(accuracies, p):.2f}" for p, n in PERCENTILES.items()),
            f"highest | {triples[-1].classes} | {accuracies[-1]:.2f}",
        ],
        "calibration": (
            f"`{n}` | {r.ensemble_accuracy:.2f} | {r.ensemble_ece:.2f} | {r.ece_values:.2f}"
            f" | {r.ece_after_temperature_values:.2f} | {r.tta_accuracy:.2f}"
            for n, r in projects
        ),
        "time to accuracy": _time_to_accuracy("time_to_accuracy"),
        "time to accuracy zen3": _time_to_accuracy("time_to_accuracy_zen3"),
        "sprint": (
            f"`{n}` | {r.aim} | {r.parameters:,} | {r.epochs} | {len(r.test_accuracy['values'])}"
            f" | {r.test_accuracy:.2f} | {r.val_accuracy:.2f} | {r.tta_accuracy:.2f}"
            f" | {r.train_seconds_text or format(r.train_seconds, 'spread.0f')}"
            f" | {r.test_accuracy['values']:.2f}"
            for n, r in recipes
        ),
        "ablation": (
            f"{r.change} | {100 * r.b.test_accuracy.mean:.2f}"
            f" | {100 * d.mean:+.2f} ({100 * d.low:+.2f} to {100 * d.high:+.2f})"
            f" | {Values(100 * v for v in d['values']):+.2f} | {r.sign_flip_p}"
            f" | {r.mcnemar.p:{'.2g' if r.mcnemar.p > 1e-3 else '.0e'}}".replace("e-0", "e-")
            for r in load("ablation").values()
            for d in [r.difference]
        ),
        "gpu": (
            f"`{n}` | {len(r.seeds)} | {_accuracies(r, f' | {r.ensemble_accuracy:.2f}')}"
            for n, r in ((name, gpu.recipes[name]) for name in PROJECTS)
        ),
        "hashes": (
            f"`{n}` | `{digest}` | the same | the same"
            for n, digest in load("layouts").params_sha256.items()
        ),
        "shards": (
            f"1 | 1 | 1,024 | {n} | {_speed(layouts, (1, 1, 1024, n), (1, 1, 1024, 1))}"
            for n in (1, 2, 4, 8)
        ),
        "devices": (
            f"{p} | {d} | 1,024 | {_speed(layouts, (p, d, 1024, 8), (1, 1, 1024, 8))}"
            f" | {256 * p * d:,} | {_speed(layouts, (p, d, 256 * p * d, 8), (1, 1, 256, 8))}"
            for p, d in LAYOUTS
        ),
        "exports": (
            f"{n} | {r['1']:.3g} | {r['1000']:.3g}" for n, r in load("exports").programs.items()
        ),
        "speed": _speeds("speed"),
        "speed zen5": _speeds("speed_zen5"),
        "stock": _over("stock", "linen", "fmnist_jax_plain", *PEERS),
        "peers": _over("peers", *PEERS, *HALF_PEERS, "fmnist_jax_matmul_bf16"),
        "limits": (
            "`{}` | {:,} | {:,} | {}% | {:,} | {:,} | {}%".format(n, *r.values())
            for n, r in load("speed").limits.items()
        ),
        "startup": (
            f"`{n}` | {r.starts} | {r.nothing_cached:.1f} | {r.jax_cache:.1f}"
            for n, r in load("startup")["run.py"].items()
        ),
        "batch size": _once(
            f"`{r.network}` | {r.batch_size:,} | {ours:,} | {keras:,}"
            f" | {r.fmnist_jax_over_keras:.2f} | {Values(r.peak_mib.values()):,}"
            for r in load("batch_size").results
            for ours, keras in [r.images_per_second.values()]
        ),
        "versions": (
            f"`{n}` | {r['jax 0.10.2']:,} | {r['jax 0.12.0.1']:,} | {r.ratio:spread.2f}"
            for n, r in load("versions").networks.items()
        ),
    }


def _spread(middle: float, low: float, high: float, spec: str) -> str:
    return f"{middle:{spec}} ({low:{spec}} to {high:{spec}})"


def _accuracies(run: Record, more: str = "") -> str:
    means = f"{run.test_accuracy:.2f} | {run.val_accuracy:.2f} | {run.train_accuracy:.2f}"
    return f"{means}{more} | {run.test_accuracy['values']:.2f}"


def _ratios(rounds: Sequence[float], others: Sequence[float]) -> Values:
    return Values(a / b for a, b in zip(rounds, others, strict=True))


def _speed(rounds: dict[Any, Values], case: tuple[int, ...], first: tuple[int, ...]) -> str:
    ratio = "1" if case == first else f"{_ratios(rounds[case], rounds[first]):spread.2f}"
    return f"{median(rounds[case]):,.0f} | {ratio}"


def _once(rows: Iterable[str]) -> Iterator[str]:
    """Empties the first cell of a row where the row before has the same."""
    last = None
    for row in rows:
        first, _, rest = row.partition(" | ")
        yield f" | {rest}" if first == last else row
        last = first


def _speeds(name: str) -> Iterator[str]:
    return _once(
        f"`{result.network}`, {result.batch_size} | {n} | {r.images_per_second:,}"
        f" | {r.fmnist_jax_over_it:.2f} | {r.share_of_matmul_rate_percent}%"
        f" | {r.peak_mib:,} | {r.first_step_seconds}"
        for result in load(name).results
        for n, r in result.competitors.items()
    )


def _over(name: str, *others: str) -> Iterator[str]:
    for result in load(name).results:
        competitors = result.competitors
        cells = (f"{competitors[other].fmnist_jax_over_it:.2f}" for other in others)
        speed = competitors.fmnist_jax.images_per_second.median
        yield f"`{result.network}` | {speed:,} | {' | '.join(cells)}"


def _processors() -> Iterator[str]:
    zen3, zen5 = (
        {result.network: result.competitors for name in names for result in load(name).results}
        for names in (("speed", "peers"), ("speed_zen5",))
    )
    zen4 = load("speed_by_processor")["Zen 4"].keras_tensorflow
    xeon = load("versions")["over keras_tensorflow"]
    for name in PROJECTS:
        ours, keras = zen3[name].fmnist_jax, zen3[name].keras_tensorflow
        rounds = xeon.get(name, Record())
        yield (
            f"`{name}` | {ours.images_per_second.median:,} | {keras.images_per_second.median:,}"
            f" | {keras.fmnist_jax_over_it:.2f} | {zen4.get(name, Values()):to.2f}"
            f" | {zen5[name].keras_tensorflow.fmnist_jax_over_it:.2f}"
            f" | {_ratios(rounds.fmnist_jax, rounds.keras_tensorflow):spread.2f}"
        )


def _time_to_accuracy(name: str) -> Iterator[str]:
    for label, curves in load(name).curves.items():
        seconds, accuracies = np.mean(curves, axis=0).T
        reached = [seconds[accuracies >= target] for target in TARGETS]
        cells = " | ".join(f"{times[0]:,.0f}" if len(times) else "" for times in reached)
        last = f"{100 * accuracies[-1]:.2f} ({Values(100 * c[-1][1] for c in curves):.2f})"
        yield f"{label} | {len(curves)} | {last} | {seconds[-1]:,.0f} | {cells}"


if __name__ == "__main__":
    sys.exit(main())
