"""`mg3d bench data`: how fast are preparation and loading, beside what the field uses and beside what is possible.

Every number is measured in a process of its own, bound to one core, on data made for the purpose:

- preparation: `mg3d`'s reader against the usual script (nibabel `get_fdata`, clip, torch `interpolate`) on one
  512 x 512 x 300 int16 `.nii.gz`, to the same 0.75 x 0.75 x 1.5 mm grid; seconds and peak memory.
- loading: prepared records through grain up to the host batch, against MONAI's `PersistentDataset` of the same volumes
  (float32, as its users keep them), against a bare memory copy and a bare zstd decode.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError

_SPACING = (0.7, 0.7, 1.0)  # mm of the volume that is prepared
_TARGET = (0.75, 0.75, 1.5)
_GRID = (128, 128, 96)
_BATCH = 8


def chest_like(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """int16 HU [X, Y, Z] with the histogram of a chest CT: air, body, two lungs, noise of 12 HU. Made by slices."""
    rng = np.random.default_rng(seed)
    x, y = (np.linspace(-1, 1, n)[:, None] if i == 0 else np.linspace(-1, 1, n) for i, n in enumerate(shape[:2]))
    out = np.empty(shape, np.int16, order="F")
    body = (x / 0.9) ** 2 + (y / 0.75) ** 2
    lungs = np.minimum(((x - 0.42) / 0.28) ** 2 + (y / 0.5) ** 2, ((x + 0.42) / 0.28) ** 2 + (y / 0.5) ** 2)
    for k, z in enumerate(np.linspace(-1, 1, shape[2])):
        hu = np.select([lungs + z**2 < 1, body < 0.85, body < 1], [-860.0, 40.0, -100.0], -1000.0)
        out[..., k] = np.clip(np.rint(hu + rng.normal(0, 12, shape[:2])), -1024, 3071)
    return out


def _one_core(function: Callable, arguments: tuple, results: Any) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results.put(function(*arguments))


def alone(function: Callable, *arguments: Any) -> Any:
    """The function's result, computed in a fresh process on one core."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    old = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "JAX_PLATFORMS")}
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", JAX_PLATFORMS="cpu")
    try:
        process = context.Process(target=_one_core, args=(function, arguments, results))
        process.start()
        while results.empty() and process.is_alive():
            process.join(0.05)
        if results.empty():
            raise RuntimeError(f"{function.__name__} failed with exit code {process.exitcode}")
        value = results.get()
        process.join()
        return value
    finally:
        for name, text in old.items():
            os.environ.pop(name) if text is None else os.environ.update({name: text})


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


