"""Small things that several tests need: a tiny config and its command line, batches without files."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from mg3d_jax import config as config_lib
from mg3d_jax import registry
from mg3d_jax.benchmarks.patients import random_batch  # noqa: F401  (tests take it from here)
from mg3d_jax.config import Config
from mg3d_jax.evaluation.base import Embedded
from mg3d_jax.models.towers import bert, vit
from mg3d_jax.training import held_out, hooks
from mg3d_jax.training.state import Setup, State

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}  # of a process that reads this file
OLD = ROOT / "tests" / "fixtures" / "v0.1.0"  # what version 0.1.0 wrote
# XLA flags of every test and its processes. With the first one's scheduler fake CPU devices may enter independent
# collectives in different orders and wait for ever. The others: a test's programs run for seconds, and to compile them
# well takes longer than that; each of the two groups halves the time of the suite. XLA ends a process for a flag that it
# does not know, and later versions have no choice of emitters.
FLAGS = " ".join((
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",  # eight fake devices on one busy core
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # to divide a program among threads takes a tenth of the time to compile it
    *(("--xla_cpu_use_fusion_emitters=false",) if version("jaxlib").startswith("0.10.") else ()),
))  # fmt: skip
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}  # as `random_batch` has them


def tiny_config(train: str = "", valid: str = "", **overrides: object) -> Config:
    """`tiny_builder`, typed."""
    return config_lib.typed(tiny_builder(train, valid, **overrides))


def tiny_builder(train: str = "", valid: str = "", **overrides: object) -> ConfigDict:
    """What a config file returns, unlocked: `nano` towers on a 16^3 grid, float32, 8 patients per batch.

    `overrides` are dotted keys with `__`.
    """
    config = config_lib.default().unlock()
    config.model.volume_size = (16, 16, 16)
    config.model.volume_encoder.patch_size = (8, 8, 8)
    config.model.volume_encoder.preset = "nano"
    config.model.report_encoder.preset = "nano"
    config.model.projection_dim = 32
    config.model.fusion.depth = 1
    config.model.voxel_decoder.update({"width": 128, "depth": 1, "num_heads": 4})
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.train = (train,) if train else ()
    config.data.valid = (valid,) if valid else ()
    config.data.batch_size = 8
    config.data.max_tokens = 64
    config.data.max_sentences = 16
    config.data.vocab_size = 400
    config.objectives.alignment.report_sentences = 2
    config.objectives.alignment.sentence_tokens = 24
    config.training.steps = 6
    config.training.log_every = 1
    config.training.checkpoint_every = 2
    config.training.writers = ("jsonl",)  # the other one imports torch, for seconds
    return overridden(config, overrides)


def overridden(config: ConfigDict, overrides: Mapping[str, object]) -> ConfigDict:
    """Sets dotted keys, with `__` for the dots."""
    for key, value in overrides.items():
        group, _, name = key.rpartition("__")
        node = config
        for part in group.split("__") if group else ():
            node = node[part]
        node[name] = value
    return config


def with_smallest_towers(config: ConfigDict) -> ConfigDict:
    """Takes a preset below all of the package's for both encoders, which only processes that call this know of.

    For runs of which it does not matter what they learn: steps and checkpoints take a fraction of `nano`'s time.
    """
    vit.PRESETS["smallest"], bert.PRESETS["smallest"] = vit.Sizes(32, 2, 2, 64), bert.BertSizes(32, 2, 2, 64)
    config.model.volume_encoder.preset = config.model.report_encoder.preset = "smallest"
    config.model.projection_dim = 16
    return config


def with_plain_towers(config: ConfigDict, size: str = "plain") -> ConfigDict:
    """Takes the towers of `plain_towers`, of one matrix each; `size` is one of its sizes. Processes need `TESTS`.

    For runs that are about saves, signals, processes and files, not about models: the start of a trainer takes a third of
    the time that it takes with transformers.
    """
    registry.load_plugins(("plain_towers",))
    config.plugins = (*config.plugins, "plain_towers")
    patch_size = config_lib.default().model.volume_encoder.patch_size  # an option of other kinds
    config.model.volume_encoder.update({"kind": "cubes", "preset": size, "pooling": "mean", "patch_size": patch_size})
    config.model.report_encoder.update({"kind": "words", "preset": size})
    config.model.projection_dim = 16
    return config


def records_of(data) -> list:
    """All records of a `PreparedData`, in order."""
    return [data.read(index) for index in range(len(data))]


def free_port() -> int:
    """A port for a coordinator that listens seconds later: below those that the system hands out to others meanwhile."""
    first = 20_000 + os.getpid() % 10_000
    for port in itertools.chain(range(first, 30_000), range(20_000, first)):
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("localhost", port))
            return port
    raise RuntimeError("no port is free")


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """Environment of a test's subprocess: CPU, that many fake devices, the source tree on the path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MG3D_", "OMPI_"))}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join((FLAGS, f"--xla_force_host_platform_device_count={devices}"))}
    env["PYTHONPATH"] = str(ROOT)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process translates the package anew
    return env | extra


