"""Runs that are killed again and again at random moments, and end bit for bit as one that was left alone.

    python tests/soak.py --kills 100

KILL, TERM, INT or HUP goes to the trainer, to a worker process that reads its data, or to one of two processes. Each run is
to be killed `PER_RUN` times, and then trains to its end; where it has ended before, that counts as no kill. Of two processes
one may end before it has joined the other, which nobody can tell the other: it is killed then, as launch/common.sh does.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from support import free_port
from zygote import Zygote, send, state_of

from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.writers import read_metrics

CONFIG = """
from support import slow_evaluation, slow_steps, tiny_builder, with_plain_towers

def get_config(arg=""):
    if arg == "slow":
        slow_steps(0.1)
    if arg == "slow evaluation":
        slow_evaluation(0.3)
    config = with_plain_towers(tiny_builder({train!r}), "heavy" if arg == "heavy" else "plain")
    config.training.writers = ("jsonl",)
    return config
"""


def workers_of(process: int) -> list[int]:
    """The processes below it that read data: those that have no others below them."""
    below, found = [process], []
    while below:
        parent = below.pop()
        with suppress(OSError):
            threads = Path(f"/proc/{parent}/task").iterdir()
            children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
            below += children
            if parent != process and not children and "resource_tracker" not in _words(parent):
                found.append(parent)
    return found


def _words(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")


def write_config(folder: Path, train: str) -> Path:
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(train=train))
    return path


def command(config_file: Path, workdir: Path, form: str = "", **settings: object) -> list[str]:
    """`form`: "slow" has steps of 0.1 s or more, "slow evaluation" such batches, "heavy" a state of several MiB; "" neither."""
    words = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return ["train", "--config", f"{config_file}:{form}", "--workdir", str(workdir), *words]


def lines(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition, seconds: float = 300, pause: float = 0.02) -> None:
    """Looks again after each `pause`, in seconds: looking takes the time of the process that is waited for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir, "train")}


def arrays(workdir: Path) -> tuple[int | None, dict[tuple, bytes]]:
    """The newest checkpoint as orbax alone reads it, one line per array."""
    step = Checkpoints(workdir).latest()
    path, reader = workdir / "checkpoints" / str(step) / "state", ocp.PyTreeCheckpointer()
    # As NumPy arrays: their devices may have been those of two processes.
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree)
    tree = reader.restore(path, restore_args=plain)
    flat = ocp.tree.to_flat_dict(tree)
    return step, {name: np.asarray(value).tobytes() for name, value in flat.items()}


SETTINGS = {"training__steps": 60, "training__checkpoint_every": 4}
PER_RUN = 10
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TARGETS = ("trainer", "trainer", "trainer", "worker", "one of two")
MOMENTS = ("while it starts", "after a step", "while it saves", "after a save")
INTERRUPTED = 130  # of a shell, by Ctrl-C
LONGEST_WAIT = 1.0  # seconds of training for a moment to come
PATIENCE = 120.0  # seconds that a process may take to save and leave
LAUNCHERS_PATIENCE = 10.0  # twice that of launch/common.sh


