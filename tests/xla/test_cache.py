"""The persistent compilation cache."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from fmnist_jax.commands import run as run_command
from fmnist_jax.xla.cache import enable_compilation_cache

PROGRAM = """
import collections, json, sys, warnings
from pathlib import Path
import jax, jax.numpy as jnp
from jax import monitoring
from fmnist_jax.xla.cache import enable_compilation_cache, remove_unreadable_entry
from fmnist_jax.xla.jit import platform_jit

warnings.showwarning = lambda message, *_args, **_kwargs: remove_unreadable_entry(str(message))
seen = collections.Counter()
monitoring.register_event_listener(lambda name, **_: seen.update([name.rpartition("/")[2]]))
folder = enable_compilation_cache(Path(sys.argv[1]))

@platform_jit()
def mix(x):
    return jnp.sin(x) @ jnp.cos(x)

result = float(mix(jnp.arange(9.0).reshape(3, 3)).sum())
print(json.dumps({"folder": str(folder), "hits": seen["cache_hits"], "result": result}))
"""


def run_program(directory: Path) -> dict:
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def _no_cache_directory(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")


def test_programs_are_cached_across_processes(tmp_path):
    first = run_program(tmp_path)
    entries = sorted(Path(first["folder"]).glob("*-cache"))
    assert first["hits"] == 0
    assert entries
    second = run_program(tmp_path)
    assert second["hits"] == len(entries)
    assert sorted(Path(second["folder"]).glob("*-cache")) == entries
    assert second["result"] == first["result"]

    # Damaged entries are recompiled and replaced.
    for number, path in enumerate(entries):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else b"")
    third = run_program(tmp_path)
    assert third["hits"] == 0
    assert third["result"] == first["result"]
    assert run_program(tmp_path)["hits"] == len(entries)


@pytest.fixture
def folder(tmp_path):
    """Calls `enable_compilation_cache` as a new process would."""

    def call() -> Path:
        jax.config.update("jax_compilation_cache_dir", None)
        folder = enable_compilation_cache(tmp_path)
        assert folder is not None
        return folder

    return call


def test_folder_depends_on_versions_processor_and_flags(folder, monkeypatch):
    folders = {folder(), folder()}
    assert len(folders) == 1
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 0.99")
    folders.add(folder())
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    folders.add(folder())
    monkeypatch.undo()
    read_text = Path.read_text

    def read(path, *args, **kwargs):
        other = "model name : Another\nflags : fpu vme\n"
        return other if path == Path("/proc/cpuinfo") else read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    folders.add(folder())
    assert len(folders) == (4 if Path("/proc/cpuinfo").exists() else 3)


def test_existing_cache_directory_is_unchanged(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert enable_compilation_cache(tmp_path / "other") == tmp_path / "mine"


@pytest.mark.parametrize(("flags", "cached"), [([], True), (["--no-cache"], False)])
def test_no_cache_flag_disables_the_cache(flags, cached, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        assert run_command.main(["--list", *flags]) == 0
        assert jax.config.jax_enable_compilation_cache == cached  # type: ignore[attr-defined]
        assert bool(jax.config.jax_compilation_cache_dir) == cached  # type: ignore[attr-defined]
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
