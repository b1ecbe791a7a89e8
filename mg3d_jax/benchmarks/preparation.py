"""`mg3d bench data`: how fast are preparation and loading, beside common tools and beside what is possible.

- preparation: `mg3d`'s reader against the usual script (nibabel `get_fdata`, clip, torch `interpolate`) on one
  512 x 512 x 300 int16 `.nii.gz`, to the same 0.75 x 0.75 x 1.5 mm grid; seconds and peak memory, each in a process of its
  own, bound to one core.
- loading (`bench_loading`): prepared records through grain up to the host batch, against MONAI's `PersistentDataset` of
  the same volumes, against a bare memory copy and a bare zstd decode; and the share of a step that waits for data.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.benchmarks.loading import (
    BATCH,
    bench_loading,
    bench_waiting,
    chest_like,
    one_thread_each,
    report_loading,
    report_waiting,
)
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json

_SPACING = (0.7, 0.7, 1.0)  # mm of the volume that is prepared
_TARGET = (0.75, 0.75, 1.5)


def _one_core(function: Callable, arguments: tuple, results: Any) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results.put(function(*arguments))


def alone(function: Callable, *arguments: Any) -> Any:
    """The function's result, computed in a fresh process on one core."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with one_thread_each():
        process = context.Process(target=_one_core, args=(function, arguments, results))
        process.start()
    while results.empty() and process.is_alive():
        process.join(0.05)
    if results.empty():
        raise RuntimeError(f"{function.__name__} failed with exit code {process.exitcode}")
    value = results.get()
    process.join()
    return value


def _measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Best wall and CPU seconds of `repeats` runs, and the peak memory above what the process had before, MB."""
    before = _status_mb("VmRSS")
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    peak = _status_mb("VmHWM") - before
    return {"seconds": min(wall), "cpu_seconds": min(cpu), "peak_mb": peak}


def _status_mb(field: str) -> float:
    """A field of /proc/self/status in MB. (`ru_maxrss` would count what the parent had before this process began.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def _target_size(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, z = (round(n * a / b) for n, a, b in zip(shape, _SPACING, _TARGET, strict=True))
    return x, y, z


def _prepare_ours(path: str, size: tuple[int, int, int], repeats: int) -> dict[str, float]:
    from mg3d_jax.prepare.geometry import Grid
    from mg3d_jax.prepare.volumes import prepare_volume

    return _measure(lambda: prepare_volume(Path(path), Grid(size, _TARGET)), repeats)


def _prepare_usual(path: str, size: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """What preprocessing scripts commonly do: nibabel's floats, clipped, interpolated by torch."""
    import nibabel as nib
    import torch

    torch.set_num_threads(1)

    def run() -> None:
        image: Any = nib.load(path)
        data = np.clip(image.get_fdata(), -1000, 1000)
        tensor = torch.tensor(data).float()[None, None]
        torch.nn.functional.interpolate(tensor, size=size, mode="trilinear", align_corners=False)

    return _measure(run, repeats)


def _gunzip(path: str, repeats: int) -> dict[str, float]:
    from mg3d_jax.prepare.nifti import read_nifti

    return _measure(lambda: read_nifti(Path(path)), repeats)


def bench_preparation(folder: Path, shape: tuple[int, int, int] = (512, 512, 300), repeats: int = 3) -> dict[str, Any]:
    """Seconds and peak memory of preparing one volume: ours, the usual script's, and of reading the file alone."""
    import nibabel as nib

    path = folder / "volume.nii.gz"
    matrix = np.diag([-_SPACING[0], -_SPACING[1], _SPACING[2], 1.0])
    nib.save(nib.Nifti1Image(chest_like(shape), matrix), path)
    size = _target_size(shape)
    found = {
        "usual": alone(_prepare_usual, str(path), size, repeats),
        "ours": alone(_prepare_ours, str(path), size, repeats),
        "read": alone(_gunzip, str(path), repeats),
    }
    found["speedup"] = found["usual"]["cpu_seconds"] / found["ours"]["cpu_seconds"]
    found["memory_share"] = found["ours"]["peak_mb"] / found["usual"]["peak_mb"]
    return found


def report(found: dict[str, Any]) -> str:
    """The measurements as a table for people."""
    lines = []
    if prepared := found.get("preparation"):
        lines.append("preparation of 512 x 512 x 300 int16 .nii.gz to 0.75 x 0.75 x 1.5 mm, one core")
        lines.append(f"  {'':<28}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}")
        names = {"usual": "nibabel + clip + interpolate", "ours": "mg3d prepare", "read": "  of which reading"}
        for key, name in names.items():
            row = prepared[key]
            lines.append(f"  {name:<28}{row['seconds']:>9.2f}{row['cpu_seconds']:>9.2f}{row['peak_mb']:>9.0f}")
        lines.append(f"  {prepared['speedup']:.1f} x the speed, {prepared['memory_share']:.2f} of the memory")
    if loaded := found.get("loading"):
        lines += report_loading(loaded)
    if waiting := found.get("waiting"):
        lines += report_waiting(waiting)
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`mg3d bench data`. Prints the table; with --json writes the numbers too."""
    parser = argparse.ArgumentParser(prog="mg3d bench data", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("preparation", "loading"), help="measure only this")
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds; of preparation the best counts, else the median"
    )
    parser.add_argument("--volumes", type=int, default=64, help="volumes in the loading test")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of the step that may wait for data")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.volumes < BATCH:
        raise UserError(f"--repeats must be at least 1, --volumes at least {BATCH}")
    try:
        import monai  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"the comparison needs {error.name}: pip install -r requirements-dev.txt") from error
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mg3d-bench-") as folder:
        if args.only != "loading":
            found["preparation"] = bench_preparation(Path(folder), repeats=args.repeats)
        if args.only != "preparation":
            found["loading"] = bench_loading(Path(folder), args.volumes, args.repeats)
            found["waiting"] = bench_waiting(Path(folder), args.volumes, args.step_ms)
    print(report(found))
    if args.json:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