class Soak:
    """Kills runs of `config_file` in `folder`. `said`: what happened, a line per kill; `hits`: those that ended a process."""

    def __init__(self, zygote: Zygote, config_file: Path, folder: Path, seed: int = 0):
        self.zygote, self.config_file, self.folder = zygote, config_file, folder
        self.rng, self.said, self.whole = random.Random(seed), list[str](), folder / "whole"
        self.log, self.hits = folder / "log", 0
        began = time.monotonic()
        zygote.start(command(config_file, self.whole, **SETTINGS), folder / "whole.log", 2)  # compiles for the others
        wait_until(lambda: lines(self.whole) > 0)
        self.starting = (time.monotonic() - began) / 2
        assert zygote.wait() == 0, (folder / "whole.log").read_text()

    def episode(self, name: str, plan: list[tuple[str, int, str]]) -> bool:
        """A run that is killed by `plan`, (target, signal, moment) each, and then ends: as the one left alone?"""
        run = self.folder / name
        for target, number, moment in plan:
            complete = Checkpoints(run).latest() or 0
            codes = self._killed(run, target, number, moment)
            self.hits += any(codes)
            self.said.append(f"{name}: {signal.Signals(number).name} to {target} {moment}: exit codes {codes}")
            assert (Checkpoints(run).latest() or 0) >= complete, self.said[-1]
            # A signal that comes before the run listens ends it as it ends any program: there is nothing to save.
            early = {-number, INTERRUPTED} if moment == MOMENTS[0] else set()
            alone = {-signal.SIGKILL} if early & set(codes) else set()
            expected = {0, 75, *early, *alone, *([-signal.SIGKILL] if number == signal.SIGKILL else ())}
            assert set(codes) <= expected, (self.said[-1], self.log.read_text()[-5000:])
        code = self.zygote.run(command(self.config_file, run, **SETTINGS), self.log, 2)
        assert code == 0 and "is damaged" not in self.log.read_text(), self.log.read_text()
        assert not list((run / "checkpoints").glob("*tmp*"))
        return losses(run) == losses(self.whole) and arrays(run) == arrays(self.whole)

    def plan(self, kills: int) -> list[tuple[str, int, str]]:
        draw = self.rng.choice
        return [(draw(TARGETS), draw(SIGNALS), draw(MOMENTS)) for _ in range(kills)]

    def _killed(self, run: Path, target: str, number: int, moment: str) -> list[int]:
        """Starts it, sends the signal, and waits for the end: the exit codes of its processes."""
        words = command(self.config_file, run, "slow", **SETTINGS, data__workers=int(target == "worker"))
        if target == "one of two":
            place = ["--num-processes", "2", "--coordinator", f"localhost:{free_port()}", "--process-id"]
            started = [self.zygote.start([*words, *place, str(n)], self.log, 1, beside=n > 0) for n in range(2)]
        else:
            started = [self.zygote.start(words, self.log, 2)]
        self._wait_for_moment(run, moment, started)
        victim = self.rng.choice(started)
        if target == "worker":
            workers: list[int] = []
            with suppress(AssertionError):
                wait_until(lambda: workers.extend(workers_of(victim)) or workers or state_of(victim) == "Z", 3)
            for worker in workers[-1:]:
                send(worker, number)
            if number != signal.SIGTERM:  # which workers do not get: it is for the trainer
                with suppress(AssertionError):  # some signals a worker outlives, and the run must not end meanwhile
                    wait_until(lambda: state_of(victim) == "Z", 2)
            send(victim, signal.SIGTERM)
        else:
            send(victim, number)
        code = self.zygote.wait_for(victim, PATIENCE)
        # The others wait for a process that has ended before it came to them; `launch/*` does not let them wait for long.
        patience = PATIENCE if code in (0, 75) or moment != MOMENTS[0] else LAUNCHERS_PATIENCE
        return [code if process == victim else self.zygote.wait_for(process, patience) for process in started]

    def _wait_for_moment(self, run: Path, moment: str, started: list[int]) -> None:
        """Returns somewhere in a moment of `MOMENTS`, or when a process has ended."""
        end = time.monotonic() + self.rng.uniform(0, self.starting) if moment == MOMENTS[0] else float("inf")

        def seen() -> object:
            folders = [path.name for path in (run / "checkpoints").glob("*")]
            saving = [name for name in folders if not name.isdecimal()]
            return {
                "while it starts": lines(run), "after a step": lines(run), "while it saves": saving,
                "after a save": set(folders) - set(saving),
            }[moment]  # fmt: skip

        before, logged, missed = seen(), lines(run), float("inf")

        def come() -> bool:
            nonlocal before, missed
            now = seen()
            if isinstance(now, int) and isinstance(before, int):
                before = min(before, now)  # a resumed run drops what came after its checkpoint, which is no step
            # Once it trains, a save that nobody sees must not take all of it.
            if missed == float("inf") and lines(run) > logged:
                missed = time.monotonic() + LONGEST_WAIT
            ended = any(state_of(process) == "Z" for process in started)
            return time.monotonic() > min(end, missed) or now not in (before, 0, [], set()) or ended

        wait_until(come, pause=0.003)  # a save is over soon
        if moment != MOMENTS[0]:
            time.sleep(self.rng.uniform(0, 0.05))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: %(default)s)")
    parser.add_argument("--train", help="a prepared folder on a 16^3 grid (default: phantoms are made)")
    args = parser.parse_args()
    from conftest import make_tiny_data

    same, done, runs, faults = 0, 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        if not args.train:
            make_tiny_data(Path(folder))
        zygote = Zygote()
        soak = Soak(
            zygote, write_config(Path(folder), args.train or str(Path(folder) / "train")), Path(folder), args.seed
        )
        while done < args.kills:
            plan, before = soak.plan(min(PER_RUN, args.kills - done)), soak.hits
            try:
                good = soak.episode(f"run{runs}", plan)
            except AssertionError as error:
                good = False
                faults.append(f"{soak.said[-1:]}: {error}")
                print(faults[-1][:2000], flush=True)
            print("\n".join(line for line in soak.said if line.startswith(f"run{runs}: ")), flush=True)
            runs, hits = runs + 1, soak.hits - before
            done, same = done + hits, same + good * hits
            print(f"{same} of {done} kills: bit-identical at the end", flush=True)
        zygote.close()
        print(Counter(line.partition(": ")[2].partition(" to ")[0] for line in soak.said))
    print("\n".join(faults) or f"{same} of {done} kills left nothing different")
    return 0 if same == done else 1


if __name__ == "__main__":
    raise SystemExit(main())
