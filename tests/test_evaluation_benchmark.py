"""The benchmark: its grid, what is left to do, and the table, on scores that were drawn."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mg3d_jax import registry
from mg3d_jax.commands import benchmark as command_module
from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import benchmark
from mg3d_jax.evaluation.embedding_files import save_npz
from mg3d_jax.phantom.layouts.base import make_miniature
from mg3d_jax.prepare import Settings, prepare

SEEDS = (0, 1, 2)


@pytest.fixture
def data(tmp_path) -> Path:
    for name in ("luna16/train", "luna16/test", "stoic/fold0", "stoic/fold1", "stoic/fold2"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


def command(data: Path, workdir: Path, *more: str) -> list[str]:
    return ["benchmark", "--workdir", str(workdir), "--data", str(data), "--init-from", "voco=W/v", "RUN@7", *more]


def put_scores(workdir: Path, cells, gain: float) -> None:
    """Scores of 60 patients, better by `gain` where a run starts from RUN."""
    labels = (np.arange(60) % 3 == 0).astype(np.int8)[:, None]
    names = np.array([f"p{number:02d}" for number in range(60)])
    for cell in cells:
        rng = np.random.default_rng([cell.seed, 5])  # what a seed gives to both cancels
        better = gain * (cell.start.name == "RUN")
        logits = rng.normal(size=(60, 1)) + labels * (0.4 + better)
        path = cell.scores(workdir)
        path.parent.mkdir(parents=True)
        arrays = {"ids": names, "patients": names, "labels": labels, "logits": logits, "kind": np.array("multi_label")}
        save_npz(path, {f"classification/{key}": value for key, value in arrays.items()}, compressed=True)


def test_the_grid_and_its_commands(data, tmp_path, capsys):
    words = command(data, tmp_path / "b", "--percent", "1", "100", "--seeds", "0", "4", "--arg", "small", "--commands")
    assert main([*words, "--config.training.steps=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 2 * 3 and all(line.startswith("mg3d finetune ") for line in lines)
    first = lines[0]
    assert "configs/downstream/luna16.py:small" in first and "--init-from" not in first and "percent=1.0" in first
    assert first.endswith("--config.training.steps=3") and "scratch-1percent-seed0" in first
    assert f"{data}/stoic/fold1" in lines[6] and f"--test {data}/stoic/fold0" in lines[6]
    assert "--init-from RUN@7" in lines[2] and "/RUN-1percent-seed0" in lines[2]
    assert "percent=0.0" in lines[3] and all("seed=0" in line for line in lines[:12])


def test_what_cannot_be(data, tmp_path, capsys):
    for more, says in (
        (["--tasks", "nothing"], "there are "),
        (["--tasks", "cc_ccii"], "no prepared folders for cc_ccii"),
        (["--percent", "0"], "--percent 0: from above 0 to 100"),
        (["--init-from", "a/run", "b/run"], "several starts are called ['run']"),
    ):
        assert main(command(data, tmp_path / "b", "--commands", *more)) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(UserError, match="no prepared folders"):
        benchmark.grid(["luna16"], tmp_path, benchmark.starts([]), [100], [0])


def test_the_table_has_paired_intervals(data, tmp_path, capsys):
    workdir = tmp_path / "b"
    cells = benchmark.grid(["luna16"], data, benchmark.starts(["RUN", "no_gain=X"]), [10.0], SEEDS)
    put_scores(workdir, cells, gain=1.5)
    words = ["benchmark", "--workdir", str(workdir), "--data", str(data), "--init-from", "RUN", "no_gain=X"]
    assert main([*words, "--tasks", "luna16", "--percent", "10", "--summary"]) == 0
    assert "benchmark.html" in capsys.readouterr().out
    found = json.loads((workdir / "benchmark.json").read_text())
    better, same = found["rows"]
    assert (better["start"], better["against"], better["seeds"], better["patients"]) == ("RUN", "scratch", [3, 3], 60)
    assert better["metric"].endswith("auroc_macro") and better["difference_95"][0] > 0 and better["better"] == "b"
    assert same["difference"] == pytest.approx(0) and same["better"] == ""
    page = (workdir / "benchmark.html").read_text()
    assert "RUN" in page and "Fewer than 5 runs on a side" in page and "<script" not in page


def test_what_is_written_stands_for_a_run_that_has_a_head_beside_it(monkeypatch):
    both = {
        "classification/head=trained/labels=multi_label/auroc_macro": {"a": 0.9},
        "generation/text=greedy/bleu_4": {"a": 0.2},
        "generation/text=greedy/labeller=rules/f1_micro": {"a": 0.3},
    }
    for metrics, name in ((both, "f1_micro"), ({key: both[key] for key in list(both)[:1]}, "auroc_macro")):
        found = SimpleNamespace(metrics=metrics, patients=3, notes=())
        monkeypatch.setattr(benchmark, "compare", lambda *_, found=found: found)
        assert benchmark._difference(("scratch", [Path("s")]), [Path("r")])["metric"].endswith(name)


def test_what_is_done_is_skipped_and_a_failure_stops_nothing(data, tmp_path, caplog):
    """The folders are empty: every run that is tried fails, in a process of its own."""
    workdir = tmp_path / "b"
    cells = benchmark.grid(["luna16"], data, benchmark.starts([]), [100.0], (0, 1))
    put_scores(workdir, cells[:1], gain=0.0)
    words = ["benchmark", "--workdir", str(workdir), "--data", str(data), "--tasks", "luna16", "--seeds", "0", "1"]
    with caplog.at_level("INFO"):
        assert main([*words, "--arg", "small"]) == 1
    assert "seed0: done before, skipped" in caplog.text and "seed1: failed with exit code 2" in caplog.text
    assert "does not exist: run `mg3d prepare" in (workdir / cells[1].folder / "benchmark.log").read_text()
    assert json.loads((workdir / "benchmark.json").read_text())["missing"] == [str(cells[1].folder)]


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory) -> Path:
    """Two folds of a data set with classes of scans, and of one with masks."""
    folder = tmp_path_factory.mktemp("miniatures")
    for task, layout, split, size in (
        ("cc_ccii", "cc-ccii", "all", (16, 16, 16)), ("msd_lung", "msd-lung", "train", (48, 48, 32)),
    ):  # fmt: skip
        make_miniature(folder / f"raw_{task}", layout, 9, 0)
        for fold in range(2):
            given = {"size": size, "spacing": (7.0, 7.0, 8.0), "fold": (fold, 2), "workers": 1, "qa_samples": 0}
            root, out = folder / f"raw_{task}", folder / "data" / task / f"fold{fold}"
            prepare(Settings.of(source=layout, root=root, split=split, out=out, **given))
    return folder / "data"


def test_two_tasks_from_data_to_the_table(miniatures, tmp_path, monkeypatch):
    """Real trainings of plain towers, here in this process: the second call goes on where the first one stopped."""
    registry.load_plugins(("plain_towers",))
    ran = []

    def here(words, folder, stop):
        ran.append(str(folder.relative_to(tmp_path / "b" / "runs")))
        return main(words)

    monkeypatch.setattr(command_module, "_run", here)
    options = {
        "data.batch_size": 8, "training.steps": 2, "model.volume_size": "(16,16,16)", "plugins": "('plain_towers',)",
        "model.volume_encoder.kind": "cubes", "model.volume_encoder.preset": "plain", "model.volume_encoder.pooling": "mean",
        "model.volume_encoder.patch_size": "(16,16,16)", "model.volume_encoder.positions": "sincos",
        "model.volume_encoder.layer_scale": 0.0, "model.report_encoder.kind": "words", "model.report_encoder.preset": "plain",
        "model.projection_dim": 16, "evaluations.classification.draws": 50, "evaluations.segmentation.draws": 50,
        "training.writers": "('jsonl',)", "data.windows": "((-1000.0,600.0),)", "data.vocab_size": 100,
    }  # fmt: skip
    more = [f"--config.{key}={value}" for key, value in options.items()]
    base = ["benchmark", "--workdir", str(tmp_path / "b"), "--data", str(miniatures), "--seeds", "0", "--arg", "small"]
    assert main([*base, "--tasks", "cc_ccii", *more]) == 0
    first = tmp_path / "b" / "runs" / "cc_ccii" / "scratch-100percent-seed0"
    assert main([*base, "--init-from", f"first={first}", *more]) == 0
    assert ran == [
        "cc_ccii/scratch-100percent-seed0", "cc_ccii/first-100percent-seed0", "msd_lung/scratch-100percent-seed0",
        "msd_lung/first-100percent-seed0",
    ]  # fmt: skip
    found = json.loads((tmp_path / "b" / "benchmark.json").read_text())
    assert found["missing"] == [] and [row["task"] for row in found["rows"]] == ["cc_ccii", "msd_lung"]
    for row, metric in zip(found["rows"], ("auroc_macro", "dice/mean"), strict=True):
        scores = [
            json.loads(
                (tmp_path / "b" / "runs" / row["task"] / f"{start}-100percent-seed0/test/metrics.json").read_text()
            )
            for start in ("scratch", "first")
        ]
        assert row["metric"].endswith(f"/{metric}") and row["seeds"] == [1, 1]
        assert row["b"] - row["a"] == pytest.approx(row["difference"])
        assert [row["a"], row["b"]] == pytest.approx([one[row["metric"]] for one in scores])
