"""Files are written and locked on any file system."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from fmnist_jax.runs import files


def test_file_systems_that_cannot_sync_folders_are_used(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_json(tmp_path / "a.json", [1])
    assert files.read_json(tmp_path / "a.json") == [1]
    files.sync(tmp_path)


def test_other_failures_to_sync_a_folder_are_errors(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.sync(tmp_path)


@pytest.mark.parametrize("on_wait", [None, lambda: None])
def test_a_file_system_that_refuses_locks_is_named(on_wait, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(OSError, match="files cannot be locked there"),
        files.locked(tmp_path, on_wait=on_wait),
    ):
        pass


def test_a_full_disk_is_reported_with_the_file(tmp_path, monkeypatch):
    def refuse(_path, _content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_json(tmp_path / "a.json", [1])
    assert caught.value.filename == str(tmp_path / "a.json")
