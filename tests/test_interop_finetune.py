"""Recipes: what model they have, by what they start from, and that every one of them is possible."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from support import ROOT, drawn, tiny_config

from mg3d_jax import config as config_lib
from mg3d_jax import registry
from mg3d_jax.commands.benchmark import recipes
from mg3d_jax.commands.finetune import recipe_with
from mg3d_jax.commands.main import main
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.interop import finetune
from mg3d_jax.interop.tower import Tower, save_tower
from mg3d_jax.phantom.layouts.base import make_miniature
from mg3d_jax.prepare import Settings, prepare
from mg3d_jax.registry import VOLUME_TOWERS

WINDOWS = ((-1000.0, 600.0),)


def begun(arg: str, **options):
    given = {"volume_size": (64, 64, 64), "windows": WINDOWS, "heads": ("classification_head",)} | options
    config = finetune.begin(arg, "mine", **given)
    config.tasks.classification.weight = 1.0
    return config_lib.typed(config)


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("arg", ["", "small", "probe"])
def test_every_recipe_is_possible(name, arg):
    file = f"configs/downstream/{name}.py"
    config = config_lib.load(f"{file}:{arg}" if arg else file)
    checks.validate(config)
    assert [one.weight for one in config.objectives.values() if one.weight] == []
    beside = ["classification"] if config.tasks["generation"].findings else []  # what finds what the decoder reads
    assert len([task for task, options in config.tasks.items() if options.weight > 0 and task not in beside]) == 1
    said = (ROOT / file).read_text().split('"""')[1]
    assert f"configs/downstream/{name}.py" in said and "mg3d finetune" in said


def test_from_nothing_and_small_and_probe():
    config = begun("")
    assert (config.model.volume_size, config.data.windows, config.init_from.path) == ((64, 64, 64), WINDOWS, "")
    assert config.optimizer.freeze == ("(?!volume_encoder/|classification_head/).*",)
    small = begun("small")
    assert small.model.volume_size == finetune.SMALL_SIZE and small.model.volume_encoder.preset == "pico"
    probe = begun("small,probe")
    assert probe.model.volume_encoder.frozen_layers == -1 and probe.optimizer.layer_decay == 1.0
    with pytest.raises(UserError, match="are several things to start from"):
        begun("one,two")
    with pytest.raises(UserError, match="nothing to start from"):
        begun("nowhere")


def test_from_a_run(old_run):
    """Its volume encoder and windows; with reports all that it reads texts with."""
    theirs = config_lib.read(old_run / "config.json")
    config = begun(f"{old_run}@2", volume_size=(16, 16, 16))
    assert config.init_from.path == f"{old_run}@2" and config.init_from.take == ("volume_encoder/.*",)
    assert config.model.volume_encoder == theirs.model.volume_encoder and config.data.windows == theirs.data.windows
    whole = begun(str(old_run), volume_size=(16, 16, 16), reports=True)
    assert whole.model.report_encoder == theirs.model.report_encoder and whole.init_from.take == (".*",)
    assert whole.data.tokenizer == str(old_run / "tokenizer")


def test_the_pooling_of_a_run(old_run, tmp_path):
    """A layer of all tokens, as the quickstart has, is kept on volumes of its size; nothing asks for it elsewhere."""
    theirs = json.loads((old_run / "config.json").read_text())
    theirs["model"]["volume_encoder"]["pooling"] = "flatten"
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    (tmp_path / "tokenizer").mkdir()
    for size, pooling in (((16, 16, 16), "flatten"), ((32, 16, 16), "mean")):
        for reports in (False, True):
            config = begun(str(tmp_path), volume_size=size, reports=reports)
            assert (config.model.volume_encoder.pooling, config.init_from.leave) == (pooling, ())
    assert begun("small").model.volume_encoder.pooling == "flatten"
    segments = config_lib.load(f"configs/downstream/msd_lung.py:{tmp_path}")
    assert segments.model.volume_encoder.pooling == "mean" and segments.init_from.leave == ()


def test_from_an_imported_tower(tmp_path):
    """Kind, preset and options are found in the folder; other sizes are an error."""
    model = tiny_config(model__volume_encoder__preset="pico", model__volume_encoder__exact_gelu=True).model
    module = VOLUME_TOWERS["vit"].build(model, 1)
    fields = {
        name: getattr(module, name)
        for name in ("width", "depth", "num_heads", "mlp_ratio", "patch_size", "volume_size", "channels", "exact_gelu")
    }
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 16, 16, 16, 1), np.float32))["params"]
    save_tower(Tower("vit", fields, drawn(nn.unbox(shapes)), "somewhere"), tmp_path / "tower")
    encoder = begun(str(tmp_path / "tower")).model.volume_encoder
    assert (encoder.kind, encoder.preset, encoder.options.patch_size) == ("vit", "pico", (8, 8, 8))
    assert encoder.options.exact_gelu
    about = json.loads((tmp_path / "tower" / "tower.json").read_text())
    about["encoder"]["width"] = 100
    (tmp_path / "tower" / "tower.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="which no preset of this version is"):
        begun(str(tmp_path / "tower"))
    with pytest.raises(UserError, match="reads 1 channels, the recipe has 2 windows"):
        begun(str(tmp_path / "tower"), windows=WINDOWS * 2)


def test_the_command_puts_the_source_into_the_argument():
    assert recipe_with("a.py", None) == "a.py" and recipe_with("a.py", "RUN@3") == "a.py:RUN@3"
    assert recipe_with("a.py:small", "RUN") == "a.py:small,RUN"


def test_a_recipe_from_miniature_to_intervals(tmp_path):
    """Folds of the miniature, two steps of a plain tower, and the numbers of the fold that was held out. The labels of half of
    the patients are read."""
    registry.load_plugins(("plain_towers",))
    root = tmp_path / "mini"
    make_miniature(root, "cc-ccii", 12, 0)
    for fold in range(2):
        settings = {"size": (16, 16, 16), "fold": (fold, 2), "workers": 1, "qa_samples": 0}
        prepare(Settings.of(source="cc-ccii", root=root, split="all", out=tmp_path / f"fold{fold}", **settings))
    options = {
        "data.train": str(tmp_path / "fold1"), "data.patients_percent": 50.0, "data.batch_size": 8, "training.steps": 2,
        "model.volume_size": "(16,16,16)", "plugins": "('plain_towers',)", "model.volume_encoder.kind": "cubes",
        "model.volume_encoder.preset": "plain", "model.volume_encoder.pooling": "mean", "training.writers": "('jsonl',)",
        "model.volume_encoder.patch_size": "(16,16,16)", "model.volume_encoder.positions": "sincos",
        "model.volume_encoder.layer_scale": 0.0, "model.report_encoder.kind": "words", "model.report_encoder.preset": "plain",
        "model.projection_dim": 16, "evaluations.classification.draws": 50,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in options.items()]
    command = ["finetune", "--config", "configs/downstream/cc_ccii.py:small", "--workdir", str(tmp_path / "run")]
    assert main([*command, "--test", str(tmp_path / "fold0"), *words]) == 0
    found = json.loads((tmp_path / "run" / "test" / "evaluation.json").read_text())
    one = found["classification"]
    assert (found["volumes"], found["step"], one["kind"]) == (6, 2, "multi_class")
    assert set(one["by_class"]) == {"Normal", "CP", "NCP"} and len(one["accuracy_95"]) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["unique_records"] == 3
