"""How fast prepared records load, beside what is possible and beside MONAI's `PersistentDataset`: `mg3d bench data`.

Throughput: each way of loading has a process on one and the same core, and they take turns, round by round, so that what
else the machine does slows all of them alike; the median round counts, in CPU seconds. Waiting: a loop that asks for a batch
and then sleeps for as long as a step computes, as on an accelerator; which share of its time does it wait?
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.batch import AIR_HU, HIGHEST_HU

GRID = (128, 128, 96)
BATCH = 8
WAITING_WORKERS = 2  # of the contestants' data loaders: threads of ours, processes of torch's
Tasks = dict[str, Callable[[], int]]  # each returns how many volumes it loaded


def chest_like(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """int16 HU [X, Y, Z] with the histogram of a chest CT: air, body, two lungs, noise of 12 HU. Made by slices."""
    rng = np.random.default_rng(seed)
    x, y = (np.linspace(-1, 1, n)[:, None] if i == 0 else np.linspace(-1, 1, n) for i, n in enumerate(shape[:2]))
    out = np.empty(shape, np.int16, order="F")
    body = (x / 0.9) ** 2 + (y / 0.75) ** 2
    lungs = np.minimum(((x - 0.42) / 0.28) ** 2 + (y / 0.5) ** 2, ((x + 0.42) / 0.28) ** 2 + (y / 0.5) ** 2)
    for k, z in enumerate(np.linspace(-1, 1, shape[2])):
        hu = np.select([lungs + z**2 < 1, body < 0.85, body < 1], [-860.0, 40.0, -100.0], -1000.0)
        out[..., k] = np.clip(np.rint(hu + rng.normal(0, 12, shape[:2])), AIR_HU, HIGHEST_HU)
    return out


def _volumes(count: int, shape: tuple[int, int, int]) -> list[np.ndarray]:
    base = chest_like(shape)
    return [np.ascontiguousarray(np.roll(base, index, axis=0)) for index in range(count)]


def write_records(folder: Path, count: int, zstd_level: int, shape: tuple[int, int, int]) -> None:
    """A prepared folder of `count` chest-like volumes."""
    from mg3d_jax.data.record import Record, encode
    from mg3d_jax.data.records import FORMAT_VERSION, ShardWriter

    folder.mkdir()
    path = folder / "records.array_record"
    writer = ShardWriter(path)
    for index, volume in enumerate(_volumes(count, shape)):
        report, labels = f"Nodule of {index} mm.", np.zeros(18, np.int8)
        name = f"train_{index}_a_1.nii.gz"
        record = Record(volume, (report,), labels, name, name, name, f"{index:x}", np.eye(4), report, "", "bench")
        writer.write(encode(record, zstd_level=zstd_level))
    writer.close()
    shard = {"file": path.name, "records": count, "bytes": path.stat().st_size}
    manifest = {"format_version": FORMAT_VERSION, "shards": [shard], "grid": list(shape), "spacing": [2.8, 2.8, 3.5]}
    manifest |= {"label_names": [str(i) for i in range(18)], "patients": [[str(i), 1] for i in range(count)]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _tokenizer() -> Any:
    from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece

    return ReportTokenizer(train_wordpiece(["Nodule of 12 mm."] * 3, 200), 32, 4)


def ours(folder: str) -> Tasks:
    """Our reader on a prepared folder: encoded records, decoded into the rows of a batch, and the whole pipeline up to
    the host batch: order, decoding, tokens, grain's iterator."""
    from mg3d_jax.data.order import RecordOrder
    from mg3d_jax.data.pipeline import BatchReader, LocalBatches, PreparedData, host_batches

    data = PreparedData((folder,))
    reader, count = data.readers[0], len(data)
    order, source = RecordOrder(data.lengths, seed=0), BatchReader(data, _tokenizer())
    batch = np.empty((BATCH, *data.grid), np.int16)
    batches = LocalBatches(source, order, range(BATCH), BATCH, start=0, stop=count // BATCH)

    def rows() -> int:
        for position in range(count):
            reader.read_into(order[position], batch[position % BATCH])
        return count

    def whole() -> int:
        return sum(len(found["valid"]) for found in host_batches(batches, threads=0, workers=0))

    return {"decoded into a batch": rows, "whole pipeline": whole}


def _monai_dataset(folder: str, count: int, shape: tuple[int, int, int]) -> Any:
    import warnings

    warnings.simplefilter("ignore")
    import torch
    from monai.data import PersistentDataset
    from monai.transforms import Transform

    torch.set_num_threads(1)
    base = chest_like(shape)

    class Load(Transform):
        def __call__(self, index: int) -> dict[str, Any]:
            volume = np.roll(base, index, axis=0).astype(np.float32)
            return {"volume": torch.from_numpy(volume[None].copy())}

    return PersistentDataset(list(range(count)), Load(), cache_dir=folder)


def monai(folder: str, count: int, shape: tuple[int, int, int]) -> Tasks:
    """MONAI's `PersistentDataset` with float32 tensors of the same volumes, as its users keep them."""
    from monai.data import list_data_collate

    dataset = _monai_dataset(folder, count, shape)
    order = [int(i) for i in np.random.default_rng(0).permutation(count)]

    def items() -> int:
        for index in order:
            dataset[index]
        return count

    def batches() -> int:
        for start in range(0, count, BATCH):
            list_data_collate([dataset[i] for i in order[start : start + BATCH]])
        return count

    return {"items": items, "whole batches": batches}


def limits(count: int, shape: tuple[int, int, int]) -> Tasks:
    """Copying int16 volumes from memory into a batch; bare zstd decoding of the volumes, and of the records as we store
    them."""
    import zstandard

    from mg3d_jax.data.record import frames_of

    volumes, batch = _volumes(count, shape), np.empty((BATCH, *shape), np.int16)
    compress, decompress = zstandard.ZstdCompressor(level=3).compress, zstandard.ZstdDecompressor().decompress
    plain = [[compress(volume.tobytes())] for volume in volumes[:BATCH]]
    ours = [frames_of(volume) for volume in volumes[:BATCH]]

    def copy() -> int:
        for index, volume in enumerate(volumes):
            batch[index % BATCH] = volume
        return count

    def decode(packed: list[list[bytes]]) -> int:
        for index in range(count):
            for frame in packed[index % BATCH]:
                decompress(frame)
        return count

    tasks = {"memory copy": copy, "bare zstd of int16": lambda: decode(plain)}
    return tasks | {"bare zstd of our records": lambda: decode(ours)}


def _serve(make: Callable[..., Tasks], arguments: tuple, pipe: Any) -> None:
    """A contestant's process: makes its tasks, then does them when asked to. Answers (volumes, CPU seconds)."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    tasks = make(*arguments)
    for task in tasks.values():
        task()  # page cache, allocator, token cache
    pipe.send(list(tasks))
    while True:
        name = pipe.recv()
        start = time.process_time()
        count = tasks[name]()
        pipe.send((count, time.process_time() - start))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes started inside use one thread in their libraries, and JAX on the CPU."""
    names = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    old = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, text in old.items():
            os.environ.pop(name) if text is None else os.environ.update({name: text})


def in_turns(contestants: dict[str, tuple], repeats: int) -> dict[str, float]:
    """`{"contestant: task": volumes per CPU second}`, the median of `repeats` rounds in which all take their turn.

    contestants: name -> (function that makes the tasks, its arguments...)."""
    context, running = multiprocessing.get_context("spawn"), {}
    found: dict[str, list[float]] = {}
    try:
        with one_thread_each():
            for name, (make, *arguments) in contestants.items():
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(make, tuple(arguments), there), daemon=True)
                process.start()
                there.close()  # so that the end of the process is the end of the pipe
                running[name] = process, here
        tasks = {name: _answer(name, here) for name, (_, here) in running.items()}
        for _ in range(repeats):
            for name, (_, here) in running.items():
                for task in tasks[name]:
                    here.send(task)
                    count, seconds = _answer(name, here)
                    found.setdefault(f"{name}: {task}", []).append(count / seconds)
    finally:
        for process, here in running.values():
            process.terminate()
            process.join()
            here.close()
    return {name: statistics.median(rates) for name, rates in found.items()}


