"""`mg3d probe` of a run, and its head in an export: the run that version 0.1.0 wrote, on the folders beside it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from support import OLD

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.online import OnlineEvaluation
from mg3d_jax.evaluation.probes import load_head, save_head
from mg3d_jax.interop.torch_template.modeling_mg3d import MG3DModel
from mg3d_jax.training.restore import restore_run


@pytest.fixture(scope="module")
def probed(old_run):
    folder = old_run.parent
    data = ["--train", str(OLD / "train"), "--test", str(OLD / "valid")]
    options = ["--fractions", "50,100", "--seeds", "2", "--evaluations.probe.draws=20"]
    assert main(["probe", "--workdir", str(folder / "run"), *data, "--out", str(folder / "out"), *options]) == 0
    return folder


def test_a_probe_of_a_run(probed):
    document = json.loads((probed / "out" / "evaluation.json").read_text())
    assert document["step"] == 3 and document["train_data"] == [str(OLD / "train")]
    result, head = document["probe"], load_head(probed / "out" / "probe.safetensors")
    assert result["train"]["patients"] == 8 and 0 <= result["linear"]["auroc_macro"] <= 1
    assert set(head.classes) | set(head.facts["not_learned"]) == set(PreparedData((str(OLD / "valid"),)).label_names)
    assert head.facts["step"] == 3 and head.facts["fitted_to"]["patients"] == 8


def test_the_head_goes_with_an_export(probed, capsys):
    file, out = probed / "out" / "probe.safetensors", probed / "exported"
    command = ["export", "--workdir", str(probed / "run"), "--out", str(out), "--probe", str(file)]
    assert main(command) == 0
    assert "probability of the probe: JAX and PyTorch differ by at most" in capsys.readouterr().out
    head, model = load_head(file), MG3DModel.from_pretrained(out).eval()
    assert tuple(model.config.probe_classes) == head.classes
    data = PreparedData((str(OLD / "valid"),))
    hu = torch.from_numpy(np.stack([data.read(i).volume for i in range(2)]))
    with torch.no_grad():
        expected = head.probabilities(model.encode_volume(hu).numpy())
        np.testing.assert_allclose(model.probe_logits(hu).sigmoid().numpy(), expected, atol=1e-5)
    head.facts["step"] = 2
    save_head(head, probed / "other.safetensors")
    assert main([*command[:-1], str(probed / "other.safetensors")]) == 2
    assert "step 2, not 3" in capsys.readouterr().err


def test_probes_and_a_head_while_a_run_trains(probed):
    """The probe reads the training volumes of the configuration; a run without a head has nothing to say of one."""
    run = restore_run(probed / "run")
    changes = {f"evaluations.{name}.every": -1 for name in run.config.evaluations} | {
        "evaluations.probe.every": 1, "evaluations.classification.every": 1, "data.train": (str(OLD / "train"),),
    }  # fmt: skip
    setup = dataclasses.replace(run.setup, config=config_lib.replace(run.config, changes))
    options = run.config.data
    tokenizer = ReportTokenizer(run.tokenizer, options.max_tokens, options.max_sentences)
    online = OnlineEvaluation(setup, tokenizer, PreparedData((str(OLD / "valid"),)))
    found = online.metrics(run.params)
    result = json.loads((probed / "out" / "evaluation.json").read_text())["probe"]
    expected = {f"probe/{m}/auroc_macro": result[m]["auroc_macro"] for m in ("linear", "neighbours")}
    assert found == pytest.approx(expected, abs=1e-3)
