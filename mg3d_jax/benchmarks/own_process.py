"""A benchmark's measurement in a process of its own: what ran before it counts neither in its time nor in its memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from mg3d_jax.errors import UserError


def in_own_process(case: Any) -> dict[str, Any]:
    """What `WORKERS[case.framework]` of the module of `case`, a dataclass of that name, measures in a fresh process."""
    program = "import sys; from mg3d_jax.benchmarks.own_process import work; work(*sys.argv[1:])"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # else the peak memory is XLA's pool
    command = [sys.executable, "-c", program, type(case).__module__, json.dumps(asdict(case))]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        raise UserError(f"{case.framework} {case.preset} failed:\n{process.stderr.strip()[-2000:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def work(module: str, case: str) -> None:
    """Entry point of the fresh process: prints the measurement as JSON."""
    benchmark = importlib.import_module(module)
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(case).items()
    }
    print(json.dumps(benchmark.WORKERS[fields["framework"]](benchmark.Case(**fields))))
