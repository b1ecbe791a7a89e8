"""`mg3d report`: the page of a finished run and of one in progress, in bad shape too, and what its charts show."""

import json
import platform
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support import tiny_config

from mg3d_jax import config as config_lib
from mg3d_jax.commands import main as cli
from mg3d_jax.environment import environment_facts
from mg3d_jax.report import curves

NAME = "<b>run</b> & co"
VOID = ("meta", "br", "img", "path", "use")


def line(step, split="train", **values):
    return json.dumps({"step": step, "split": split} | values) + "\n"


class Page(HTMLParser):
    """Checks that tags are balanced; keeps text, table rows and the addresses of everything that is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.loaded, self.rows = [], "", [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def run(tmp_path):
    """A run in progress: two objectives, a torn last line, faults, images; no summary and no evaluation."""
    config = tiny_config("train", name=NAME, optimizer__learning_rate=3e-4)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    lines = [
        line(step, loss=3.0 - step / 100, alignment=2.0, **{"alignment/accuracy": 0.5, "gradient_norm": 1.0,
             "gradient_norm/fusion": 0.5, "samples_per_second": 7.0, "strange/thing": 1.0})
        for step in range(1, 101)
    ]  # fmt: skip
    lines += [line(100, "valid", loss=2.5, alignment=2.1), line(100, "evaluation", auroc_macro=0.7)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 101, "split": "tr')
    (tmp_path / "skipped.jsonl").write_text(json.dumps({"step": 7, "loss": "nan", "records": ["x<y", "z"]}) + "\n")
    (tmp_path / "images").mkdir()
    for step in (50, 100):
        Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "images" / f"reconstruction-0-{step}.png")
    return tmp_path


def report(folder, *options):
    assert cli.main(["report", str(folder), *options]) == 0
    return Page((folder / "report.html").read_text())


def test_a_run_in_progress(run):
    page = report(run)
    assert NAME in page.text  # as text: its tags are escaped
    assert "in progress" in page.text and "100 of 6" in page.text
    assert "training loss2code" in page.text  # not the held-out 2.5
    assert all(address.startswith(("data:image/", "#")) for address in page.loaded)  # nothing comes from elsewhere
    assert sum(address.startswith("data:image/png") for address in page.loaded) == 1  # the newest slices
    assert sum(address.startswith("data:image/jpeg") for address in page.loaded) == 2  # and a small one per step
    assert ["7", "nan", "x<y, z"] in page.rows
    assert ["optimizer.learning_rate", "0.0003", "0.0001"] in page.rows
    assert "Evaluation while training" in page.text and "Environment" not in page.text


def test_a_finished_run(run):
    summary = {"state": "done", "step": 100, "samples_seen": 800, "trained_seconds": 3725.0, "config_hash": "abc123"}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "environment.json").write_text(json.dumps(environment_facts()))
    zero_shot = {
        "auroc_macro": 0.8,
        "auroc_macro_95": [0.7, 0.9],
        "auroc/Effusion": 0.85,
        "auroc/Effusion_95": [0.75, 0.95],
    }
    retrieval = {"report_to_volume/recall@5": 0.5, "report_to_volume/chance@5": 0.1, "report_to_volume/gallery": 50}
    (run / "evaluation").mkdir()
    evaluation = {"step": 100, "volumes": 50, "patients": 40, "zero_shot": zero_shot, "retrieval": retrieval}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    page = report(run)
    assert "1 h 2 min" in page.text and "abc123" in page.text and "done" in page.text
    assert ["Effusion", "0.850", "0.750 to 0.950", ""] in page.rows
    assert ["report to volume, of 50", "5", "0.500", "", "0.100", "5.0"] in page.rows
    assert f"jax {jax.__version__}" in page.text


def test_only_a_config_and_damaged_lines(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert "No metrics yet" in report(run).text
    (run / "metrics.jsonl").write_text("{broken\n" + line(1, loss=float("nan")))
    assert "1 lines of metrics.jsonl could not be read" in report(run).text


def test_what_is_no_run_is_an_error(run, capsys):
    for folder, message in ((run / "images", "is not a run"), (run / "nowhere", "is not a folder")):
        assert cli.main(["report", str(folder)]) == 2
        assert message in capsys.readouterr().err
    (run / "summary.json").write_text("{")
    assert cli.main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert "summary.json: cannot be read as JSON" in error
    assert "remove it to do without" in error


def test_every_metric_is_in_one_chart():
    values = {"loss": 1.0, "alignment": 1.0, "alignment/accuracy": 0.5, "alignment/temperature": 0.1, "mfu": 0.4}
    values |= {"learning_rate": 1e-4, "learning_rate/x5": 5e-4, "auroc/A": 0.6, "auroc_macro": 0.6, "new/metric": 2.0}
    metrics = [{"step": 1, "split": "train"} | values, {"step": 1, "split": "train"} | values | {"loss": 9.0}]
    metrics += [{"step": 1, "split": "evaluation", "own/score": 1.0}]
    values["own/score"] = 1.0
    found = curves.sections(metrics, ["alignment"])
    drawn = [one.name for charts in found.values() for _, series in charts for one in series]
    assert sorted(drawn) == sorted(values)
    assert [series[0].name for _, series in found["Losses"]] == ["loss", "alignment"]
    assert found["Losses"][0][1][0].values == [9.0]  # a resumed run wrote the step again
    assert [series[0].name for _, series in found["Other"]] == ["new/metric"]
    assert [series[0].name for _, series in found["Evaluation while training"]] == ["auroc_macro", "own/score"]


def test_axes_are_logarithmic_only_over_wide_ranges(monkeypatch):
    def scale(values):
        series = curves.Series("gradient_norm", "train", list(range(len(values))), values)
        drawn = []
        monkeypatch.setattr(
            curves.charts, "svg", lambda chart: drawn.append(Figure().add_subplot()) or chart.draw(drawn[-1])
        )
        curves.draw(curves.Panel("x", ()), [series])
        return drawn[0].get_yscale() == "log"

    assert scale([0.01, 1.0, 100.0]) and not scale([1.0, 2.0, 3.0]) and not scale([-1.0, 1.0, 100.0])


def test_the_environment_names_no_host(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(
        platform, "uname", lambda: platform.uname_result("Linux", "secret-host", "6-secret-host", "1", "x")
    )
    facts = environment_facts()
    assert facts["packages"]["jax"] == jax.__version__ and sum(facts["devices"].values()) == jax.device_count()
    assert "secret-host" not in json.dumps(facts)