def _target_size(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(round(n * a / b) for n, a, b in zip(shape, _SPACING, _TARGET, strict=True))


def _prepare_ours(path: str, size: tuple[int, ...], repeats: int) -> dict[str, float]:
    from mg3d_jax.data.geometry import Grid
    from mg3d_jax.data.volumes import prepare_volume

    return _measure(lambda: prepare_volume(Path(path), Grid(size, _TARGET)), repeats)


def _prepare_usual(path: str, size: tuple[int, ...], repeats: int) -> dict[str, float]:
    """What preprocessing scripts of the field do."""
    import nibabel as nib
    import torch

    torch.set_num_threads(1)

    def run() -> None:
        data = np.clip(nib.load(path).get_fdata(), -1000, 1000)
        tensor = torch.tensor(data).float()[None, None]
        torch.nn.functional.interpolate(tensor, size=size, mode="trilinear", align_corners=False)

    return _measure(run, repeats)


def _gunzip(path: str, repeats: int) -> dict[str, float]:
    from mg3d_jax.data.nifti import read_nifti

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


def _write_records(folder: Path, count: int, zstd_level: int) -> None:
    """A prepared folder of `count` chest-like volumes."""
    from mg3d_jax.data.records import FORMAT_VERSION, Record, ShardWriter, encode

    folder.mkdir()
    writer = ShardWriter(folder / "records.array_record", zstd_level=zstd_level)
    base = chest_like(_GRID)
    for index in range(count):
        report, labels = f"Nodule of {index} mm.", np.zeros(18, np.int8)
        name = f"train_{index}_a_1.nii.gz"
        volume = np.ascontiguousarray(np.roll(base, index, axis=0))
        record = Record(volume, (report,), labels, name, name, name, f"{index:x}", np.eye(4), report, "", "bench")
        writer.write(encode(record, planes=zstd_level > 0))
    writer.close()
    shard = {"file": "records.array_record", "records": count}
    manifest = {"format_version": FORMAT_VERSION, "shards": [shard], "grid": list(_GRID), "spacing": [2.8, 2.8, 3.5]}
    manifest |= {"label_names": [str(i) for i in range(18)], "patients": [[str(i), 1] for i in range(count)]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _rate(function: Callable[[], Any], count: int, repeats: int) -> float:
    """Best volumes per CPU second (on a core that nobody shares: also per second)."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return count / best


def _load_ours(folder: str, repeats: int) -> dict[str, float]:
    """Volumes per second: record bytes alone; records decoded into the rows of a batch; and the pipeline's whole way:
    grain's shuffled order, decoding into host batches, tokens, and grain's iterator."""
    import grain

    from mg3d_jax.data.pipeline import BatchReader, LocalBatches, PreparedData
    from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece

    data = PreparedData((folder,))
    reader, count = data.readers[0], len(data)
    tokenizer = ReportTokenizer(train_wordpiece(["Nodule of 12 mm."] * 3, 200), 32, 4)
    source = LocalBatches(BatchReader(data, tokenizer), range(_BATCH), _BATCH, seed=0, start=0, stop=count // _BATCH)
    # The order of a large data set: grain's shuffle walks a domain of 2^16 however few records there are.
    order = grain.MapDataset.range(1 << 16).shuffle(seed=0).map(lambda i: int(i) % count)[:count]
    source.order = order
    batch = np.empty((_BATCH, *_GRID), np.int16)

    def read() -> None:
        for index in order:
            reader.read_bytes(index)

    def rows() -> None:
        for position, index in enumerate(order):
            reader.read_into(index, batch[position % _BATCH])

    def whole() -> None:
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        for _ in grain.MapDataset.source(source).to_iter_dataset(options):
            pass

    whole()  # fills the page cache and the cache of tokens
    return {
        "bytes": _rate(read, count, repeats),
        "rows": _rate(rows, count, repeats),
        "batches": _rate(whole, len(source) * _BATCH, repeats),
    }


def _load_monai(folder: str, count: int, repeats: int) -> dict[str, float]:
    """MONAI's PersistentDataset with float32 tensors of the same volumes, and the bytes that one takes on disk."""
    import warnings

    warnings.simplefilter("ignore")
    import torch
    from monai.data import PersistentDataset, list_data_collate
    from monai.transforms import Transform

    torch.set_num_threads(1)
    base = chest_like(_GRID)

    class Load(Transform):
        def __call__(self, index: int) -> dict[str, Any]:
            volume = np.roll(base, index, axis=0).astype(np.float32)
            return {"volume": torch.from_numpy(volume[None].copy())}

    dataset = PersistentDataset(list(range(count)), Load(), cache_dir=folder)
    order = [int(i) for i in np.random.default_rng(0).permutation(count)]

    def read() -> None:
        for index in order:
            dataset[index]

    def batches() -> None:
        for start in range(0, count, _BATCH):
            list_data_collate([dataset[i] for i in order[start : start + _BATCH]])

    read()
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.pt")) / count
    return {"items": _rate(read, count, repeats), "batches": _rate(batches, count, repeats), "bytes": size}


def _limits(count: int, repeats: int) -> dict[str, float]:
    """Volumes per second of copying int16 volumes into a batch, and of bare zstd decoding of their plain bytes."""
    volume, batch = chest_like(_GRID), np.empty((_BATCH, *_GRID), np.int16)
    volume = np.ascontiguousarray(volume)

    def copy() -> None:
        for index in range(count):
            batch[index % _BATCH] = volume

    copy()
    limits = {"memcpy": _rate(copy, count, repeats)}
    if name := ctypes.util.find_library("zstd"):
        library = ctypes.CDLL(name)
        for function in (library.ZSTD_compress, library.ZSTD_decompress, library.ZSTD_compressBound):
            function.restype = ctypes.c_size_t
        plain = volume.tobytes()
        packed = ctypes.create_string_buffer(library.ZSTD_compressBound(ctypes.c_size_t(len(plain))))
        size = library.ZSTD_compress(packed, ctypes.c_size_t(len(packed)), plain, ctypes.c_size_t(len(plain)), 3)
        target = ctypes.create_string_buffer(len(plain))

        def decode() -> None:
            for _ in range(count):
                library.ZSTD_decompress(target, ctypes.c_size_t(len(plain)), packed, ctypes.c_size_t(size))

        limits |= {"zstd": _rate(decode, count, repeats), "zstd_bytes": float(size)}
    return limits


def bench_loading(folder: Path, count: int = 64, repeats: int = 5) -> dict[str, Any]:
    """Volumes per second and core of every way of loading the same volumes, from the page cache."""
    found: dict[str, Any] = {"limits": alone(_limits, count, repeats)}
    for name, level in (("raw", 0), ("zstd", 3)):
        _write_records(folder / name, count, level)
        found[name] = alone(_load_ours, str(folder / name), repeats)
        found[name]["disk_bytes"] = (folder / name / "records.array_record").stat().st_size / count
    found["monai"] = alone(_load_monai, str(folder / "monai"), count, repeats)
    return found


def _rows(name: str, found: dict[str, float]) -> list[tuple[str, float, float | None]]:
    return [
        (f"{name}: bytes", found["bytes"], found["disk_bytes"]),
        (f"{name}: decoded into a batch", found["rows"], None),
        (f"{name}: whole pipeline", found["batches"], None),
    ]


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
        limits, monai = loaded["limits"], loaded["monai"]
        lines.append("loading of 128 x 128 x 96 volumes from the page cache, per second of one core")
        lines.append(f"  {'':<28}{'volumes/s':>10}{'MB/s':>8}{'MB on disk':>12}")
        mega = np.prod(_GRID) * 2 / 1e6
        rows = [("limit: memory copy", limits["memcpy"], None), *_rows("raw", loaded["raw"])]
        if "zstd" in limits:
            rows.append(("limit: bare zstd of int16", limits["zstd"], limits["zstd_bytes"]))
        rows += [*_rows("zstd", loaded["zstd"])]
        rows += [("MONAI: items", monai["items"], None), ("MONAI: to host batch", monai["batches"], monai["bytes"])]
        for name, rate, size in rows:
            disk = f"{size / 1e6:>12.2f}" if size else ""
            lines.append(f"  {name:<28}{rate:>10.0f}{rate * mega:>8.0f}{disk}")
        lines.append(
            f"  raw is {loaded['raw']['batches'] / monai['items']:.1f} x MONAI's items and "
            f"{loaded['raw']['batches'] / limits['memcpy']:.2f} of the copy limit; zstd takes "
            f"{loaded['zstd']['disk_bytes'] / monai['bytes']:.2f} of MONAI's bytes"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`mg3d bench data`. Prints the table; with --json writes the numbers too."""
    parser = argparse.ArgumentParser(prog="mg3d bench data", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("preparation", "loading"), help="measure only this")
    parser.add_argument("--repeats", type=int, default=3, help="the best of this many runs counts")
    parser.add_argument("--volumes", type=int, default=64, help="volumes in the loading test")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.volumes < 1:
        raise UserError("--repeats and --volumes must be at least 1")
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
    print(report(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
