"""How long each operation of a compiled program took, from a trace of the profiler, and which part of the model it is.

Operations carry the names of the modules that made them (`jit(step)/transpose(jvp(MG3D))/.../voxel_decoder/...`), so one
traced run of the very program that trains says where its time goes, forward and backward.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from mg3d_jax.benchmarks.hlo import COLLECTIVES, Instruction

# The first pattern that is found in an operation's path names its part.
PARTS: tuple[tuple[str, str], ...] = (
    (r"_reconstruct_volume/volume_encoder", "volume tower, visible patches"),
    (r"volume_encoder|volume_projection", "volume tower, whole volume"),
    (r"_embed_views", "report tower, single sentences"),
    (r"_reconstruct_report/report_encoder", "report tower, corrupted report"),
    (r"report_encoder|_encode_report|embed_report", "report tower, whole report"),
    (r"_reconstruct_report/fusion", "fusion with the corrupted report"),
    (r"fusion|_fused", "fusion with the whole report"),
    (r"sentence_conditioned_volume", "sentence-conditioned volume"),
    (r"voxel_decoder", "voxel decoder"),
    (r"_reconstruct_report|token_head|sentence_projection|_token_logits", "word and sentence heads"),
    (r"jvp\(", "inputs and objectives"),
    (r"jit\(", "optimizer"),
)
REST = "copies and fills"  # XLA's own, which no line of the model made
FORWARD, RECOMPUTED, BACKWARD, OPTIMIZER, COLLECTIVE = "forward", "recomputed", "backward", "optimizer", "collectives"


def part_of(path: str) -> str:
    """Part of the model of an operation with this path."""
    return next((part for pattern, part in PARTS if re.search(pattern, path)), REST)


def phase_of(path: str, opcode: str = "") -> str:
    """What of a training step it belongs to. "recomputed": forward again, in the backward pass of a rematerialised layer."""
    if opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return COLLECTIVE
    if "rematted_computation" in path:
        return RECOMPUTED
    if "transpose(" in path:
        return BACKWARD
    if "jvp(" in path:
        return FORWARD
    return OPTIMIZER if path else REST


def trace_operations(run: Callable[[], Any]) -> dict[str, float]:
    """Runs `run` under the profiler. Busy seconds of every HLO operation by name, without those nested in it, summed over
    devices or, on a CPU, threads. `run` must block until its results are there.

    The trace is read by JAX's own `ProfileData`; the tables of the package `xprof` have no operations of a CPU.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        seconds: dict[str, float] = defaultdict(float)
        for plane in devices or planes:
            for line in plane.lines:
                events = [(e.start_ns, e.duration_ns, _operation(e, line.name)) for e in line.events]
                for name, nanoseconds in own_times(events):
                    seconds[name] += nanoseconds * 1e-9
    return dict(seconds)


def _operation(event: Any, line: str) -> str:
    """Name of the HLO operation that an event is, or ""."""
    if line == "XLA Ops":  # TPU: the event's name is the instruction's text
        return event.name.split(" ", 1)[0].lstrip("%")
    return next((str(value) for key, value in event.stats if key == "hlo_op"), "")


def own_times(events: Iterable[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """`(start, duration, name)` of events that nest on one thread -> their names with the time not spent in inner ones.
    The time of events without a name is left out."""
    found: list[tuple[str, float]] = []
    open_events: list[list] = []  # [end, name, own time]

    def close(until: float) -> None:
        while open_events and open_events[-1][0] <= until:
            _, name, own = open_events.pop()
            if name:
                found.append((name, own))

    for start, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
        close(start)
        if open_events:
            open_events[-1][2] -= duration
        open_events.append([start + duration, name, duration])
    close(float("inf"))
    return found


def by_part_and_phase(seconds: Mapping[str, float], program: Mapping[str, Instruction]) -> dict[tuple[str, str], float]:
    """Busy seconds of operations, by name, summed by `(part, phase)`; `program` has the operations by name."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for name, value in seconds.items():
        path, opcode = (program[name].path, program[name].opcode) if name in program else ("", "")
        total[part_of(path), phase_of(path, opcode)] += value
    return dict(total)
