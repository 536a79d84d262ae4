"""A run in several processes that are killed, stopped and restarted has the bits of one process."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

import fmnist_jax as fm
from fmnist_jax.distributed import processes
from fmnist_jax.distributed.watchdog import LOST_STATUS
from fmnist_jax.runs import files, verify
from tests.flags import alike
from tests.runs.test_crash import CHILD, FLAGS, TIMEOUT

SHARDED = [*FLAGS, "--shards", "4", "--no-tta"]
LOST = "the same command resumes the run"


class Group:
    """Starts the processes of a run; each has two threads, as one process on two cores has."""

    def __init__(self, cache):
        environment = {"XDG_CACHE_HOME": str(cache), "NPROC": "2"}
        self.environment = {**os.environ, **alike(), **environment}

    def start(self, workdir, instants, *flags, ranks_flags=(), ranks_groups=(None, None)):
        """Starts a process for each instant (see `crash_child`); one is not distributed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        children = []
        for rank, instant in enumerate(instants):
            own = list(ranks_flags[rank]) if ranks_flags else []
            variables = {}
            if len(instants) > 1:
                own.append("--distributed")
                variables = {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(len(instants)),
                    "JAX_PROCESS_ID": str(rank),
                }
            command = [sys.executable, str(CHILD), instant, *SHARDED, *flags, *own]
            children.append(
                subprocess.Popen(
                    [*command, "--workdir", str(workdir)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=self.environment | variables,
                    group=ranks_groups[rank],
                )
            )
        return children

    def run(self, workdir, instants, *flags, **options):
        """Waits for the processes and returns their statuses and errors."""
        children = self.start(workdir, instants, *flags, **options)
        errors = [child.communicate(timeout=TIMEOUT)[1] for child in children]
        return [child.returncode for child in children], errors

    def finish(self, workdir, num_processes):
        statuses, errors = self.run(workdir, ["never"] * num_processes)
        assert statuses == [0] * num_processes, errors


@pytest.fixture(scope="module")
def group(cache_home):
    return Group(cache_home)


@pytest.fixture(scope="module")
def expected(group, tmp_path_factory):
    """The outcome of one process."""
    workdir = tmp_path_factory.mktemp("distributed") / "straight"
    group.finish(workdir, 1)
    return verify.outcome(workdir)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_resumes(group, expected, tmp_path):
    for killed, instant in [(1, "train_steps:3"), (0, "rename:1")]:
        instants = ["never", "never"]
        instants[killed] = instant
        statuses, errors = group.run(tmp_path / "run", instants)
        assert statuses[killed] == -signal.SIGKILL
        assert statuses[1 - killed] == LOST_STATUS, errors
        assert errors[1 - killed].strip().endswith(LOST)
    group.finish(tmp_path / "run", 1)
    assert verify.outcome(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(group, expected, tmp_path):
    children = group.start(tmp_path / "run", ["never", "hang-train_steps:3"])
    assert any(line == "hanging\n" for line in children[1].stdout)
    children[1].send_signal(signal.SIGTERM)
    errors = [child.communicate(timeout=TIMEOUT)[1] for child in children]
    assert [child.returncode for child in children] == [128 + signal.SIGTERM] * 2, errors
    assert "the state is saved" in errors[0]
    assert fm.load_checkpoint(tmp_path / "run").step > 0
    group.finish(tmp_path / "run", 2)
    assert verify.outcome(tmp_path / "run") == expected


@pytest.mark.parametrize(
    "stopped",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.soak)],
)
def test_a_stopped_process_ends_the_others_within_the_heartbeat(stopped, group, expected, tmp_path):
    instants = ["never", "never"]
    instants[stopped] = "hang-train_steps:2"
    children = group.start(tmp_path / "run", instants)
    assert any(line == "hanging\n" for line in children[stopped].stdout)
    children[stopped].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, errors = children[1 - stopped].communicate(timeout=TIMEOUT)
    seconds = time.monotonic() - begun
    children[stopped].kill()
    children[stopped].communicate()
    print(f"ended {seconds:.1f} s after the stop")
    assert children[1 - stopped].returncode == LOST_STATUS, errors
    assert seconds < 2 * processes.HEARTBEAT_SECONDS
    group.finish(tmp_path / "run", 1)
    assert verify.outcome(tmp_path / "run") == expected


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(group, tmp_path):
    seeds = (["--seed", "0"], ["--seed", "1"])
    statuses, errors = group.run(tmp_path / "run", ["never", "never"], ranks_flags=seeds)
    assert statuses == [2, 2], errors
    assert "settings of process 1 differ from those of process 0" in errors[0]
    assert "seed: 0 in process 0, 1 here" in errors[1]
    assert not (tmp_path / "run" / files.CONFIG).exists()