def _answer(name: str, pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name!r} failed, see its traceback above") from None


def bench_loading(folder: Path, count: int = 64, repeats: int = 5) -> dict[str, Any]:
    """`{"rates": volumes per second and core of every way, "bytes": of one volume on disk}`, from the page cache."""
    contestants: dict[str, tuple] = {"limit": (limits, count, GRID)}
    for name, level in (("raw", 0), ("zstd", 3)):
        write_records(folder / name, count, level, GRID)
        contestants[name] = (ours, str(folder / name))
    (folder / "monai").mkdir()
    contestants["MONAI"] = (monai, str(folder / "monai"), count, GRID)
    rates = in_turns(contestants, repeats)
    size = {name: (folder / name / "records.array_record").stat().st_size / count for name in ("raw", "zstd")}
    size["MONAI"] = sum(path.stat().st_size for path in (folder / "monai").rglob("*.pt")) / count
    return {"rates": rates, "bytes": size, "volumes": count}


def our_batches(folder: str, batches: int) -> Any:
    """Batches on the device, as training gets them."""
    from mg3d_jax import sharding
    from mg3d_jax.config.parts import DataConfig
    from mg3d_jax.data.pipeline import PreparedData, train_batches

    options, mesh = (
        DataConfig(batch_size=BATCH, read_threads=WAITING_WORKERS),
        sharding.make_mesh(sharding.MeshConfig()),
    )
    return train_batches(PreparedData((folder,)), _tokenizer(), options, mesh, seed=0, start=0, stop=batches)


