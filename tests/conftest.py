"""Shared by all tests: 8 fake CPU devices, a compile cache for the session, tiny phantoms and a tiny config."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# With this scheduler fake CPU devices may enter independent collectives in different orders and wait for ever.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
# Programs that take long to compile are compiled once per session: xdist's workers and the tests' own processes share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/mg3d-tests-compiled-{os.getpid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_unconfigure() -> None:
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if folder.endswith(f"-{os.getpid()}"):  # not in a worker, and not one that the user keeps
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CT, MR and reports; tests that need them skip where they are missing."""
    if not SHARED.is_dir():
        pytest.skip("the folder with real test data is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """24 training and 8 held-out phantom patients prepared on a 16^3 grid: `{"root", "train", "valid"}`, paths as str."""
    from mg3d_jax.cli import main

    folder = tmp_path_factory.mktemp("tiny")
    assert main(["phantom", str(folder / "phantoms"), "--patients", "24", "--valid", "8", "--seed", "0"]) == 0
    for split in ("train", "valid"):
        command = ["prepare", "--source", "ctrate", "--root", str(folder / "phantoms"), "--split", split]
        command += ["--out", str(folder / split), "--size", "16", "16", "16", "--spacing", "20", "18", "20"]
        assert main(command) == 0
    return {"root": str(folder / "phantoms"), "train": str(folder / "train"), "valid": str(folder / "valid")}
