"""bench.py and time_to_accuracy.py, on small networks."""

import json

import jax
import numpy as np
import pytest
import summary
from linen_loop import create, init
from networks import ARCHS, keras_networks
from ours import compare_steps, flops
from worker import Case

from tests.conftest import ROOT, load_module


@pytest.fixture(scope="module")
def bench():
    return load_module(ROOT / "experiments" / "bench" / "bench.py")


@pytest.fixture(scope="module")
def time_to_accuracy():
    return load_module(ROOT / "experiments" / "bench" / "time_to_accuracy.py")


def record(speeds, losses=None):
    losses = losses or [2.0 - number / 10 for number in range(len(speeds))]
    rounds = [
        {"steps": 100, "seconds": 12_800 / speed, "loss": loss}
        for speed, loss in zip(speeds, losses, strict=True)
    ]
    return {"rounds": rounds, "first_loss": 2.3}


def test_ratios_are_taken_round_by_round():
    competitors = {"fmnist_jax": record([400.0, 300.0, 500.0]), "peer": record([200.0, 100.0, 250])}
    result = {"case": {"batch_size": 128}, "competitors": competitors}
    assert summary.ratios(result, "peer") == pytest.approx([2, 3, 2])


@pytest.mark.parametrize(
    ("losses", "problem"), [([2.2, None], "not finite"), ([2.2, 2.4], "not lower")]
)
def test_wrong_losses_are_found(bench, losses, problem):
    bench.check_losses("peer", record([100.0, 100.0], [2.2, 2.1]))
    with pytest.raises(bench.CompetitorError, match=f"peer: .*{problem}"):
        bench.check_losses("peer", record([100.0, 100.0], losses))


@pytest.mark.parametrize(("loss", "update"), [(1e-4, 1e-3), (1e-6, 0.1), (1e-6, float("nan"))])
def test_steps_that_differ_from_a_plain_network_are_found(bench, loss, update):
    bench.check_steps(loss=1e-6, update=1e-3)
    with pytest.raises(bench.CompetitorError, match="fmnist_jax: losses differ"):
        bench.check_steps(loss, update)


# Those of PyTorch's networks, too, which these tests cannot import.
PARAMS = dict(zip(ARCHS, (669_706, 61_706, 77_562, 17_802, 64_234, 204_938), strict=True))
# Multiplications and additions of layers per image, in millions: three times those of the forward
# pass, less the gradient of the images.
MEGAFLOPS = dict(zip(ARCHS, (3.21, 2.26, 55.8, 18.8, 73.5, 65.4), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_networks_of_two_frameworks_have_equal_numbers_of_parameters(arch):
    case = Case(arch, 8)
    params, _ = jax.eval_shape(lambda: init(create(case), case))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMS[arch]
    weights = keras_networks.create(arch).trainable_variables
    assert sum(np.prod(weight.shape) for weight in weights) == PARAMS[arch]


@pytest.mark.parametrize("arch", ARCHS)
def test_flops_are_counted_by_the_definitions_of_the_layers(arch):
    assert flops(Case(arch, 8)) / 8e6 == pytest.approx(MEGAFLOPS[arch], rel=0.08)


@pytest.mark.parametrize(
    ("arch", "stock"),
    [pytest.param("small_resnet", False, marks=pytest.mark.slow), ("valid_2x2", True)],
)
def test_stock_networks_take_the_steps_of_a_plain_loop(bench, sample, tmp_path, arch, stock):
    path = tmp_path / "data.npz"
    np.savez(path, images=sample.train_images, labels=sample.train_labels)
    bench.check_steps(**compare_steps(str(path), Case(arch, 8), stock=stock))


@pytest.mark.slow
def test_small_benchmark(bench, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.fm, "load_fashion_mnist", lambda: sample)
    arguments = ["--arch", "valid_2x2", "--batch-size", "8", "--rounds", "2", "--seconds", "0.2"]
    arguments += ["--competitor", "linen", "--workdir", str(tmp_path)]
    assert bench.main(arguments) == 0
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    ours, linen = (result["competitors"][name] for name in ("fmnist_jax", "linen"))
    assert len(ours["rounds"]) == len(linen["rounds"]) == 2
    assert min(ours["first_step_seconds"], linen["first_step_seconds"]) > 0
    assert result["difference"]["loss"] < 1e-5
    # The layers take 0.37, 2.36 and 0.59 MFLOP forward, and twice that backward, less the gradient
    # of the images. Other operations come on top.
    assert 9.6e6 < result["flops_per_step"] / 8 < 13e6
    assert "fmnist_jax over it" in capsys.readouterr().out


def test_invalid_flag_prints_one_message(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--rounds", "0"])
    assert stop.value.code == 2
    assert "--rounds is 0; expected a number above 0" in capsys.readouterr().err


def test_an_accuracy_is_reached_by_the_mean_over_seeds(time_to_accuracy):
    curves = [[(1.0, 0.5), (2.0, 0.7), (3.0, 0.9)], [(1.2, 0.8), (2.4, 0.9), (3.6, 0.8)]]
    assert time_to_accuracy.first_reached(curves, 0.75) == pytest.approx(2.2)
    assert time_to_accuracy.first_reached(curves, 0.65) == pytest.approx(1.1)
    assert time_to_accuracy.first_reached(curves, 0.95) is None


@pytest.mark.slow
def test_time_to_accuracy_on_a_few_images(time_to_accuracy, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_to_accuracy.fm, "load_fashion_mnist", lambda: sample)
    arguments = ["--curve", "fmnist_jax, sprint_91", "--seeds", "1", "--epochs", "2"]
    assert time_to_accuracy.main([*arguments, "--workdir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "time_to_accuracy.json").read_text())
    (curves,) = report["curves"].values()
    seconds, accuracies = np.moveaxis(np.array(curves), -1, 0)
    assert seconds.shape == (1, 2)
    assert np.all(np.diff(seconds) > 0)
    assert np.all(accuracies > 0.3)
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 5000
    assert "fmnist_jax, sprint_91" in capsys.readouterr().out
