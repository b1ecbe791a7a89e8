"""`configs/finetune.py` from a pre-trained run to the evaluation of the fine-tuned one, on phantoms."""

import json

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from support import OLD

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.config import checks
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.training import inputs
from mg3d_jax.training.restore import restore_run
from mg3d_jax.training.writers import read_metrics

CONFIG = "configs/finetune.py"
TRAIN, VALID = str(OLD / "train"), str(OLD / "valid")


def test_the_config_takes_what_the_run_was(old_run):
    config = config_lib.load(f"{CONFIG}:{old_run}", ["--config.data.valid=VALID", "--config.data.train=TRAIN"])
    checks.validate(config)
    theirs = config_lib.read(old_run / "config.json")
    assert config.model == theirs.model and config.data.windows == theirs.data.windows
    assert config.init_from.path == str(old_run) and config.optimizer.layer_decay == 0.75
    assert {name: one.weight for name, one in config.objectives.items() if one.weight} == {}
    assert [name for name, one in config.evaluations.items() if one.every != -1] == ["classification"]
    plain = config_lib.load(CONFIG, ["--config.data.valid=VALID", "--config.init_from.path=RUN"])
    checks.validate(plain)
    assert plain.init_from.take == ("volume_encoder/.*",) and plain.model.volume_encoder.preset == "b"
    with pytest.raises(UserError, match=r"no run of `mg3d train`"):
        config_lib.load(f"{CONFIG}:nowhere")


@pytest.fixture(scope="module")
def finetuned(old_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("finetuned") / "run"
    options = {
        "data.train": TRAIN, "data.valid": VALID, "data.batch_size": 8, "training.steps": 2, "training.evaluate_every": 1,
        "evaluations.classification.draws": 50,
        "training.checkpoint_every": 1, "training.log_every": 1, "training.keep_checkpoints": 4, "schedule.warmup_percent": 0,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in options.items()]
    assert main(["finetune", "--config", CONFIG, "--init-from", str(old_run), "--workdir", str(run), *words]) == 0
    return run


def test_the_command_ends_with_numbers_and_intervals_of_the_best_step(finetuned):
    """Its argument is that of the config, and what it resumes is done."""
    assert json.loads((finetuned / "config.json").read_text())["init_from"]["path"].endswith("run")
    found = json.loads((finetuned / "test" / "evaluation.json").read_text())
    logged = {row["step"]: row["classification/auroc_macro"] for row in read_metrics(finetuned, "evaluation")}
    assert found["step"] == max(logged, key=lambda step: (logged[step], step))
    assert found["classification"]["auroc_macro"] == pytest.approx(logged[found["step"]], abs=1e-6)
    assert len(found["classification"]["auroc_macro_95"]) == 2 and "zero_shot" not in found
    assert (finetuned / "test" / "scores.npz").is_file()


def test_a_config_without_a_task_is_for_mg3d_train(capsys):
    assert main(["finetune", "--config", "configs/quickstart.py:scratch", "--workdir", "unused"]) == 2
    assert "trains no task" in capsys.readouterr().err


def parameters(run, step=None):
    tree = jax.device_get(restore_run(run, step).params)
    return {"/".join(str(p.key) for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_it_starts_from_the_run_and_trains_tower_and_head_only(old_run, finetuned):
    """What is nearer to the input moves less; the report encoder does not move at all."""
    before, after = parameters(old_run), parameters(finetuned)
    assert after.keys() - before.keys() == {"classification_head/kernel", "classification_head/bias"}
    for name in before.keys() & after.keys():
        if not name.startswith("volume_encoder/"):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    kernel = "volume_encoder/stack/blocks/block/mlp/up/kernel"
    moved = np.abs(after[kernel] - before[kernel]).mean(axis=(1, 2))
    ratios = moved[:-1] / moved[1:]  # Adam's steps are of one size, so that the factors show
    assert np.all((ratios > 0.6) & (ratios < 0.9)), moved
    assert np.any(after["classification_head/kernel"])
    assert not np.array_equal(
        after["volume_encoder/patch_embedding/kernel"], before["volume_encoder/patch_embedding/kernel"]
    )


def slow_logits(run, data):
    """The head record by record, without batches or a mesh."""
    params = jax.device_get(run.params)
    volumes = np.stack([data.read(i).volume for i in range(len(data))])
    windowed = inputs.window(volumes, run.config.data.windows)
    pooled = run.setup.model.apply({"params": params}, {"volume": windowed}, ("volume_pooled",), method="compute")
    head = params["classification_head"]
    return np.asarray(pooled["volume_pooled"], np.float64) @ head["kernel"] + head["bias"]


def test_the_held_out_auroc_is_that_of_the_head(finetuned):
    data, run = PreparedData((VALID,)), restore_run(finetuned, 2)
    labels, logits = np.stack([data.read(i).labels for i in range(len(data))]), slow_logits(run, data)
    expected = {
        name: roc_auc_score(labels[:, i], logits[:, i])
        for i, name in enumerate(data.label_names)
        if {0, 1} == set(labels[:, i])
    }
    logged = read_metrics(finetuned, "evaluation")[-1]
    assert logged["step"] == 2 and expected
    for name, value in expected.items():
        assert logged[f"classification/auroc/{name}"] == pytest.approx(value)
    command = ["evaluate", "--workdir", str(finetuned), "--step", "2", "--only", "classification", "--data", VALID]
    assert main(command) == 0
    found = json.loads((finetuned / "evaluation" / "evaluation.json").read_text())["classification"]
    assert found["auroc_macro"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert found["kind"] == "multi_label" and len(found["auroc_macro_95"]) == 2
