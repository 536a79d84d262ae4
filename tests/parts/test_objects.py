"""Parts of a user: import paths, objects, what config.json says of them, and what is refused."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.data.augment import RandomAffine
from fmnist_jax.digest import sha256_file, sha256_json
from fmnist_jax.errors import ConfigError, EnvironmentWarning, Interrupted
from fmnist_jax.parts.imports import Origin, find
from fmnist_jax.parts.objects import KEYWORDS, create_part, find_sources, with_objects
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import create_plan
from tests import nets
from tests.small import SMALL, Small

NETS = Path(nets.__file__)
OWN = fm.Recipe(
    arch="tests.nets:LinenNet", arch_options={"width": 3},
    optimizer="tests.nets:clipped_adamw", optimizer_options={"norm": 0.5}, weight_decay=0.01,
    loss="tests.nets:focal_loss", loss_options={"gamma": 1.0},
    augmentation="tests.nets:Brighten", augmentation_options={"most": 0.2},
    schedule="tests.nets:square_root", epochs=2, batch_size=16, val_fraction=0.2,
)  # fmt: skip


def make_run(workdir, recipe=OWN, **changes):
    return fm.Run(recipe=dataclasses.replace(recipe, **changes), workdir=workdir)


class Activated(nn.Module):
    """A network with an argument that is no JSON."""

    num_classes: int = 10
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, images, *, train):
        x = self.activation(nn.Dense(4)(images.reshape(len(images), -1)))
        return nn.Dense(self.num_classes)(x)


class StopAt(fm.Hook):
    def __init__(self, epoch):
        self.at = epoch

    def epoch(self, log):
        return log.epoch == self.at


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    workdir = tmp_path_factory.mktemp("own") / "run"
    return fm.fit(make_run(workdir), tiny, hooks=()), workdir


def test_a_run_of_own_parts_resumes_and_loads_from_its_folder(finished, tiny, tmp_path):
    result, workdir = finished
    with pytest.raises(Interrupted):
        fm.fit(make_run(tmp_path), tiny, hooks=[StopAt(1)])
    resumed = fm.fit(make_run(tmp_path), tiny, hooks=())
    chex.assert_trees_all_equal(resumed.state, result.state)
    assert resumed.report["params_sha256"] == result.report["params_sha256"]

    classifier = fm.load_classifier(workdir)
    assert classifier.model == nets.LinenNet(num_classes=10, width=3)
    logits = files.read_arrays(workdir / files.PREDICTIONS)["logits"]
    np.testing.assert_allclose(classifier.logits(tiny.test_images), logits, rtol=1e-4, atol=1e-5)
    config = json.loads((workdir / "config.json").read_text())
    assert config["recipe"]["arch"] == "tests.nets:LinenNet"
    assert config["recipe"]["arch_options"] == {"width": 3}
    assert {source["file"] for source in config["sources"].values()} == {str(NETS)}
    assert sorted(config["sources"]) == sorted(KEYWORDS)


@pytest.mark.parametrize("network", nets.NETS[1:])
def test_other_frameworks_resume_and_load(network, tiny, tmp_path):
    recipe = fm.Recipe(arch=f"tests.nets:{network.__name__}", epochs=2, batch_size=16)
    result = fm.fit(make_run(tmp_path / "straight", recipe), tiny, hooks=())
    run = make_run(tmp_path / "stopped", recipe)
    with pytest.raises(Interrupted):
        fm.fit(run, tiny, hooks=[StopAt(1)])
    resumed = fm.fit(run, tiny, hooks=())
    chex.assert_trees_all_equal(resumed.state, result.state)
    assert resumed.report["params_sha256"] == result.report["params_sha256"]
    logits = files.read_arrays(run.workdir / files.PREDICTIONS)["logits"]
    classifier = fm.load_classifier(run.workdir)
    np.testing.assert_allclose(classifier.logits(tiny.test_images), logits, rtol=1e-4, atol=1e-5)


def test_parts_are_what_their_names_say(tiny, tmp_path):
    """Each part against the object that a user would construct."""
    plan = create_plan(make_run(tmp_path), tiny)
    config = plan.config
    assert config.augment == nets.Brighten(0.2)
    assert config.schedule is nets.square_root
    logits, labels = jnp.eye(3), jnp.arange(3)
    np.testing.assert_array_equal(
        config.loss(logits, labels), nets.focal_loss(logits, labels, gamma=1.0)
    )
    params = {"w": jnp.ones((2, 2))}
    grads = {"w": jnp.full((2, 2), 3.0)}
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.01))
    expected, _ = tx.update(grads, tx.init(params), params)
    found, _ = config.tx.update(
        grads, config.tx.init(params), params, learning_rate=0.1, weight_decay=0.01
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    # Equal parts are one program.
    assert create_plan(make_run(tmp_path / "other"), tiny).config == config


def test_objects_give_the_run_of_their_names(finished, tiny, tmp_path):
    recipe = fm.Recipe(
        arch="small_dropout", epochs=2, batch_size=16, val_fraction=0.2, weight_decay=0.01
    )
    objects = {
        "model": nets.LinenNet(width=3),
        "tx": fm.with_learning_rate(nets.clipped_adamw, norm=0.5),
        "loss": find("tests.nets:focal_loss"),
        "augment": nets.Brighten(0.2),
        "schedule": nets.square_root,
    }
    run = with_objects(fm.Run(recipe=recipe, workdir=tmp_path), 10, **objects)
    recipe = dataclasses.replace(run.recipe, loss_options={"gamma": 1.0})
    assert recipe == OWN
    result = fm.fit(dataclasses.replace(run, recipe=recipe), tiny, hooks=())
    chex.assert_trees_all_equal(result.state, finished[0].state)


def test_objects_of_the_package_get_its_names(tmp_path):
    run = fm.Run(recipe=fm.RECIPES["sprint_91"], workdir=tmp_path)
    run = with_objects(
        run, 10, model=fm.create_model("same_3x3"), tx=fm.create_optimizer("sgd"),
        augment=RandomAffine(rotation=5.0), schedule=fm.create_schedule("cosine"),
    )  # fmt: skip
    recipe = run.recipe
    assert (recipe.arch, recipe.optimizer, recipe.schedule) == ("same_3x3", "sgd", "cosine")
    assert recipe.arch_options is None
    assert recipe.augmentation == "fmnist_jax.data.augment:RandomAffine"
    assert recipe.augmentation_options == {"rotation": 5.0}


def test_objects_without_a_name_train_and_say_so_when_they_are_loaded(tiny, tmp_path):
    class Local(Small):
        pass

    model = Local()
    run = make_run(tmp_path / "run", fm.Recipe(arch="small_dropout", epochs=1, batch_size=16))
    result = fm.fit(run, tiny, hooks=(), model=model)
    assert repr(result).startswith("Result(test_objects_without")
    with pytest.raises(ConfigError, match=r"cannot be imported .*by --arch or model="):
        fm.load_classifier(run.workdir)
    classifier = fm.load_classifier(run.workdir, model=model)
    assert classifier.logits(tiny.test_images).shape == (len(tiny.test_images), 10)
    # The same run with the named network is another one.
    with pytest.raises(ConfigError, match=r"recipe\.arch: "):
        fm.fit(run, tiny, hooks=(), model=Small())


def test_objects_with_other_arguments_are_asked_for_when_they_are_loaded(tiny, tmp_path):
    model = Activated(activation=nn.gelu)
    run = make_run(tmp_path / "run", fm.Recipe(arch="small_dropout", epochs=1, batch_size=16))
    result = fm.fit(run, tiny, hooks=(), model=model)
    assert result.model is model
    assert "gelu" in result.report["recipe"]["arch_options"]["object"]
    with pytest.raises(ConfigError, match=r"cannot be made from its name .* pass it as model="):
        fm.load_classifier(run.workdir)
    assert fm.load_classifier(run.workdir, model=model).model is model


def test_a_class_of_a_notebook_trains_and_is_asked_for_when_it_is_loaded(
    tiny, tmp_path, monkeypatch
):
    main = sys.modules["__main__"]
    network = type("Cell", (Small,), {"__module__": "__main__"})
    monkeypatch.setattr(main, "Cell", network, raising=False)
    run = make_run(tmp_path / "run", fm.Recipe(arch="small_dropout", epochs=1, batch_size=16))
    fm.fit(run, tiny, hooks=(), model=network)
    assert fm.load_classifier(run.workdir).model == network(num_classes=10)
    monkeypatch.delattr(main, "Cell")
    with pytest.raises(
        ConfigError, match=r"__main__:Cell cannot be imported .*by --arch or model="
    ):
        fm.load_classifier(run.workdir)
    assert fm.load_classifier(run.workdir, model=network).model == network(num_classes=10)


def test_a_file_is_named_by_its_path(tiny, tmp_path, monkeypatch):
    copy = tmp_path / "code" / "nets.py"
    copy.parent.mkdir()
    copy.write_text("import flax.linen as nn\n\n\nclass Net(nn.Module):\n"
                    "    num_classes: int = 10\n    width: int = 2\n\n    @nn.compact\n"
                    "    def __call__(self, x, *, train):\n"
                    "        x = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))\n"
                    "        return nn.Dense(self.num_classes)(x)\n")  # fmt: skip
    monkeypatch.chdir(copy.parent)
    run = make_run(tmp_path / "run", fm.Recipe(arch="nets.py:Net", epochs=1, batch_size=16))
    assert run.recipe.arch == f"{copy}:Net"
    fm.fit(run, tiny, hooks=())
    monkeypatch.chdir(tmp_path)
    assert type(fm.load_classifier(run.workdir).model).__name__ == "Net"
    # After a change a folder does not have it executed; the user can.
    copy.write_text(copy.read_text() + "# changed\n")
    with pytest.raises(ConfigError, match="another SHA-256, so it is not executed"):
        fm.load_classifier(run.workdir)
    with pytest.warns(EnvironmentWarning, match="the source of Net has changed"):
        fm.load_classifier(run.workdir, model=f"{copy}:Net")


def test_a_resumed_run_warns_of_a_changed_source(tiny, tmp_path):
    copy = tmp_path / "nets.py"
    shutil.copy(NETS, copy)
    run = make_run(tmp_path / "run", arch=f"{copy}:LinenNet", optimizer="adam",
                   optimizer_options=None)  # fmt: skip
    with pytest.raises(Interrupted):
        fm.fit(run, tiny, hooks=[StopAt(1)])
    copy.write_text(copy.read_text() + "\n")
    with pytest.warns(EnvironmentWarning, match=r"sources\.arch\.sha256"):
        fm.fit(run, tiny, hooks=())


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that exists once code of the folder has run."""
    path = tmp_path / "code_has_run"
    monkeypatch.setenv("MARK", str(path))
    return path


