"""Results of a run: the files that are written at its end."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmnist_jax.data.augment import Augmentation
from fmnist_jax.data.batches import as_stored, augmented
from fmnist_jax.digest import params_sha256
from fmnist_jax.errors import DivergedError
from fmnist_jax.runs import environment, files
from fmnist_jax.runs.plan import Plan
from fmnist_jax.train.hooks import Hook, evaluation_progress
from fmnist_jax.train.predict import NUM_VIEWS, predict, predict_tta
from fmnist_jax.train.step import TrainState
from fmnist_jax.xla.jit import platform_jit

# Of more classes, the report shows training images of this many, evenly spaced.
_MAX_CLASSES = 20


def write_results(
    plan: Plan,
    state: TrainState,
    history: Sequence[Mapping[str, Any]],
    *,
    compile_seconds: float,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Evaluates the test images and writes predictions.npz, examples.npz and report.json.

    Args:
      plan: the run.
      state: the state after its last step.
      history: its log, the lines of metrics.jsonl.
      compile_seconds: compilation time of the training loop.
      hooks: receive the progress of the evaluation.

    Returns:
      The content of report.json. It is written last, because it marks the run as finished.

    Raises:
      DivergedError: if the logits of the test images are not finite.
    """
    from fmnist_jax.analysis import calibration, scores  # SciPy and scikit-learn take a second

    dataset, workdir = plan.dataset, plan.run.workdir
    predictions = _predictions(plan, state, hooks)
    if not np.isfinite(predictions["logits"]).all():
        raise DivergedError(
            "the logits of the test images are not finite; a lower learning rate often helps"
        )
    test = scores.score(predictions["logits"], dataset.test_labels, dataset.class_names)
    macro = scores.macro_scores(predictions["logits"], dataset.test_labels)
    figures: dict[str, Any] = {
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        **{f"test_{name}": one.value for name, one in macro.items()},
        "test_intervals": {f"test_{name}": list(one[1:]) for name, one in macro.items()},
        "tta_accuracy": None,
        "calibration": calibration.summarize(predictions),
        "classes": test.classes,
        "confusion_matrix": test.confusion_matrix,
        "compile_seconds": round(compile_seconds, 3),
        "params_sha256": params_sha256(state.params),
    }
    if plan.tta:
        logits = predictions["tta_logits"]
        tta = scores.score(logits, dataset.test_labels, dataset.class_names)
        figures["tta_accuracy"] = tta.accuracy
    files.write_arrays(workdir / files.PREDICTIONS, **predictions, sample=dataset.sample)
    files.write_arrays(workdir / files.EXAMPLES, **_examples(plan, test.losses))
    report = _run_fields(plan, int(state.step), history) | figures
    files.write_json(workdir / files.REPORT, report)
    return report


def _predictions(plan: Plan, state: TrainState, hooks: Sequence[Hook]) -> dict[str, np.ndarray]:
    """Returns logits, labels and positions of the test and the validation images."""

    def run(
        split: str, function: Callable[..., jax.Array], images: np.ndarray, views: int = 1
    ) -> np.ndarray:
        logits = function(
            state.variables,
            images,
            model=plan.model,
            on_call=evaluation_progress(hooks, split, views * len(images)),
            layout=plan.config.layout,
        )
        return np.asarray(logits)

    dataset = plan.dataset
    assert dataset.test_indices is not None  # set by Dataset itself
    predictions = {
        "logits": run("test", predict, dataset.test_images),
        "labels": dataset.test_labels,
        "indices": dataset.test_indices,
        "val_logits": run("val", predict, dataset.train_images[plan.val_examples]),
        "val_labels": dataset.train_labels[plan.val_examples],
        "val_indices": plan.val_examples,
    }
    if plan.tta:
        predictions["tta_logits"] = run(
            "test with augmentation", predict_tta, dataset.test_images, NUM_VIEWS
        )
    return predictions


def _run_fields(plan: Plan, step: int, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what report.json says of settings, data, log and environment."""
    dataset, recipe = plan.dataset, plan.run.recipe
    last = {line["split"]: line for line in history}
    train_lines = [line for line in history if line["split"] == "train"]
    return {
        "sample": dataset.sample,
        "arch": recipe.arch,
        "recipe": dataclasses.asdict(recipe),
        "seed": plan.run.seed,
        "epochs": step // plan.steps_per_epoch,
        "steps": step,
        "params": plan.num_params,
        "network": plan.network,
        "train_accuracy": last["train"]["accuracy"],
        "val_accuracy": last["val"]["accuracy"] if "val" in last else None,
        "train_seconds": round(sum(line["seconds"] for line in train_lines), 3),
        "images_per_second": float(np.median([line["images_per_second"] for line in train_lines])),
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "train": len(plan.train_examples),
            "val": len(plan.val_examples),
            "excluded": len(plan.run.exclude),
            "test": len(dataset.test_labels),
            "classes": list(dataset.class_names),
        },
        "versions": environment.versions(),
        "device": jax.devices()[0].device_kind,
    }


def _examples(plan: Plan, test_losses: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the images that the report shows."""
    dataset = plan.dataset
    num_classes = len(dataset.class_names)
    classes = np.linspace(0, num_classes - 1, min(num_classes, _MAX_CLASSES)).astype(int)
    shown = np.concatenate(
        [
            plan.train_examples[dataset.train_labels[plan.train_examples] == label][:10]
            for label in classes
        ]
    )
    worst = np.argsort(-test_losses, kind="stable")[:20]
    assert dataset.test_indices is not None  # set by Dataset itself
    examples = {
        "sample_images": dataset.train_images[shown],
        "sample_labels": dataset.train_labels[shown],
        "worst_images": dataset.test_images[worst],
        "worst_indices": dataset.test_indices[worst],
        "sample": np.asarray(dataset.sample),
    }
    if plan.config.augment is not None:
        originals = plan.train_examples[:6]
        examples["originals"] = dataset.train_images[originals]
        examples["augmented"] = np.asarray(
            _augmented(
                plan.streams.augment,
                jnp.asarray(originals),
                jnp.asarray(examples["originals"]),
                plan.hyperparams.augmentation_strength,
                augment=plan.config.augment,
            )
        )
    return examples


@platform_jit(static_argnames=("augment",))
def _augmented(
    key: jax.Array,
    examples: jax.Array,
    images: jax.Array,
    strength: float | jax.Array | None,
    *,
    augment: Augmentation,
) -> jax.Array:
    """Returns float32[example, epoch, side, side, ...]: the images of the first five epochs."""

    def of_epoch(epoch: jax.Array) -> jax.Array:
        return as_stored(augmented(key, epoch, examples, images, strength, augment=augment))

    return lax.map(of_epoch, jnp.arange(5)).swapaxes(0, 1)
