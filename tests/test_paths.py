"""Paths of the user, with and without a home folder."""

from pathlib import Path

import jax
import pytest

from fmnist_jax.config import Recipe, Run
from fmnist_jax.data import sources
from fmnist_jax.errors import ConfigError
from fmnist_jax.xla.cache import enable_compilation_cache


@pytest.mark.parametrize("workdir", ["gs://bucket/run", Path("s3://bucket/run")])
def test_a_url_is_no_workdir(workdir):
    with pytest.raises(ConfigError, match="is a URL; expected a path on this machine"):
        Run(recipe=Recipe(arch="same_3x3", epochs=1), workdir=workdir)


def test_a_home_folder_is_expanded_if_there_is_one(monkeypatch):
    recipe = Recipe(arch="same_3x3", epochs=1)
    assert Run(recipe=recipe, workdir=Path("~/x")).workdir == Path.home() / "x"
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match="~/x is in a home folder that cannot be found"):
        Run(recipe=recipe, workdir=Path("~/x"))


def test_without_a_home_folder_nothing_is_cached_and_other_places_are_searched(monkeypatch, sample):
    monkeypatch.setattr(Path, "expanduser", no_home)
    for name in ("XDG_CACHE_HOME", "TFDS_DATA_DIR", "KERAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    assert enable_compilation_cache() is None
    jax.config.update("jax_compilation_cache_dir", directory)
    places = list(sources.standard_places())
    assert places[0] == Path("/usr/share/datasets/fashion-mnist")
    assert sources._cached("x.npz", lambda: [sample.train_labels])[0] is sample.train_labels


def no_home(path):
    if str(path).startswith("~"):
        raise RuntimeError("Could not determine home directory.")
    return path