EVIL = (
    "import os, pathlib\npathlib.Path(os.environ['MARK']).touch()\n"
    "from tests.nets import LinenNet\n"
)


def test_a_folder_gets_no_code_run(finished, tmp_path, mark, monkeypatch):
    """A file inside it, a path that leads into it, a shadowing module, any callable."""
    folder = tmp_path / "folder"
    shutil.copytree(finished[1], folder)
    (folder / "inside.py").write_text(EVIL)
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text(EVIL)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    recorded = {"arch": {"file": "", "sha256": sha256_file(folder / "inside.py")}}
    run = fm.Run(recipe=OWN, workdir=folder)

    def attempt(name, /, **options):
        recipe = dataclasses.replace(OWN, arch=name, arch_options=options)
        return create_part(
            "arch", dataclasses.replace(run, recipe=recipe), 10, Origin(folder, recorded)
        )

    for name in (
        f"{folder}/inside.py:LinenNet", f"{tmp_path}/link/inside.py:LinenNet",
        "inside.py:LinenNet", f"{folder}/../folder/inside.py:LinenNet",
        "inside:LinenNet", "package:LinenNet",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="whose code is not executed"):
            attempt(name)
    outside = tmp_path / "outside.py"
    outside.write_text(EVIL)
    recorded["arch"]["sha256"] = "0" * 64
    with pytest.raises(ConfigError, match="another SHA-256"):
        attempt(f"{outside}:LinenNet")
    touch = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    for name, options in (
        ("subprocess:Popen", {"args": ["touch", str(mark)]}),
        ("os:system", {"command": f"touch {mark}"}),
        ("builtins:exec", {"source": touch}), ("runpy:run_path", {"path_name": "inside.py"}),
        ("ctypes:CDLL", {"name": str(mark)}), ("tests.nets:focal_loss", {"gamma": 1}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"is named by a folder|takes no options"):
            attempt(name, **options)
    for part in ("optimizer", "augmentation"):
        options = {"args": ["touch", str(mark)]}
        changes: Any = {part: "subprocess:Popen", f"{part}_options": options}
        recipe = dataclasses.replace(OWN, **changes)
        with pytest.raises(ConfigError, match="is named by a folder"):
            create_part(part, dataclasses.replace(run, recipe=recipe), 10, Origin(folder, {}))
    assert not mark.exists()
    # The user's own word counts.
    monkeypatch.setitem(sys.modules, "inside", None)
    assert find(f"{folder}/inside.py:LinenNet") is nets.LinenNet
    assert mark.exists()


def test_a_tampered_folder_is_refused(finished, tiny, tmp_path, mark):
    """Through `load_classifier` and `replay`, with the manifest made valid again."""
    folder = tmp_path / "folder"
    shutil.copytree(finished[1], folder)
    (folder / "inside.py").write_text(EVIL)
    name = f"{folder}/inside.py:LinenNet"
    sources = {"arch": {"file": str(folder / "inside.py"),
                        "sha256": sha256_file(folder / "inside.py")}}  # fmt: skip
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        content = json.loads(manifest.read_text())["content"]
        content["settings"]["recipe"]["arch"] = name
        content["settings"]["sources"] = sources
        manifest.write_text(json.dumps({"sha256": sha256_json(content), "content": content}))
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["arch"], config["sources"] = name, sources
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="whose code is not executed"):
        fm.load_classifier(folder)
    with pytest.raises(ConfigError, match="whose code is not executed"):
        fm.replay(folder, tiny, 1)
    assert not mark.exists()


