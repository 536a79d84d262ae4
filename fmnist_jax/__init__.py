"""Functional training of Fashion-MNIST image classifiers in JAX.

These are the names that most programs need; everything else is in the subpackages.
"""

from fmnist_jax import errors as errors
from fmnist_jax.config import Recipe as Recipe
from fmnist_jax.config import Run as Run
from fmnist_jax.data.augment import AUGMENTATIONS as AUGMENTATIONS
from fmnist_jax.data.batches import Batch as Batch
from fmnist_jax.data.batches import epoch_order as epoch_order
from fmnist_jax.data.dataset import Dataset as Dataset
from fmnist_jax.data.dataset import select_classes as select_classes
from fmnist_jax.data.sources import load_fashion_mnist as load_fashion_mnist
from fmnist_jax.export.classifier import Classifier as Classifier
from fmnist_jax.export.classifier import load_classifier as load_classifier
from fmnist_jax.nn.models import ARCHS as ARCHS
from fmnist_jax.nn.models import create_model as create_model
from fmnist_jax.recipes import RECIPES as RECIPES
from fmnist_jax.rng import create_streams as create_streams
from fmnist_jax.runs.checkpoint import load_checkpoint as load_checkpoint
from fmnist_jax.runs.fit import fit as fit
from fmnist_jax.runs.replay import replay as replay
from fmnist_jax.runs.writers import ConsoleProgress as ConsoleProgress
from fmnist_jax.runs.writers import NullProgress as NullProgress
from fmnist_jax.runs.writers import Writer as Writer
from fmnist_jax.studies.comparison import compare as compare
from fmnist_jax.studies.seeds import fit_seeds as fit_seeds
from fmnist_jax.studies.sweep import sweep as sweep
from fmnist_jax.train.loop import train_epoch as train_epoch
from fmnist_jax.train.loop import train_steps as train_steps
from fmnist_jax.train.optim import create_optimizer as create_optimizer
from fmnist_jax.train.optim import create_schedule as create_schedule
from fmnist_jax.train.predict import evaluate as evaluate
from fmnist_jax.train.predict import predict as predict
from fmnist_jax.train.rate_finder import RateCurve as RateCurve
from fmnist_jax.train.rate_finder import find_learning_rate as find_learning_rate
from fmnist_jax.train.step import Hyperparams as Hyperparams
from fmnist_jax.train.step import StepConfig as StepConfig
from fmnist_jax.train.step import TrainState as TrainState
from fmnist_jax.train.step import create_train_state as create_train_state
from fmnist_jax.train.step import train_step as train_step
from fmnist_jax.version import __version__ as __version__
