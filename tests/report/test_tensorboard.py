"""Event files have the log of a run, without double points after a crash."""

import dataclasses
import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError, EnvironmentWarning
from fmnist_jax.report.run import write_report
from fmnist_jax.report.tensorboard import TensorBoardHook
from fmnist_jax.runs import files
from tests.small import LINEAR, SMALL, colour_dataset


class Crash(fm.Hook):
    """Raises after an epoch was logged and before it is saved."""

    def __init__(self, epoch):
        self.at = epoch

    def epoch(self, log):
        if log.epoch == self.at:
            raise RuntimeError("crash")


@pytest.fixture
def run(tmp_path):
    recipe = fm.Recipe(arch=SMALL, epochs=3, batch_size=50, learning_rate=0.01)
    return fm.Run(recipe=recipe, workdir=tmp_path / "run", train_examples=200, log_grad_norms=True)


def read(folder):
    sizes = {"scalars": 0, "images": 0, "histograms": 0}
    return EventAccumulator(str(folder), size_guidance=sizes).Reload()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_a_crashed_run_has_no_double_points(run, sample, tmp_path):
    def fit(*hooks):
        return fm.fit(run, sample, hooks=[TensorBoardHook(tmp_path / "events"), *hooks])

    for epoch in (1, 3):
        with pytest.raises(RuntimeError, match="crash"):
            fit(Crash(epoch))
    fit()
    events = read(tmp_path / "events")
    lines = files.read_lines(run.workdir / files.METRICS)
    for split in ("train", "val"):
        expected = [line for line in lines if line["split"] == split]
        for name in ("loss", "accuracy"):
            points = events.Scalars(f"{name}/{split}")
            assert [point.step for point in points] == [4, 8, 12]
            np.testing.assert_allclose(
                [point.value for point in points], [line[name] for line in expected], rtol=1e-6
            )
    for name in ("grad_norm", "param_norm", "update_norm"):
        assert len(events.Scalars(f"{name}/train")) == 3
    histogram = events.Histograms("params/Conv_0/kernel")[-1]
    state = fm.load_checkpoint(run.workdir)
    kernel = state.arrays["state.params.Conv_0.kernel"]
    assert histogram.histogram_value.num == kernel.size
    assert histogram.histogram_value.max == pytest.approx(kernel.max())
    for name in ("confusion/val", "misclassified/val"):
        assert [image.step for image in events.Images(name)] == [4, 8, 12]
    hparams = read(tmp_path / "events" / "hparams")
    report = files.read_json(run.workdir / files.REPORT)
    (point,) = hparams.Scalars("hparam/test_accuracy")
    assert point.value == pytest.approx(report["test_accuracy"])
    data = hparams.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"learning_rate" in data


def test_norms_are_part_of_the_settings(run, sample):
    fm.fit(run, sample, hooks=())
    other = dataclasses.replace(run, log_grad_norms=False)
    with pytest.raises(fm.errors.ConfigError, match="log_grad_norms: True"):
        fm.fit(other, sample, hooks=())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_figure_that_cannot_be_drawn_costs_no_training(run, sample, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.warns(EnvironmentWarning, match="a figure cannot be drawn.*no font"):
        result = fm.fit(run, sample, hooks=[TensorBoardHook(run.workdir / "tensorboard")])
    assert result.report["steps"]
    with pytest.raises(ConfigError, match="a figure cannot be drawn; the results are kept"):
        write_report(run.workdir)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_misclassified_images_keep_their_colours(tmp_path):
    recipe = fm.Recipe(arch=LINEAR, epochs=1, batch_size=20, learning_rate=1e-7)
    run = fm.Run(recipe=recipe, workdir=tmp_path / "run", tta=False)
    fm.fit(run, colour_dataset(num_classes=25), hooks=[TensorBoardHook(tmp_path / "events")])
    events = read(tmp_path / "events")
    for name in ("misclassified/val", "confusion/val"):
        (image,) = events.Images(name)
        with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
            pixels = np.asarray(picture).astype(int)
        assert max(pixels.shape) < 1800
        assert (np.ptp(pixels, axis=2) > 60).any()
