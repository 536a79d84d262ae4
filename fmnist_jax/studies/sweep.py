"""`sweep`: searches for better settings with Optuna, and checks the winner on fresh seeds."""

import contextlib
import dataclasses
import sqlite3
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from fmnist_jax.config import Recipe, Run, parse_value
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.errors import (
    ConfigError,
    DamagedFileError,
    DivergedError,
    Interrupted,
    first_line,
    import_optional,
)
from fmnist_jax.parts.objects import Parts, with_objects
from fmnist_jax.runs import files
from fmnist_jax.runs.console import ConsoleProgress
from fmnist_jax.runs.fit import train_calls
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.runs.signals import deferred_signals
from fmnist_jax.studies.seeds import fit_seeds
from fmnist_jax.train.hooks import Hook, epochs_without_gain, say, started
from fmnist_jax.train.predict import evaluate

SWEEP = "sweep.json"
STORAGE = "study.db"

# Seconds between two heartbeats of a trial, and without one until it is repeated.
_HEARTBEAT_SECONDS, _GRACE_SECONDS = 10, 60

_STOPPED = (
    "Stopped; the finished trials are saved. The same command resumes the sweep and repeats the "
    "trial that was running."
)

# A trial is compared with the median of the others after its first epoch, once there are five.
_PRUNER = {"n_startup_trials": 5, "n_warmup_steps": 1}


