"""The competitors of the benchmark: their Python environments and processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from worker import Case

from fmnist_jax.digest import sha256_bytes

FOLDER = Path(__file__).parent
OURS = "fmnist_jax"


class Competitor(NamedTuple):
    """One way to train.

    Attributes:
      module: name of its module in this folder.
      requirements: name of its Python environment; None is that of this process.
      options: keyword arguments of the module's `Competitor`.
      variables: environment variables of its process.
      devices: platforms on which it takes part.
    """

    module: str
    requirements: str | None = None
    options: Mapping[str, bool] = MappingProxyType({})
    variables: Mapping[str, str] = MappingProxyType({})
    devices: tuple[str, ...] = ("cpu", "gpu")


COMPETITORS = {
    OURS: Competitor("ours"),
    f"{OURS}_bf16": Competitor("ours", options={"bf16": True}, devices=("gpu",)),
    "keras_tensorflow": Competitor(
        "keras_fit", "tensorflow", variables={"KERAS_BACKEND": "tensorflow"}
    ),
    "keras_jax": Competitor("keras_fit", "keras-jax", variables={"KERAS_BACKEND": "jax"}),
    "torch": Competitor("torch_loop", "torch"),
    "torch_channels_last": Competitor("torch_loop", "torch", {"channels_last": True}),
    "torch_channels_last_bf16": Competitor(
        "torch_loop", "torch", {"channels_last": True, "bf16": True}
    ),
    "torch_compile": Competitor(
        "torch_loop",
        "torch",
        {"channels_last": True, "bf16": True, "compiled": True},
        devices=("gpu",),
    ),
    "linen": Competitor("linen_loop"),
    "linen_scan": Competitor("linen_loop", options={"scan": True}),
}


class ChildError(RuntimeError):
    """A competitor's process failed. The message has the last lines that it printed."""


class Child:
    """A competitor's process, suspended unless it executes a command.

    Args:
      name: a key of `COMPETITORS`.
      device: "cpu" or "gpu".
      data: .npz file with `images` and `labels`.
      say: receives a message when packages are installed.
      cache: folder of JAX's persistent compilation cache; None disables it.

    Raises:
      ChildError: if packages cannot be installed.
    """

    def __init__(
        self,
        name: str,
        device: str,
        data: Path,
        say: Callable[[str], None],
        cache: str | None = None,
    ) -> None:
        python = _interpreter(name, device, say)
        competitor = COMPETITORS[name]
        self._data = data
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        variables = {
            "BENCH_STARTED": repr(time.time()),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # Several processes share the GPU's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "JAX_PLATFORMS": "cuda" if device == "gpu" else "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": str(cache is not None),
            "JAX_COMPILATION_CACHE_DIR": cache or "",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **competitor.variables,
        }
        if device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = "-1"
        self._process = subprocess.Popen(  # noqa: S603 (our own command)
            [python, FOLDER / "worker.py", competitor.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | variables,
            # Ctrl-C reaches only this process, which then ends its children.
            process_group=0,
        )

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def prepare(self, case: Case, options: Mapping[str, bool]) -> Any:
        """Creates the competitor and takes its first step."""
        return self.ask("prepare", case=case, path=str(self._data), **options)

    def call(self, function: str, case: Case) -> Any:
        """Calls a function of the competitor's module."""
        return self.ask("call", function=function, case=case, path=str(self._data))

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a command and waits for the reply.

        Raises:
          ChildError: if the process ends before it replies.
        """
        stdin, stdout = self._pipes
        with contextlib.suppress(BrokenPipeError):
            os.killpg(self._process.pid, signal.SIGCONT)
            print(json.dumps({"do": do} | arguments), file=stdin, flush=True)
        reply = stdout.readline()
        if not reply:
            status = self._process.wait()
            self._log.seek(0)
            lines = self._log.read().splitlines()[-8:]
            raise ChildError("\n".join([f"ended with status {status}", *lines]))
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(reply)

    def close(self) -> None:
        """Ends the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (*self._pipes, self._log):
            with contextlib.suppress(BrokenPipeError):  # an unread command
                stream.close()


def _interpreter(name: str, device: str, say: Callable[[str], None]) -> Path:
    """Returns the competitor's interpreter; installs its packages at first use."""
    if COMPETITORS[name].requirements is None:
        return Path(sys.executable)
    environment = f"{COMPETITORS[name].requirements}-{device}"
    requirements = FOLDER / "requirements" / f"{environment}.txt"
    content = requirements.read_bytes() + sys.version.encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fmnist_jax" / "bench" / f"{environment}-{sha256_bytes(content)[:8]}"
    complete, python = folder / "complete", folder / "bin" / "python"
    if not complete.exists():
        say(f"installing {environment} into {folder}")
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", "--clear", folder],
            [python, "-m", "pip", "install", "--quiet", "--requirement", requirements],
        ]
        for command in commands:
            done = subprocess.run(  # noqa: S603 (our own command)
                command, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise ChildError(f"{environment} cannot be installed\n{done.stderr[-2000:]}")
        complete.touch()
    return python
