"""How checkpoints lie on the disk: all that this package uses of orbax, behind one class.

Saving is asynchronous and atomic: orbax writes a folder under a temporary name and renames it when all processes are done.
Reading places every array by the shardings of the run that reads.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mg3d_jax.errors import storage_problem

STATE, META = "state", "meta"  # the two items of a checkpoint: arrays, and JSON
HALF_WRITTEN = ".orbax-checkpoint-tmp"  # orbax's mark of a folder that is not complete

Kept = Callable[[Sequence[int]], set[int]]  # steps that there are -> those that stay


class Storage:
    """Checkpoints of a folder, `FOLDER/STEP/{state,meta}`. Nothing on disk changes before the first `save`.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._manager: Any = None  # orbax's, between `open` and `close`
        self._quiet = ExitStack()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def half_written(self) -> list[Path]:
        """Folders of saves that did not come to their end."""
        return sorted(self.folder.glob(f"*{HALF_WRITTEN}*")) if self.folder.is_dir() else []

    @property
    def is_open(self) -> bool:
        """Is there a writer, which has to be closed?"""
        return self._manager is not None

    def open(self, kept: Kept) -> None:
        """Makes the writer. All processes must call it, when what damage and kills have left is out of the way.

        `kept` says which of the steps stay when another one is saved.
        """
        self._quiet.enter_context(_without_repetitions())
        handlers, text = ocp.handlers.DefaultCheckpointHandlerRegistry(), ocp.JsonCheckpointHandler()
        for item, args, handler in (
            (STATE, (ocp.args.PyTreeSave, ocp.args.PyTreeRestore), _state_handler()),
            (META, (ocp.args.JsonSave, ocp.args.JsonRestore), text),
        ):
            for kind in args:
                handlers.add(item, kind, handler)
        options = ocp.CheckpointManagerOptions(preservation_policy=_Policy(kept))
        self._manager = _Manager(self.folder, options=options, handler_registry=handlers)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts a save. What the disk refuses is raised here, by a later `save`, or by `close`."""
        items = {STATE: ocp.args.PyTreeSave(state), META: ocp.args.JsonSave(meta)}
        with self._quiet_after_an_error():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def has(self, step: int) -> bool:
        """Is it there, or being written?"""
        return step in self._manager.all_steps()

    def wait(self) -> None:
        """Until no save is under way; whatever goes wrong has been or will be raised elsewhere."""
        with suppress(Exception), self._quiet_after_an_error():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way and raises what went wrong with them."""
        manager, self._manager = self._manager, None
        if manager is None:
            return
        with self._quiet_after_an_error():
            try:
                manager.wait_until_finished()
            finally:
                manager.close()
        self._quiet.close()

    @contextmanager
    def _quiet_after_an_error(self) -> Iterator[None]:
        """What orbax and asyncio say of an error may come when it was raised long ago: `close` must not let it through."""
        try:
            yield
        except Exception:
            self._quiet.pop_all()
            raise

    def read_state(self, step: int, abstract: Any, *, part: bool) -> Any:
        """The arrays of `abstract` (shapes, dtypes, shardings); `part`: it need not be the whole state.

        Without the barriers of orbax's manager: a process that fails must not leave the others waiting there.
        """
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=placed, partial_restore=part)
        with _without_repetitions(), closing(_state_handler()) as handler:
            return handler.restore(self.folder / str(step) / STATE, args=args)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint."""
        with closing(ocp.JsonCheckpointHandler()) as handler:
            return dict(handler.restore(self.folder / str(step) / META, args=ocp.args.JsonRestore()))

    def shapes(self, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """`{"params/volume_encoder/...": (shape, dtype)}` as the files say, for what lies in plain dicts."""
        with closing(_state_handler()) as handler:
            found = handler.metadata(self.folder / str(step) / STATE).tree
        leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: hasattr(x, "dtype"))
        named = ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves)
        return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named if hasattr(leaf, "shape")}


def barrier(name: str, minutes: float) -> None:
    """Waits until all processes have come here; `name` must be new each time. Devices take no part."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=round(minutes * 60_000))


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: JAX's service takes a question about a step for one of those of `stopping.StopRequest`, which have numbers of
        their own."""
        return False


class _Policy:
    """orbax's preservation policy."""

    def __init__(self, kept: Kept):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        kept = self._kept(steps)
        return [step in kept for step in steps]


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """orbax's own, but copies of an array share the work of writing it only where each has a MiB or more to write.

    It would cut the smallest bias into one piece per device, and compile a program for every cut.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


@contextmanager
def _without_repetitions() -> Iterator[None]:
    """One error of the disk is enough: without this hundreds of tracebacks bury the `UserError` that explains it.

    orbax logs the error in each of its threads, asyncio that of every array that nobody waited for, and tensorstore's reports
    reach an event loop that is closed. They come when orbax has left already: so after an error all stay out for the rest of
    the process.
    """
    logs, show = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def kept(record: logging.LogRecord) -> bool:  # a function of this call: one that ends takes no other's away
        return not (record.exc_info and storage_problem(record.exc_info[1]))

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    for log in logs:
        log.addFilter(kept)
    sys.unraisablehook = hook
    yield
    for log in logs:
        log.removeFilter(kept)
    if sys.unraisablehook is hook:
        sys.unraisablehook = show
