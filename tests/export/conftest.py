"""Finished runs of a small network with batch statistics, in grey and in colour."""

import flax.linen as nn
import pytest

import fmnist_jax as fm
from tests.small import colour_dataset


class SmallNorm(nn.Module):
    """Convolution, pooling, batch statistics and a dense layer."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Conv(4, (2, 2), padding="VALID")(images))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


@pytest.fixture(scope="session")
def workdir(sample, tmp_path_factory):
    """Folder of the run; three epochs, of which the first was the best or not."""
    recipe = fm.Recipe(arch=f"{__name__}:SmallNorm", epochs=3, batch_size=50)
    workdir = tmp_path_factory.mktemp("run") / "run"
    run = fm.Run(recipe=recipe, workdir=workdir, train_examples=200, keep_every="1ep")
    fm.fit(run, sample, hooks=())
    return workdir


@pytest.fixture(scope="session")
def classifier(workdir):
    return fm.load_classifier(workdir)


@pytest.fixture(scope="session")
def colours():
    return colour_dataset()


@pytest.fixture(scope="session")
def colour_workdir(colours, tmp_path_factory):
    """Folder of a run on images in colour that are not square."""
    recipe = fm.Recipe(arch=f"{__name__}:SmallNorm", epochs=2, batch_size=20, augmentation="shift")
    workdir = tmp_path_factory.mktemp("run") / "colour"
    fm.fit(fm.Run(recipe=recipe, workdir=workdir), colours, hooks=())
    return workdir


@pytest.fixture(scope="session")
def colour_classifier(colour_workdir):
    return fm.load_classifier(colour_workdir)
