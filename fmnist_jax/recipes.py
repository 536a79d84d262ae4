"""The recipes by name: one per Keras project, with what the project claims, and our own.

Where a project validated on the test images, its recipe holds out a stratified validation split of
the training images instead. `Claim.open_choices` lists what a project left open and its recipe
decided.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fmnist_jax.config import Recipe
from fmnist_jax.errors import ConfigError


class Claim(NamedTuple):
    """What a Keras project reports about its network.

    Attributes:
      source: the project.
      text: the accuracies that it reports.
      test_accuracy: the reported accuracy on test images, a fraction; None if there is none.
      not_comparable: why its numbers cannot be compared with the recipe's; empty if they can.
      open_choices: what the project left open and the recipe decided.
    """

    source: str
    text: str = "none"
    test_accuracy: float | None = None
    not_comparable: str = ""
    open_choices: str = ""


_PROJECTS = (
    Recipe(arch="small_dropout", epochs=30, schedule="cosine"),
    Recipe(arch="valid_2x2", epochs=10, batch_size=32, schedule="cosine"),
    Recipe(arch="same_3x3", epochs=10, batch_size=32, schedule="cosine"),
    Recipe(arch="he_stack", epochs=20, optimizer="sgd", learning_rate=0.01),
    Recipe(
        arch="deep_augmented",
        epochs=25,
        batch_size=126,
        optimizer="rmsprop",
        augmentation="keras",
        image_size=150,
    ),
)

# Much accuracy in little time. airbench94 (Jordan 2024) has Muon, a linear schedule, alternating
# flips and label smoothing; the numbers were chosen on validation images, for two cores of a CPU.
_SPRINT = Recipe(
    arch="sprint",
    epochs=8,
    batch_size=1000,
    microbatch_size=125,  # as fast as 63, faster than 250 and 500
    optimizer="muon",
    learning_rate=0.12,
    schedule="linear",
    label_smoothing=0.1,
    augmentation="shift",
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        **{recipe.arch: recipe for recipe in _PROJECTS},
        # One run each on validation images: 92.10% without augmentation, 91.78% with flips.
        "sprint_91": dataclasses.replace(
            _SPRINT, arch="sprint_narrow", epochs=3, learning_rate=0.2, augmentation="none"
        ),
        "sprint_93": _SPRINT,
        "sprint_94": dataclasses.replace(_SPRINT, epochs=32),
        # One run each on validation images: 94.35% with 24 epochs without erasing, and 94.28% with
        # the network of sprint_94 and 50 epochs.
        "sprint_945": dataclasses.replace(
            _SPRINT, arch="sprint_wide", epochs=32, augmentation="shift_erase"
        ),
        "resnet20": dataclasses.replace(
            _SPRINT, arch="resnet20", epochs=50, augmentation="shift_erase"
        ),
    }
)

CLAIMS: Mapping[str, Claim] = MappingProxyType(
    {
        "small_dropout": Claim(
            source="FashionMNIST-ImageclassificationwithCNN",
            text="test 91.33%, validation 90.62%",
            test_accuracy=0.9133,
            open_choices="width of the dense layer (128), optimizer, schedule, batch size, epochs",
        ),
        "valid_2x2": Claim(
            source="fashion_mnist_cnn, first model",
            open_choices="learning rate, schedule, epochs; batch size (here Keras' default)",
        ),
        "same_3x3": Claim(
            source=(
                "Fashion-MNIST Classification with Convolutional Neural Networks; "
                "fashion_mnist_cnn, second model"
            ),
            text="test about 91%",
            test_accuracy=0.91,
            open_choices="learning rate, schedule; batch size (here Keras' default)",
        ),
        "he_stack": Claim(
            source="Fashion-MNIST-Image-Classification-using-Deep-Learning",
            open_choices="He uniform or normal, padding, optimizer, learning rate, batch size",
        ),
        "deep_augmented": Claim(
            source="Image-Classification-with-CNNs-in-the-Fashion-Mnist-dataset",
            text="training 98.10%, validation 95.43% (with three output units)",
            not_comparable=(
                "three output units, without saying which classes; the validation images may be "
                "the test images; no test accuracy"
            ),
            open_choices="learning rate; ten outputs where the project's text has three",
        ),
    }
)


def find_recipe(name: str) -> Recipe:
    """Returns the recipe of this name, or the first one of the network of this name.

    An import path of a network, such as "nets.py:Net", gets the settings of "small_dropout".

    Raises:
      ConfigError: if there is neither.

    Example:
      >>> find_recipe("sprint_93").epochs, find_recipe("sprint_wide") == RECIPES["sprint_945"]
      (8, True)
    """
    if name in RECIPES:
        return RECIPES[name]
    if ":" in name:
        return dataclasses.replace(RECIPES["small_dropout"], arch=name)
    networks = {recipe.arch: recipe for recipe in [*RECIPES.values()][::-1]}
    if name in networks:
        return networks[name]
    others = sorted(set(networks) - set(RECIPES))
    raise ConfigError(
        f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}, or a network: "
        f"{', '.join(others)}"
    )
