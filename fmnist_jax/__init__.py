"""Functional training of Fashion-MNIST image classifiers in JAX."""

from fmnist_jax.augment import AUGMENTATIONS as AUGMENTATIONS
from fmnist_jax.augment import RandomAffine as RandomAffine
from fmnist_jax.checkpoint import Checkpoint as Checkpoint
from fmnist_jax.checkpoint import CheckpointError as CheckpointError
from fmnist_jax.checkpoint import CheckpointWarning as CheckpointWarning
from fmnist_jax.checkpoint import load_checkpoint as load_checkpoint
from fmnist_jax.config import ConfigError as ConfigError
from fmnist_jax.config import Recipe as Recipe
from fmnist_jax.config import Run as Run
from fmnist_jax.data import CLASS_NAMES as CLASS_NAMES
from fmnist_jax.data import DataError as DataError
from fmnist_jax.data import Dataset as Dataset
from fmnist_jax.data import DataWarning as DataWarning
from fmnist_jax.data import load_fashion_mnist as load_fashion_mnist
from fmnist_jax.data import select_classes as select_classes
from fmnist_jax.data import stratified_split as stratified_split
from fmnist_jax.files import DamagedFileError as DamagedFileError
from fmnist_jax.fit import DivergedError as DivergedError
from fmnist_jax.fit import Interrupted as Interrupted
from fmnist_jax.fit import Result as Result
from fmnist_jax.fit import fit as fit
from fmnist_jax.metrics import Metrics as Metrics
from fmnist_jax.metrics import cross_entropy as cross_entropy
from fmnist_jax.models import ARCHS as ARCHS
from fmnist_jax.models import create_model as create_model
from fmnist_jax.optim import create_optimizer as create_optimizer
from fmnist_jax.progress import ConsoleProgress as ConsoleProgress
from fmnist_jax.progress import Silence as Silence
from fmnist_jax.recipes import RECIPES as RECIPES
from fmnist_jax.streams import Streams as Streams
from fmnist_jax.streams import create_streams as create_streams
from fmnist_jax.train import Batch as Batch
from fmnist_jax.train import TrainState as TrainState
from fmnist_jax.train import create_train_state as create_train_state
from fmnist_jax.train import epoch_order as epoch_order
from fmnist_jax.train import evaluate as evaluate
from fmnist_jax.train import predict as predict
from fmnist_jax.train import steps_per_epoch as steps_per_epoch
from fmnist_jax.train import train_step as train_step
from fmnist_jax.train import train_steps as train_steps

__version__ = "0.1.0"