def monai_batches(folder: str, batches: int, count: int, shape: tuple[int, int, int]) -> Any:
    """Batches of the same records as MONAI's users get them: torch's loader with worker processes."""
    import torch
    from monai.data import DataLoader

    dataset = _monai_dataset(folder, count, shape)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=batches * BATCH)
    options = {"num_workers": WAITING_WORKERS, "multiprocessing_context": "fork"}
    return iter(DataLoader(dataset, batch_size=BATCH, sampler=sampler, **options))


def waited(make: Callable[..., Any], arguments: tuple, steps: int, seconds: float, answer: Any) -> None:
    """Sends the seconds for which a loop of `steps` steps waited, the first two (start-up) not counted."""
    batches, total = make(*arguments), 0.0
    for step in range(steps + 2):
        start = time.perf_counter()
        next(batches)
        total += (time.perf_counter() - start) * (step >= 2)
        time.sleep(seconds)
    answer.send(total)


def bench_waiting(folder: Path, count: int, milliseconds: float, steps: int = 20) -> dict[str, Any]:
    """Share of a step's time for which it waits for a batch of `BATCH`, all of this process's cores at work. `folder` is
    as `bench_loading` left it."""
    context, share = multiprocessing.get_context("spawn"), {}
    contestants: dict[str, tuple[Callable[..., Any], tuple]] = {
        name: (our_batches, (str(folder / name), steps + 2)) for name in ("raw", "zstd")
    }
    contestants["MONAI"] = (monai_batches, (str(folder / "monai"), steps + 2, count, GRID))
    for name, (make, arguments) in contestants.items():
        here, there = context.Pipe()
        with one_thread_each():
            process = context.Process(target=waited, args=(make, arguments, steps, milliseconds / 1e3, there))
            process.start()
        there.close()
        seconds = _answer(name, here)
        share[name] = seconds / (seconds + steps * milliseconds / 1e3)
        process.join()
    return {"share": share, "milliseconds": milliseconds, "batch": BATCH, "workers": WAITING_WORKERS}


def report_loading(found: dict[str, Any]) -> list[str]:
    """The measurements of `bench_loading` as lines for people, every figure beside its limit."""
    rates, size, mega = found["rates"], found["bytes"], np.prod(GRID) * 2 / 1e6
    beside = {"raw": "limit: memory copy", "zstd": "limit: bare zstd of our records"}
    lines = ["loading of 128 x 128 x 96 volumes from the page cache, per second of one core (median)"]
    lines.append(f"  {'':<34}{'volumes/s':>10}{'MB/s':>8}{'of limit':>10}{'MB on disk':>12}")
    for name, rate in rates.items():
        who = name.split(":")[0]
        of_limit = f"{rate / rates[beside[who]]:.2f}" if who in beside else ""
        disk = f"{size[who] / 1e6:.2f}" if who in size else ""
        lines.append(f"  {name:<34}{rate:>10.0f}{rate * mega:>8.0f}{of_limit:>10}{disk:>12}")
    raw, zstd, items = rates["raw: whole pipeline"], rates["zstd: whole pipeline"], rates["MONAI: items"]
    bare = rates["limit: bare zstd of our records"]
    lines.append(
        f"  raw is {raw / items:.1f} x MONAI's items and {raw / rates['MONAI: whole batches']:.1f} x its batches; zstd takes "
        f"{bare / zstd:.2f} x the time of its bare decoding, "
        f"{rates['limit: bare zstd of int16'] / zstd:.2f} x that of plain int16, and "
        f"{size['zstd'] / size['MONAI']:.2f} of MONAI's bytes"
    )
    return lines


def report_waiting(found: dict[str, Any]) -> list[str]:
    """The measurements of `bench_waiting` as lines for people."""
    text = ", ".join(f"{name} {share:.1%}" for name, share in found["share"].items())
    about = f"of {found['milliseconds']:g} ms with {found['batch']} volumes, {found['workers']} readers"
    return [f"share of a step ({about}) that waits for data: {text}"]
