"""What a run tells about itself: sinks that survive a resume, rates in closed form, a trace that can be opened."""

import gzip
import json
import struct
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import tiny_config
from tensorboardX.proto.event_pb2 import Event

from mg3d_jax import config as config_lib
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.training import clock as clock_lib
from mg3d_jax.training.profiler import FIRST_STEPS, Profiler
from mg3d_jax.training.writers import open_writers, read_metrics

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
COLOR = np.stack([GREY, GREY + 20, GREY + 40], axis=-1)


def events(folder):
    """The events of TensorBoard's files: records of length, checksum, bytes, checksum."""
    for file in sorted(folder.glob("events*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            yield Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length


def test_every_sink_gets_scalars_and_images(tmp_path):
    writers = open_writers(tmp_path, Config().training.writers, resume_step=0)
    writers.scalars(1, "train", {"loss": np.float32(2.5), "temperature": 0.1})
    writers.scalars(2, "valid", {"loss": 2.0})
    writers.image(2, "valid", "slice", GREY)
    writers.image(2, "valid", "color", COLOR)
    with pytest.raises(ValueError, match="'slice' is float64"):
        writers.image(2, "valid", "slice", GREY / 255)
    writers.close()
    assert read_metrics(tmp_path, "train") == [{"step": 1, "split": "train", "loss": 2.5, "temperature": 0.1}]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / "slice-2.png")), GREY)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / "color-2.png")), COLOR)
    seen = {value.tag: (e.step, value) for e in events(tmp_path / "tensorboard") for value in e.summary.value}
    assert seen["train/loss"][0] == 1 and seen["train/loss"][1].simple_value == 2.5
    assert seen["valid/color"][0] == 2 and seen["valid/color"][1].image.width == 4


def test_a_resumed_run_writes_again_what_came_after_its_checkpoint(tmp_path):
    names = Config().training.writers
    writers = open_writers(tmp_path, names, resume_step=0)
    for step in (1, 2, 3):
        writers.scalars(step, "train", {"loss": float(step)})
        writers.image(step, "valid", "slice", GREY)
    writers.close()
    (tmp_path / "images" / "by-hand.png").write_bytes(b"")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "spl')  # killed while writing
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    writers = open_writers(tmp_path, names, resume_step=2)
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"slice-1.png", "slice-2.png", "by-hand.png"}
    writers.scalars(3, "train", {"loss": 30.0})
    writers.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
    assert 3 in [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]  # hide from step 3 on
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "elsewhere")


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """Our side of it only: W&B's library is stood in for, because its own needs an account or a service process."""
    calls = []

    class Run:
        def define_metric(self, *args, **options):
            calls.append(("define", args, options))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    stub = types.ModuleType("wandb")
    stub.Error, stub.Image = type("Error", (Exception,), {}), lambda pixels: ("image", pixels.shape)
    stub.init = lambda **options: calls.append(("init", options)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    described = {"name": "mg3d", "config": config_lib.to_dict(tiny_config())}
    for resume_step in (0, 2):
        writers = open_writers(tmp_path, ("wandb",), resume_step=resume_step, **described)
        writers.scalars(3, "train", {"loss": 1.0})
        writers.image(3, "valid", "slice", GREY)
        writers.close()
    first, second = (options for kind, options in (c for c in calls if c[0] == "init"))
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["config"]["data"]["batch_size"] == 8 and first["project"] == "mg3d"
    assert ("define", ("*",), {"step_metric": "step"}) in calls
    assert calls.count(("log", {"step": 3, "train/loss": 1.0})) == 2 == calls.count(("finish",))
    assert ("log", {"step": 3, "valid/slice": ("image", (3, 4))}) in calls

    def refuse(**options):
        raise stub.Error("no API key")

    stub.init = refuse
    with pytest.raises(UserError, match=r"no API key.*WANDB_MODE=offline"):
        open_writers(tmp_path, ("wandb",), resume_step=0)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError, match="pip install wandb"):
        open_writers(tmp_path, ("wandb",), resume_step=0)


def test_rates_in_closed_form(monkeypatch):
    """10 s, of which 2 s were an evaluation and 4 s of the other 8 s were spent waiting for data."""
    now = [100.0]
    monkeypatch.setattr(clock_lib.time, "monotonic", lambda: now[0])
    clock = clock_lib.Clock(trained=1000.0)
    for _ in range(4):
        with clock.waiting():
            now[0] += 1
        clock.count(8, 8 * 50)
        now[0] += 1
    with clock.paused():
        now[0] += 2
    rates = clock.rates(flops_per_sample=1e12, peak_flops=2e12, devices=4)
    assert rates == {"samples_per_second": 4.0, "tokens_per_second": 200.0, "data_wait_share": 0.5, "mfu": 0.5}
    assert clock.trained == 1010.0
    now[0] += 1
    assert clock.rates(1e12, None, 4) == {"samples_per_second": 0.0, "tokens_per_second": 0.0, "data_wait_share": 0.0}


def test_memory_of_a_platform_whose_devices_do_not_say_is_that_of_the_process():
    before = clock_lib.device_memory()["host_memory_gib"]
    held = np.ones(2**27)  # a GiB, far more than what may be reused of memory that was given back
    assert clock_lib.device_memory()["host_memory_gib"] - before == pytest.approx(1.0, abs=0.25)
    assert held[-1] == 1


@pytest.mark.parametrize("steps_run", [FIRST_STEPS + 4, FIRST_STEPS + 1])
def test_a_trace_of_two_steps_appears_even_if_the_run_ends_early(tmp_path, capsys, steps_run):
    profiler, work = Profiler(tmp_path, 2), jax.jit(lambda x: x @ x)
    for step in range(1, steps_run + 1):
        work(jnp.ones((8, 8))).block_until_ready()
        profiler(SimpleNamespace(step=step, last=steps_run))
    profiler.close()
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    marks = [
        e["args"]["step_num"]
        for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        if e.get("name") == "train"
    ]
    assert [int(mark) for mark in marks] == [4, 5][: steps_run - FIRST_STEPS]
    assert "ui.perfetto.dev" in capsys.readouterr().err