def mg3d(*args: str, devices: int = 1, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs `mg3d ARGS` in a process of its own."""
    command = [sys.executable, "-m", "mg3d_jax", *args]
    return subprocess.run(command, env=environment(devices, **extra), capture_output=True, text=True, timeout=timeout)


def embedded(volumes: np.ndarray, **known: Any) -> Embedded:
    """A set of volumes `[n, k]` of n patients, each with a report of its own, without labels; `known` says otherwise."""
    n, width = volumes.shape
    ids = np.array([f"v{row}" for row in range(n)], str)
    reports = np.array([f"r{row}" for row in range(n)], str)
    patients = np.array([f"p{row}" for row in range(n)], str)
    nothing = np.zeros((0, width), np.float32)
    plain: dict[str, Any] = {
        "volume_ids": ids, "scans": ids, "patients": patients, "volume_reports": reports,
        "labels": np.zeros((n, 0), np.int8), "label_names": (), "reports": volumes, "report_ids": reports, "report_texts": (),
        "prompts": {}, "texts": nothing, "logit_scale": 10.0,
    }  # fmt: skip
    return Embedded(volumes=volumes, **plain | known)


def slow_steps(seconds: float) -> None:
    """Lets this process wait after each logged step, without work, so that signals find a run before its end."""
    log = hooks.Log.__call__

    def slowly(self: hooks.Log, after: hooks.AfterStep) -> Any:
        time.sleep(seconds)
        return log(self, after)

    hooks.Log.__call__ = slowly  # type: ignore[method-assign]


def slow_evaluation(seconds: float) -> None:
    """Lets this process say "measures" and wait before each batch of the held-out loss."""
    batches = held_out.evaluation_batches

    def slowly(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in batches(*arguments, **options):
            print("measures", file=sys.stderr, flush=True)
            time.sleep(seconds)
            yield batch

    held_out.evaluation_batches = slowly


def drawn(shapes: Any, seed: int = 0) -> Any:
    """Parameters of these shapes, drawn by NumPy: modules compile for seconds to draw theirs."""
    rng = np.random.default_rng(seed)

    def value(path: Any, x: Any) -> np.ndarray:
        name, noise = path[-1].key, rng.normal(size=x.shape).astype(x.dtype)
        constants = {"scale": 1.0, "logit_scale": np.log(10), "logit_bias": -10.0}
        if name in constants or name.endswith("bias"):
            return np.full(x.shape, constants.get(name, 0.0), x.dtype)
        return noise * np.float32(x.shape[-2] ** -0.5 if name == "kernel" else 0.02)

    return jax.tree_util.tree_map_with_path(value, shapes)


def quick_variables(module: nn.Module, *inputs: Any, seed: int = 0) -> Any:
    """What `module.init` gives, `drawn`."""
    return drawn(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)), seed)


def quick_state(setup: Setup, seed: int = 0) -> State:
    """A state of step 0 with parameters that are `drawn`, for optimizers that start from zeros."""
    params = drawn(setup.abstract["params"], seed)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), dict(setup.abstract)) | {"params": params}
    state |= {"ema": params} if "ema" in setup.abstract else {}
    return jax.device_put(state, setup.shardings)