@pytest.mark.slow
def test_an_engine_is_needed(group, tmp_path):
    statuses, errors = group.run(tmp_path / "run", ["never"], "--distributed")
    assert statuses == [2]
    assert "\nerror: the processes cannot be connected" in errors[0]


@pytest.mark.soak
@pytest.mark.parametrize("lost", [0, 1])
def test_a_network_that_drops_the_packets_of_one_process(lost, group, expected, tmp_path):
    """Needs root and iptables, which tells the packets of a process by its group."""
    instants = ["never", "never"]
    instants[lost] = "hang-train_steps:2"
    groups = [4242 if rank == lost else None for rank in range(2)]
    rule = ["OUTPUT", "--out-interface", "lo", "--match", "owner", "--gid-owner", "4242"]
    rule += ["--jump", "DROP"]
    children = group.start(tmp_path / "run", instants, ranks_groups=groups)
    assert any(line == "hanging\n" for line in children[lost].stdout)
    subprocess.run(["iptables", "--append", *rule], check=True)
    try:
        errors = [child.communicate(timeout=TIMEOUT)[1] for child in children]
    finally:
        subprocess.run(["iptables", "--delete", *rule], check=True)
    assert [child.returncode for child in children] == [LOST_STATUS] * 2, errors
    group.finish(tmp_path / "run", 1)
    assert verify.outcome(tmp_path / "run") == expected


@pytest.mark.soak
def test_a_hundred_kills_under_mpirun(group, expected, tmp_path):
    generator = random.Random(0)
    kills = runs = 0
    while kills < 100:
        workdir = tmp_path / f"run-{runs}"
        for _ in range(min(generator.randint(4, 10), 100 - kills)):
            if not _kill_under_mpirun(group, workdir, generator):
                break  # it has finished
            kills += 1
        group.finish(workdir, generator.choice([1, 2]))
        assert verify.outcome(workdir) == expected
        runs += 1
    print(f"{kills} kills in {runs} runs, and not a bit differs")


def _kill_under_mpirun(group, workdir, generator):
    """Starts two processes and kills one; returns whether it was killed before it finished."""
    command = ["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    command += [sys.executable, str(CHILD), "never", *SHARDED, "--distributed"]
    engine = subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=group.environment,
    )
    time.sleep(generator.uniform(0.5, 7))
    found = subprocess.run(
        ["pgrep", "-f", f"crash_child.*{workdir}"], capture_output=True, text=True, check=False
    )
    ranks = [int(line) for line in found.stdout.split() if int(line) != engine.pid]
    if ranks and engine.poll() is None:
        os.kill(generator.choice(ranks), signal.SIGKILL)
    output, _ = engine.communicate(timeout=TIMEOUT)
    assert engine.returncode in (0, LOST_STATUS, 128 + signal.SIGKILL), output
    return engine.returncode != 0


@pytest.mark.parametrize(
    "address", ["localhost", ":4567", "localhost:", "localhost:x", "localhost:99999"]
)
def test_an_address_without_a_port_is_refused(address, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    with pytest.raises(fm.errors.ConfigError, match=f"is '{address}'; expected host:port"):
        processes.start()


def test_a_port_in_use_is_refused(monkeypatch):
    with socket.create_server(("", 0)) as other:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{other.getsockname()[1]}")
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        with pytest.raises(
            fm.errors.ConfigError, match=r"cannot be used: .*Address already in use"
        ):
            processes.start()