class Domain(NamedTuple):
    """The values that a setting may have.

    Attributes:
      low: the smallest number; None for choices.
      high: the largest.
      log: whether the logarithm is uniform.
      choices: the values of a categorical setting.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()


def parse_domain(text: str) -> tuple[str, Domain]:
    """Reads `name=low:high`, `name=log:low:high` or `name=choice,choice`.

    Args:
      text: the name is a field of `Recipe`, or an option such as "arch_options.width".

    Raises:
      ConfigError: if it is none of these.

    Example:
      >>> parse_domain("learning_rate=log:1e-4:1e-1")
      ('learning_rate', Domain(low=0.0001, high=0.1, log=True, choices=()))
      >>> parse_domain("optimizer=adam,sgd")[1].choices
      ('adam', 'sgd')
    """
    name, equals, values = text.partition("=")
    fields = {field.name: field.type for field in dataclasses.fields(Recipe)}
    names = [field for field in fields if field != "arch" and not field.endswith("_options")]
    part, _, option = name.partition(".")
    if name not in names and not (part in fields and part.endswith("_options") and option):
        raise ConfigError(
            f"{text!r} names no setting of a recipe; choose one of {', '.join(sorted(names))}, or "
            "an option such as arch_options.width"
        )
    if not equals:
        raise ConfigError(f"{text!r} has no values; expected {name}=low:high or {name}=a,b,c")
    kinds = typing.get_args(fields[part]) or (fields[part],)
    kind = next((kind for kind in (int, float) if kind in kinds), str)
    log = values.startswith("log:")
    ends = values.removeprefix("log:").split(":")
    try:
        parse = parse_value if option else kind
        if option:  # of any type
            is_range = log or (
                all(type(parse(end)) in (int, float) for end in ends) and len(ends) > 1
            )
        else:
            is_range = len(ends) > 1 and (log or kind is not str)
        numbers: list[Any] = [parse(value) for value in (ends if is_range else values.split(","))]
    except ValueError as error:
        raise ConfigError(f"{text!r} has a value that is not of type {kind.__name__}") from error
    if not is_range:
        return name, Domain(choices=tuple(numbers))
    if len(numbers) != 2 or not all(type(number) in (int, float) for number in numbers):
        raise ConfigError(
            f"{text!r} is not a range; expected {name}=low:high or {name}=log:low:high"
        )
    if not numbers[0] < numbers[1] or (log and numbers[0] <= 0):
        above = "above 0 and " if log else ""
        raise ConfigError(f"{text!r} is an empty range; low must be {above}below high")
    return name, Domain(numbers[0], numbers[1], log)


def with_settings(run: Run, settings: Mapping[str, Any]) -> Run:
    """Returns a run with other settings of its recipe, by the names that `parse_domain` returns.

    Example:
      >>> run = Run(recipe=Recipe(arch="sprint", epochs=1), workdir=Path())
      >>> with_settings(run, {"arch_options.widths": [8, 16, 32]}).recipe.arch_options
      {'widths': [8, 16, 32]}
    """
    recipe = run.recipe
    for name, value in settings.items():
        field, _, option = name.partition(".")
        if option:
            value = (getattr(recipe, field) or {}) | {option: value}
        recipe = dataclasses.replace(recipe, **{field: value})
    return dataclasses.replace(run, recipe=recipe)


def format_params(params: Mapping[str, Any]) -> str:
    """Formats settings, numbers with three digits.

    Example:
      >>> format_params({"learning_rate": 0.00123456, "optimizer": "adam"})
      'learning_rate 0.00123, optimizer adam'
    """
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in params.items()
    )


def sweep(
    run: Run,
    dataset: Dataset,
    space: Mapping[str, Domain],
    num_trials: int,
    *,
    num_seeds: int = 5,
    hooks: Sequence[Hook] | None = None,
    **parts: Unpack[Parts],
) -> dict[str, Any]:
    """Searches for the settings with the best validation accuracy.

    Optuna proposes settings (tree-structured Parzen estimator) and stops trials that are worse than
    the median. The study is in `study.db` in the folder of the run. The same call continues it, and
    processes on one machine can share it. Trials that differ in traced scalars (learning rate,
    weight decay, dropout, label smoothing, strength of augmentation) share one compiled program.

    Trials are evaluated on the validation images only. The best setting is then trained from fresh
    seeds, in the subfolder `best-N` for trial N, and only these runs are evaluated on the test
    images.

    Args:
      run: recipe, seed of all trials and folder.
      dataset: the data.
      space: the domain of each setting that is searched.
      num_trials: number of finished or pruned trials.
      num_seeds: trainings of the best setting, with the seeds after `run.seed`.
      hooks: as for `fit`.
      **parts: as for `fit`.

    Returns:
      The content of sweep.json: `best`, with `params` and `val_accuracy` of the best trial;
      `val_accuracy` and `test_accuracy` of the fresh seeds (`stats.summarize`); `optimism`, by
      which the best trial exceeds the mean validation accuracy of the fresh seeds, with its 95%
      interval; and the trials.

    Raises:
      ConfigError: if Optuna is not installed, there are no validation images, a setting does not
        fit, or the folder holds another sweep.
      Interrupted: if a signal arrived. The finished trials are saved; the same call repeats the
        trial that was stopped and continues.
    """
    hooks = [ConsoleProgress()] if hooks is None else hooks
    optuna = _optuna()
    run = with_objects(run, len(dataset.class_names), **parts)
    plan = _checked_plan(run, dataset, space, num_trials, num_seeds)
    with files.usable(run.workdir):
        files.make_folder(run.workdir)
        with _locked(run.workdir, hooks):
            _write_settings(plan, space)
    best, trials = _search(run, dataset, space, num_trials, hooks, optuna)
    fresh = dataclasses.replace(
        with_settings(run, best.params),
        seed=run.seed + 1,
        workdir=run.workdir / f"best-{best.number}",
    )
    say(hooks, f"The best is trial {best.number}. Training it from {num_seeds} fresh seeds:")
    with _locked(run.workdir, hooks):  # others that share the sweep come here too
        seeds = fit_seeds(fresh, dataset, num_seeds, hooks=hooks).report
    val = seeds["val_accuracy"]
    report = {
        "sample": dataset.sample,
        "arch": run.recipe.arch,
        "recipe": dataclasses.asdict(fresh.recipe),
        "space": {name: domain._asdict() for name, domain in space.items()},
        "best": {"number": best.number, "params": best.params, "val_accuracy": best.value},
        "seeds": fresh.workdir.name,
        "val_accuracy": val,
        "test_accuracy": seeds["test_accuracy"],
        "optimism": {
            "mean": best.value - val["mean"],
            "low": best.value - val["high"],
            "high": best.value - val["low"],
        },
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name,
                "params": trial.params,
                "val_accuracy": list(trial.intermediate_values.values()),
            }
            for trial in trials
        ],
    }
    with _locked(run.workdir, hooks):
        files.write_json(run.workdir / SWEEP, report)
    return report


def _checked_plan(
    run: Run, dataset: Dataset, space: Mapping[str, Domain], num_trials: int, num_seeds: int
) -> Plan:
    """Returns the plan without changes, after checking the ends and choices of every domain."""
    if num_trials < 1 or num_seeds < 2:
        raise ConfigError(
            f"num_trials is {num_trials} and num_seeds is {num_seeds}; expected at least 1 and 2"
        )
    if not space:
        raise ConfigError("the sweep has no setting to search; name at least one")
    dataclasses.replace(run, seed=run.seed + num_seeds)  # refuses seeds that are too large
    plan = create_plan(run, dataset)
    for name, domain in space.items():
        for value in domain.choices or (domain.low, domain.high):
            plans = (plan, create_plan(with_settings(run, {name: value}), dataset))
            if not all(len(each.val_examples) for each in plans):
                raise ConfigError("val_fraction is 0; a sweep chooses by validation images")
    return plan


def _search(
    run: Run,
    dataset: Dataset,
    space: Mapping[str, Domain],
    num_trials: int,
    hooks: Sequence[Hook],
    optuna: Any,
) -> tuple[Any, list[Any]]:
    """Trains the missing trials; returns the best trial and all of them."""
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    with _open_study(run.workdir, optuna, hooks) as study, deferred_signals() as signals:

        def objective(trial: Any) -> float:
            try:
                return _run_trial(trial, run, dataset, space, hooks, signals, optuna)
            except Interrupted:
                study.enqueue_trial(trial.params)  # it is repeated first
                raise

        # Each process, and each continuation, draws different proposals.
        study.sampler = optuna.samplers.TPESampler(seed=run.seed + len(study.trials))
        while (done := len(study.get_trials(deepcopy=False, states=states))) < num_trials:
            say(hooks, f"{done} of {num_trials} trials are finished")
            study.optimize(objective, n_trials=1)
        if signals:
            raise Interrupted(_STOPPED, signals[0])
        trials = study.trials
        if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials):
            raise ConfigError(
                f"none of the {done} trials has a result: the loss was not finite, or their "
                "settings do not fit each other; choose another domain and another folder"
            )
        return study.best_trial, trials


def _run_trial(
    trial: Any,
    run: Run,
    dataset: Dataset,
    space: Mapping[str, Domain],
    hooks: Sequence[Hook],
    signals: Sequence[int],
    optuna: Any,
) -> float:
    """Trains one trial; returns its validation accuracy.

    Raises:
      Interrupted: if a signal arrived.
      TrialPruned: if it is worse than the median, diverged, or its settings do not fit.
    """
    chosen = {name: _suggest(trial, name, domain) for name, domain in space.items()}
    say(hooks, f"  trial {trial.number}: {format_params(chosen)} ...")
    try:
        plan = create_plan(with_settings(run, chosen), dataset)
        recipe, accuracies = plan.run.recipe, []
        for epoch, accuracy in enumerate(_train(plan, hooks, signals), 1):
            trial.report(accuracy, epoch)
            accuracies.append(accuracy)
            if recipe.patience and epochs_without_gain(accuracies) >= recipe.patience:
                break
            if epoch < recipe.epochs and trial.should_prune():
                say(hooks, f"  stopped after epoch {epoch}: validation accuracy {accuracy:.2%}")
                raise optuna.TrialPruned
    # The ends of a range may fit where a value between does not.
    except (ConfigError, DivergedError) as error:
        say(hooks, f"  without result: {error}")
        raise optuna.TrialPruned from error
    say(hooks, f"  validation accuracy {accuracy:.2%}")
    return accuracy


def _train(plan: Plan, hooks: Sequence[Hook], signals: Sequence[int]) -> Iterator[float]:
    """Yields the validation accuracy after each epoch."""
    val_images = plan.dataset.train_images[plan.val_examples]
    val_labels = plan.dataset.train_labels[plan.val_examples]
    inputs, layout = plan.config.layout.place(plan.inputs), plan.config.layout
    state = layout.place(plan.create_state())
    with started(hooks, plan.settings, 0, plan.total_steps):
        for call in train_calls(plan, inputs, state, hooks=hooks):
            if signals:
                raise Interrupted(_STOPPED, signals[0])
            if int(call.state.step) % plan.steps_per_epoch == 0:
                result = evaluate(
                    call.state.variables, val_images, val_labels, model=plan.model, layout=layout
                )
                yield result.means()["accuracy"]


def _locked(workdir: Path, hooks: Sequence[Hook]) -> contextlib.AbstractContextManager[None]:
    text = "Waiting for another process that uses the folder ..."
    return files.locked(workdir, on_wait=lambda: say(hooks, text))


@contextlib.contextmanager
def load_study(workdir: Path) -> Iterator[Any]:
    """Opens the Optuna study in the folder of a sweep, for a `with` statement.

    Raises:
      ConfigError: if Optuna is not installed, or the folder holds no sweep.
      DamagedFileError: if the study cannot be read.
    """
    if not (workdir / STORAGE).exists():
        raise ConfigError(f"{workdir} holds no sweep: it has no {STORAGE}")
    with _open_study(workdir, _optuna(), ()) as study:
        yield study


@contextlib.contextmanager
def _open_study(workdir: Path, optuna: Any, hooks: Sequence[Hook]) -> Iterator[Any]:
    import sqlalchemy  # a dependency of Optuna

    path, storage = workdir / STORAGE, None
    if (workdir / SWEEP).exists() and not (path.exists() and path.stat().st_size):
        raise DamagedFileError(
            f"{path} is missing or empty, but {SWEEP} has its results; use another folder"
        )
    try:
        with _locked(workdir, hooks), warnings.catch_warnings():  # the tables are created once
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.RDBStorage(
                "sqlite://",
                # A URL would read characters such as ? and % of a path.
                engine_kwargs={
                    "creator": lambda: sqlite3.connect(path, check_same_thread=False, timeout=60),
                    "poolclass": sqlalchemy.pool.NullPool,
                },
                heartbeat_interval=_HEARTBEAT_SECONDS,
                grace_period=_GRACE_SECONDS,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            study = optuna.create_study(
                study_name="sweep",
                storage=storage,
                direction="maximize",
                pruner=optuna.pruners.MedianPruner(**_PRUNER),
                load_if_exists=True,
            )
        yield study
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DamagedFileError(f"{path} cannot be used: {first_line(cause)}") from error
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _suggest(trial: Any, name: str, domain: Domain) -> Any:
    if domain.choices:
        return trial.suggest_categorical(name, domain.choices)
    suggest = trial.suggest_int if isinstance(domain.low, int) else trial.suggest_float
    return suggest(name, domain.low, domain.high, log=domain.log)


def _write_settings(plan: Plan, space: Mapping[str, Domain]) -> None:
    workdir = plan.run.workdir
    settings = plan.settings | {
        "space": {name: [domain.low, domain.high, domain.log, list(domain.choices)]
                  for name, domain in space.items()}
    }  # fmt: skip
    files.check_config(workdir, settings, "sweep")
    files.write_json(workdir / files.CONFIG, settings)


def _optuna() -> Any:
    optuna = import_optional("optuna", "sweep")
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it logs errors that are raised
    return optuna
