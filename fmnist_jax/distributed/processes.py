"""Several processes that run one program together, started by an engine such as mpirun or Slurm.

Every process calls the same functions in the same order. A single process communicates with no
other.
"""

import json
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmnist_jax import errors
from fmnist_jax.differences import differences_message

# Seconds without a sign of life after which a process counts as dead. Shorter than the 100 s of
# JAX, so that a scheduler can requeue early; a save or a compilation does not delay the signs.
HEARTBEAT_SECONDS = 30


def start(heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Connects this process with the others, before anything asks JAX for its devices.

    JAX finds Open MPI, Slurm, Kubernetes and TPU pods by itself. Elsewhere the variables
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    describe the processes.

    Args:
      heartbeat_seconds: a process without a sign of life for so long counts as dead, and JAX ends
        the others.

    Raises:
      ConfigError: if no launcher is detected, a variable has another form, or another program uses
        the port of the first process.
    """
    numbers: dict[str, int] = {}
    for name in ("num_processes", "process_id"):
        text = os.environ.get(f"JAX_{name.upper()}")
        if text is not None:
            if not text.isdecimal():
                raise errors.ConfigError(f"JAX_{name.upper()} is {text!r}; expected an integer")
            numbers[name] = int(text)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        _check_address(address, is_served_here=numbers.get("process_id") == 0)
    # Its handler would replace the action of SIGTERM, which here stops all processes (`fit`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **numbers,  # type: ignore[arg-type]
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, TypeError) as error:  # the latter for numbers that are too large
        raise errors.ConfigError(
            f"the processes cannot be connected: {error} Start them by mpirun, srun or Kubernetes, "
            "or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _check_address(address: str, *, is_served_here: bool) -> None:
    """Refuses what JAX answers with an IndexError or a segmentation fault."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise errors.ConfigError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}; expected host:port of the first process"
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
        if is_served_here:
            socket.create_server(("", int(port))).close()
    except OSError as error:
        raise errors.ConfigError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}, which cannot be used: {error}"
        ) from error


def is_first() -> bool:
    """Whether this process is the first one, which writes the files."""
    return jax.process_index() == 0


def gather(values: Sequence[int]) -> np.ndarray:
    """Returns the numbers of all processes.

    Args:
      values: of this process, int32, as many as in the others.

    Returns:
      int32[processes, numbers].

    Example:
      >>> gather([3, 4])
      array([[3, 4]], dtype=int32)
    """
    array = np.array(values, np.int32)
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def on_first(function: Callable[[], Any]) -> Any:
    """Calls a function in the first process and returns its result in all of them.

    Args:
      function: its result can be pickled.

    Returns:
      The result; the other processes get equal copies.

    Raises:
      The error that the function raised; in the other processes, one of `fmnist_jax.errors` keeps
      its class, and any other becomes a `ConfigError`.

    Example:
      >>> on_first(lambda: {"step": 3})
      {'step': 3}
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if is_first():
        try:
            result = function()
        except Exception as raised:  # noqa: BLE001 (raised again below)
            error = raised
    failure = None if error is None else (type(error).__name__, str(error))
    content = _broadcast(pickle.dumps((result, failure)))
    if error is not None:
        raise error
    if is_first():
        return result
    result, failure = pickle.loads(content)  # noqa: S301 (from the first process of this program)
    if failure is not None:
        name, message = failure
        raise getattr(errors, name, errors.ConfigError)(f"in the first process: {message}")
    return result


def check_same(what: str, values: Any, error: type[Exception] = errors.ConfigError) -> None:
    """Checks that all processes have the same values.

    Args:
      what: their name for the error message.
      values: a JSON object.
      error: raised in all processes if they differ. It names the processes that differ from the
        first and, in them, the differences.
    """
    if jax.process_count() == 1:
        return
    values = json.loads(json.dumps(values))
    first = on_first(lambda: values)
    other = np.flatnonzero(gather([first != values])[:, 0]).tolist()
    if other:
        names = f"{what} of process {', '.join(map(str, other))} differ from those of process 0"
        message = differences_message(f"{names}:", first, values, ("in process 0", "here"))
        raise error(message or names)


def _broadcast(content: bytes) -> bytes:
    """Returns the bytes of the first process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # The sum that implements it is exact for integers.
    padded = np.zeros(-(-size // 4) * 4, np.uint8)
    if is_first():
        padded[:size] = np.frombuffer(content, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded.view(np.int32)))
    return received.view(np.uint8)[:size].tobytes()
