"""`mg3d train` and `mg3d evaluate` as a user runs them: repeat, interrupt, resume, evaluate."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import TESTS, environment, tiny_config
from zygote import mg3d

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import COMMANDS, main
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_lines
from mg3d_jax.trainer import Trainer
from mg3d_jax.training import run_folder, stopping
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.held_out import HeldOut
from mg3d_jax.training.writers import read_metrics

STEPS, SAVED_BEFORE = 18, 16

TINY = f"""
from mg3d_jax import config as config_lib
from support import slow_steps, tiny_builder, with_plain_towers


def get_config(arg=""):
    if arg == "slow":
        slow_steps(0.2)
    config = tiny_builder(training__steps={STEPS}, training__checkpoint_every={SAVED_BEFORE // 2})
    if arg == "default writers":
        config.training.writers = config_lib.default().training.writers
    return with_plain_towers(config)
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(TINY)
    return file


def arguments(config_file, workdir, data, *extra, form=""):
    """`form`: "slow" has steps of 0.2 s or more, "default writers" writes for TensorBoard too."""
    where = [f"--config.data.train={data['train']}", f"--config.data.valid={data['valid']}"]
    return ["train", "--config", f"{config_file}:{form}", "--workdir", str(workdir), *where, *extra]


@pytest.fixture(scope="module")
def finished(config_file, tiny_data, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = mg3d(*arguments(config_file, workdir, tiny_data, form="default writers"))
    assert done.returncode == 0, done.stderr
    return workdir


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir, "train")}


def test_a_run_writes_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["state"] == "done" and summary["step"] == STEPS and summary["samples_seen"] == 8 * STEPS
    assert summary["unique_patients"] == 24 and "valid/loss" in summary["final"]
    assert sorted(losses(finished)) == list(range(1, STEPS + 1))
    assert list((finished / "tensorboard").glob("events*"))
    assert (finished / "tokenizer" / "tokenizer.json").exists()


def test_the_same_seed_gives_the_same_losses_bit_for_bit(finished, config_file, tiny_data, tmp_path):
    done = mg3d(*arguments(config_file, tmp_path / "again", tiny_data))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == losses(finished)


def test_sigterm_saves_exits_75_and_resumes_bit_for_bit(finished, config_file, tiny_data, tmp_path):
    workdir = tmp_path / "interrupted"
    command = [sys.executable, "-m", "mg3d_jax", *arguments(config_file, workdir, tiny_data, form="slow")]
    process = subprocess.Popen(command, env=environment(**TESTS), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None, "the run did not start"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail("the run ended before the signal reached it")
    assert process.returncode == 75, errors
    assert "asked to stop" in errors
    done = mg3d(*arguments(config_file, workdir, tiny_data))
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr
    assert losses(workdir) == losses(finished)
    final = [json.loads((w / "summary.json").read_text())["final"] for w in (workdir, finished)]
    assert final[0] == final[1]


def test_a_finished_run_says_so_and_another_config_is_refused(finished, config_file, tiny_data):
    again = mg3d(*arguments(config_file, finished, tiny_data))
    assert again.returncode == 0 and "already done" in again.stderr
    other = mg3d(*arguments(config_file, finished, tiny_data, "--config.optimizer.learning_rate=0.5"))
    assert other.returncode == 2 and "optimizer.learning_rate: 0.0001 -> 0.5" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_damaged_newest_checkpoint_and_other_data_at_the_start_of_the_loop(finished, tiny_data, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    config = config_lib.from_json((workdir / "config.json").read_text())
    text = next(path for path in (workdir / "checkpoints" / str(STEPS) / "meta").rglob("*") if path.is_file())
    text.write_text(text.read_text().replace('"step"', '"stop"', 1))
    resumed = Trainer(config, workdir)
    resumed.checkpoints.close()
    assert resumed.resume_step == SAVED_BEFORE and f"{STEPS} is damaged and not used" in capsys.readouterr().err
    config = config_lib.replace(config, {"data.train": (tiny_data["valid"],)})
    with pytest.raises(UserError, match=r"started on folders of \[29\] records"):
        Trainer(config, workdir)


def test_a_kill_between_the_last_checkpoint_and_the_summary_loses_nothing(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    expected = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").unlink()
    config = config_lib.from_json((workdir / "config.json").read_text())
    config = config_lib.replace(config, {"training.best_metric": "valid/los", "training.validate_every": 3})
    with pytest.raises(UserError, match=r"'valid/los' is none of valid/alignment, .*valid/loss"):
        Trainer(config, workdir).run()
    config = config_lib.replace(config, {"training.best_metric": ""})
    before = read_metrics(workdir)
    (workdir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in before if line["split"] == "train")
    )
    assert Trainer(config, workdir).run() == 0
    found = json.loads((workdir / "summary.json").read_text())
    # Evaluated on other devices than before.
    assert [(line["step"], line["split"]) for line in read_metrics(workdir)] == [
        (line["step"], line["split"]) for line in before
    ]
    assert found.pop("final") == pytest.approx(expected.pop("final"), rel=1e-3, abs=1e-6)
    for summary in (found, expected):
        del summary["trained_seconds"], summary["devices"]  # now those of the checkpoint, and of this process
    assert found == expected


def test_a_failed_last_evaluation_loses_no_step_and_no_summary_outlives_its_run(
    finished, tiny_data, tmp_path, monkeypatch
):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))

    def fail(*_: object) -> dict:
        assert not (workdir / "summary.json").exists()
        raise MemoryError

    monkeypatch.setattr(HeldOut, "loss", fail)
    config = config_lib.from_json((workdir / "config.json").read_text())
    with pytest.raises(MemoryError):
        Trainer(config, workdir).run()
    assert Checkpoints(workdir).latest() == STEPS
    monkeypatch.undo()
    assert Trainer(config, workdir).run() == 0
    assert json.loads((workdir / "summary.json").read_text())["step"] == STEPS


def test_the_tokenizer_follows_the_config_until_there_is_a_checkpoint(finished, tiny_data, tmp_path):
    def size(workdir: Path, vocab_size: int) -> int:
        options = tiny_config(tiny_data["train"], data__vocab_size=vocab_size).data
        run_folder.make_tokenizer(options, workdir)
        return run_folder.read_tokenizer(options, workdir).vocab_size

    assert size(tmp_path, 300) == 300 and size(tmp_path, 350) == 350  # a start that came to no checkpoint
    assert size(finished, 300) == size(finished, 400) == 400


def test_skipped_updates_after_the_checkpoint_are_counted_again(tmp_path):
    def skips(resume_step: int) -> stopping.SkippedUpdates:
        found = stopping.SkippedUpdates(3)
        found.resume(tmp_path, resume_step, records=lambda step: [f"scan {step}"])
        return found

    first = skips(0)
    for step, finite in enumerate((True, False, True, False, False), start=1):
        first.check(step, finite=finite, loss=1.0 if finite else float("nan"))
    assert (first.total, first.in_a_row) == (3, 2)
    with (tmp_path / stopping.SKIPPED_FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # cut off by a kill
    again = skips(4)
    assert (again.total, again.in_a_row) == (2, 1)
    entries, damaged = read_lines(tmp_path / stopping.SKIPPED_FILE)
    assert entries == [{"step": step, "loss": "nan", "records": [f"scan {step}"]} for step in (2, 4)]
    assert damaged == 0
    assert skips(0).total == 0


def test_evaluate_writes_numbers_and_picture(finished, tiny_data):
    done = mg3d("evaluate", "--workdir", str(finished), "--data", tiny_data["valid"], devices=2)
    assert done.returncode == 0, done.stderr
    result = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    assert 0 <= result["zero_shot"]["auroc_macro"] <= 1
    assert "protocol" in result["zero_shot"] and "protocol" in result["retrieval"]
    assert (finished / "evaluation" / "evaluation.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--config.data.batch_size=7", "--config.mesh.data=1", "--config.optimizer.accumulation=2"], "not divisible"),
        (["--config.model.volume_size=(24, 16, 16)"], "prepared with grid"),
        (["--config.mesh.fsdp=3"], "does not fit"),
        (["--config.data.train=/nothing"], "does not exist"),
        (["--config.optimizer.learning_ratte=1"], "Did you mean"),
    ],
)
def test_bad_settings_end_with_one_line_and_no_traceback(config_file, tiny_data, tmp_path, capsys, extra, says):
    assert main(arguments(config_file, tmp_path / "run", tiny_data, *extra)) == 2
    errors = capsys.readouterr().err
    assert says in errors and "Traceback" not in errors


def test_help_of_every_command(capsys):
    listing = mg3d("--help")
    assert listing.returncode == 0
    for command in COMMANDS:
        assert command in listing.stdout
        try:
            code = main([command, "--help"])
        except SystemExit as ended:  # argparse's way
            code = ended.code
        assert code == 0 and "usage: mg3d " + command in capsys.readouterr().out
    unknown = mg3d("trian")
    assert unknown.returncode == 2 and "no command 'trian'" in unknown.stderr
