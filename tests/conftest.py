"""Shared by all tests: 8 fake CPU devices, a compile cache for the session, tiny phantoms and a tiny config."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of BLAS and PyTorch: small matrices, and two workers have two cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody reads where in the source an operation is from
# Programs that take long to compile are compiled once per session: xdist's workers and the tests' own processes share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/mg3d-tests-compiled-{os.getpid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest
from support import FLAGS, OLD

from mg3d_jax import log

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
gc.freeze()  # what is imported stays; tracing makes so many objects that looking for cycles takes a tenth of the time
gc.set_threshold(50_000, 20, 50)
jax.config.update("jax_num_cpu_devices", 8)
log.to_stderr()  # as the command line does, so that tests which call the library read its messages from capsys

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_unconfigure() -> None:
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if folder.endswith(f"-{os.getpid()}"):  # not in a worker, and not one that the user keeps
        shutil.rmtree(folder, ignore_errors=True)


LONGEST = (  # files that take half a minute and more: begun first, so that no process is left with one at the end
    "test_objectives_multitask.py", "test_training_faults.py", "test_launch.py", "test_fixtures.py", "test_recipe.py",
    "test_examples.py", "test_models_mg3d.py", "test_interop_warm_start.py", "test_training_step.py", "test_training_run.py",
    "test_scaling_sweep_real.py", "test_interop_export.py", "test_training_cost.py", "test_scaling_sweep.py",
    "test_objectives_same_words.py", "test_training_report_texts.py", "test_typing.py", "test_evaluation_embed_files.py",
    "test_evaluation_plugins.py", "test_scaling_fit_intervals.py", "test_models_plugins.py", "test_benchmarks_step.py",
    "test_interop_export_formats.py",
    "test_finetune_run.py", "test_interop_monai.py", "test_benchmarks_towers.py", "test_models_fusion.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CT, MR and reports; tests that need them skip where they are missing."""
    if not SHARED.is_dir():
        pytest.skip("the folder with real test data is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """24 training and 8 held-out phantom patients prepared on a 16^3 grid: `{"root", "train", "valid"}`, paths as str.

    Plain ones: as few as these hold every label both ways. Made once for all of xdist's processes.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not (folder / "made").exists():
            make_tiny_data(folder)
            (folder / "made").touch()
    return {"root": str(folder / "phantoms"), "train": str(folder / "train"), "valid": str(folder / "valid")}


def make_tiny_data(folder: Path) -> None:
    from mg3d_jax.commands.main import main

    command = ["phantom", str(folder / "phantoms"), "--patients", "24", "--valid", "8", "--seed", "0"]
    assert main([*command, "--style", "plain"]) == 0
    for split in ("train", "valid"):
        command = ["prepare", "--source", "ctrate", "--root", str(folder / "phantoms"), "--split", split]
        command += ["--out", str(folder / split), "--size", "16", "16", "16", "--spacing", "20", "18", "20"]
        assert main([*command, "--qa-samples", "0"]) == 0  # pictures take as long as all else


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, for this file, of the run that version 0.1.0 wrote."""
    return Path(shutil.copytree(OLD / "run", tmp_path_factory.mktemp("old") / "run"))