def test_replay_calls_own_factories_only_for_the_user(finished, tiny):
    _, workdir = finished
    with pytest.raises(ConfigError, match="is not called for it; pass it yourself"):
        fm.replay(workdir, tiny, 3)
    own = {"loss": nets.focal_loss, "augment": nets.Brighten, "schedule": nets.square_root}
    with pytest.raises(ConfigError, match="tx= or --optimizer"):
        fm.replay(workdir, tiny, 3, **own)
    shown = fm.replay(workdir, tiny, 3, tx=nets.clipped_adamw, **own)
    assert np.isfinite(shown.losses).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "smal_dropout"}, "choose one of small_dropout"),
        ({"arch": "none"}, "choose one of small_dropout"),
        ({"arch": "no.such:Net"}, r"cannot be imported \(ModuleNotFoundError.*PYTHONPATH"),
        ({"arch": "tests.nets:Missing"}, "has no attribute 'Missing'"),
        ({"arch": "/no/such/nets.py:Net"}, r"cannot be imported \(FileNotFoundError"),
        ({"arch": "tests.nets:MOMENTUM"}, "MOMENTUM takes no options"),
        ({"arch": "tests.nets:MOMENTUM", "arch_options": None}, "gives float; expected a class"),
        ({"arch": "tests.nets:square_root", "arch_options": None}, "cannot be constructed"),
        ({"arch_options": {"widht": 2}}, "takes no such option: widht"),
        ({"optimizer": "tests.nets:focal_loss"}, "cannot be constructed with optimizer_options"),
        ({"optimizer": "optax:softmax_cross_entropy"}, "cannot be constructed"),
        ({"optimizer": "lion"}, "choose one of adam"),
        ({"loss": "tests.nets:MOMENTUM", "loss_options": None}, "gives float; expected a function"),
        (
            {"loss": "cross_entropy", "loss_options": {"a": 1}},
            "cannot be constructed with loss_opt",
        ),
        ({"schedule": "cosine", "schedule_options": {"a": 1}}, "cannot be constructed with sched"),
        ({"arch_options": {"width": {1, 2}}}, "expected names with numbers"),
        ({"arch_options": {"width": float("nan")}}, "expected names with numbers"),
    ],
)
def test_bad_parts_are_refused_in_one_line(changes, message, tiny, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        create_plan(make_run(tmp_path / "run", **changes), tiny)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_wrapped_functions_and_passed_on_arguments(tiny, tmp_path):
    recipe = fm.Recipe(
        arch="tests.nets:wider", arch_options={"width": 3, "rate": 0.5}, epochs=1, batch_size=16,
        loss="tests.nets:jitted_loss", loss_options={"gamma": 1.0},
    )  # fmt: skip
    plan = create_plan(make_run(tmp_path, recipe), tiny)
    assert plan.model == nets.LinenNet(num_classes=10, width=6, rate=0.5)
    logits, labels = jnp.eye(3), jnp.arange(3)
    expected = nets.focal_loss(logits, labels, gamma=1.0)
    np.testing.assert_allclose(plan.config.loss(logits, labels), expected, rtol=1e-6)
    assert plan.sources["loss"]["file"] == str(NETS)
    run = with_objects(make_run(tmp_path, recipe), 10, loss=nets.jitted_loss)
    assert run.recipe == recipe


def test_a_name_may_differ_from_the_place_of_the_source(tiny, tmp_path):
    """The package imports it from another module, as optax.contrib does."""
    recipe = fm.Recipe(arch=SMALL, epochs=1, batch_size=16, optimizer="optax.contrib:dadapt_adamw")
    fm.fit(make_run(tmp_path, recipe), tiny, hooks=())
    shown = fm.replay(tmp_path, tiny, 2, tx="optax.contrib:dadapt_adamw", model=SMALL)
    assert np.isfinite(shown.losses).all()


def test_an_object_with_an_array_is_recorded_by_its_text(tmp_path):
    @dataclasses.dataclass(frozen=True, eq=False)
    class Shifted:
        by: Any = None

        def __call__(self, key, epoch, examples, images, strength):
            return images[..., None] / 255 + self.by

    run = with_objects(make_run(tmp_path), 10, augment=Shifted(np.zeros(3)))
    assert list(run.recipe.augmentation_options or ()) == ["object"]


def test_other_keywords_are_refused(tiny, tmp_path):
    with pytest.raises(TypeError, match="unknown parts network; expected some of model, tx"):
        fm.fit(make_run(tmp_path), tiny, hooks=(), network=nets.LinenNet)  # type: ignore[call-arg]
    plan = create_plan(make_run(tmp_path), tiny, model="tests.nets:NnxNet")
    assert plan.run.recipe.arch == "tests.nets:NnxNet"


def test_the_source_of_a_notebook_is_its_text(tmp_path):
    """IPython keeps the text of a cell in `linecache`, and Python finds it by its file name."""
    import linecache

    def source_of(text):
        name = "<cell>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        cell: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(text, name, "exec"), cell)
        run = with_objects(make_run(tmp_path), 10, model=cell["Cell"])
        return find_sources(run, ("arch",))["arch"]

    text = (
        "class Cell:\n    def init(self, key, images, *, train):\n        return {}\n\n"
        "    def apply(self, variables, images, *, train):\n        return 1\n"
    )
    first, again, other = map(source_of, (text, text, text.replace("return 1", "return 2")))
    assert first == again
    assert first["file"] is None
    assert len(first["sha256"]) == 64
    assert first != other


def test_instances_with_parameters_are_refused(tmp_path):
    from flax import nnx

    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match="pass the class"):
        with_objects(run, 10, model=nets.NnxNet(rngs=nnx.Rngs(0)))


def test_options_of_named_augmentations_and_networks(tiny, tmp_path):
    recipe = fm.Recipe(
        arch="sprint", arch_options={"widths": [4, 8, 8]}, epochs=1, batch_size=8,
        augmentation="keras", augmentation_options={"rotation": 10},
    )  # fmt: skip
    config = create_plan(make_run(tmp_path, recipe), tiny).config
    assert vars(config.model)["widths"] == (4, 8, 8)
    assert config.augment == RandomAffine(rotation=10, keras_shear=True)


def test_importing_runs_a_file_once(tmp_path):
    code = tmp_path / "once.py"
    code.write_text("import flax.linen as nn\nclass Net(nn.Module):\n    pass\n")
    assert find(f"{code}:Net") is find(f"{code}:Net")
    assert nn.Module in find(f"{code}:Net").__mro__
    assert "once" not in sys.modules
