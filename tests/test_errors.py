"""The classes of errors."""

import pickle

import pytest

from fmnist_jax import errors

CLASSES = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, BaseException)
]


@pytest.mark.parametrize("error", CLASSES)
def test_errors_cross_processes(error):
    copy = pickle.loads(pickle.dumps(error("text")))
    assert (type(copy), str(copy)) == (error, "text")
    stop = pickle.loads(pickle.dumps(errors.Interrupted("text", 15)))
    assert stop.signal_number == 15
