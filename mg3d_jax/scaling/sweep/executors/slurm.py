"""Trains runs as jobs of SLURM, by submitit: one task per node, put back into the queue at the time limit or a preemption.

Every task runs the training command; JAX finds its peers by SLURM's variables, as with `launch/slurm.sbatch`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.scaling.sweep.executors.base import Executor, Job, Start, open_log

FOLDER = "slurm"  # beside the runs: what submitit writes of its jobs
MOST_TIMEOUTS = 10_000  # a run may need any number of time limits: what does not get on is ended by the sweep
SIGNAL_SECONDS = 300  # before the time limit: what a large run may need to save
GENERIC = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")  # of any cluster
DEFAULTS: dict[str, Any] = {"timeout_min": 60, "nodes": 1, "tasks_per_node": 1, "slurm_signal_delay_s": SIGNAL_SECONDS}


class Training:
    """What every task of a job runs. submitit calls `checkpoint` before the job is put back into the queue.

    With several tasks it does so in the first one alone, and the trainers agree on the step by themselves.
    """

    def __init__(self, command: Sequence[str], log: str):
        self.command, self.log = list(command), log
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """The exit code of the trainer."""
        rank = os.environ.get("SLURM_PROCID", "0")
        with open(self.log if rank == "0" else f"{self.log}.{rank}", "a") as output:
            # A session of its own: SLURM's signal to the task is not the trainer's.
            self._process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self._wait()

    def _wait(self) -> int:
        # The signal's handler comes here while the main thread is here already: `Popen.wait` would lock itself out.
        process, codes = self._process, list[int]()
        assert process is not None
        threading.Thread(target=lambda: codes.append(process.wait()), daemon=True).start()
        while not codes:
            time.sleep(0.2)
        return codes[0]

    def checkpoint(self) -> Any:
        """Has the trainer save and leave; what the job runs next time."""
        import submitit

        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._wait()
        return submitit.helpers.DelayedSubmission(Training(self.command, self.log))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None}


class SlurmJob(Job):
    """A job that was submitted; it goes on without this process."""

    outlives = True

    def __init__(self, job: Any, start: Start):
        self._job, self._log = job, start.log
        self.label = f"SLURM job {job.job_id}"
        self.facts = {"job": job.job_id, "folder": str(job.paths.folder), "kind": type(job).__name__}

    def poll(self) -> int | None:
        import submitit

        if not self._job.done():
            return None
        try:
            return int(self._job.result())
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            with self._log.open("a") as log:  # lost with its node, cancelled, out of memory
                log.write(f"{self.label} is {self._job.state}: {str(error).strip().splitlines()[0]}\n")
            return 1


class Slurm(Executor):
    """One job per run. Options are submitit's: `timeout_min`, `nodes`, `gpus_per_node`, `partition`, `account`, ..."""

    name = "slurm"
    python = sys.executable

    def check(self, options: Mapping[str, str]) -> None:
        """What submitit knows, it tells when it makes the jobs."""
        self._cluster = options.get("cluster", "slurm")
        given = {
            key if key in GENERIC else f"slurm_{key.removeprefix('slurm_')}": value for key, value in options.items()
        }
        given.pop("slurm_cluster", None)
        self._parameters = DEFAULTS | {key: int(value) if value.isdecimal() else value for key, value in given.items()}

    def prepare(self, workdir: Path) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UserError("the executor 'slurm' needs submitit: pip install 'mg3d_jax[slurm]'") from error
        try:
            self._jobs = submitit.AutoExecutor(
                workdir.resolve() / FOLDER, cluster=self._cluster, slurm_max_num_timeout=MOST_TIMEOUTS
            )
            self._jobs.update_parameters(**self._parameters)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise UserError(f"the executor 'slurm': {error}") from error

    def start(self, start: Start) -> Job:
        import submitit

        self._jobs.update_parameters(name=start.run.id)
        with open_log(start, " ".join(start.command)):
            pass
        try:
            return SlurmJob(self._jobs.submit(Training(start.command, str(start.log.resolve()))), start)
        except submitit.core.utils.FailedJobError as error:  # sbatch's own words
            raise UserError(f"{start.run.id} cannot be submitted: {error}") from error

    @staticmethod
    def alive(facts: Mapping[str, Any], folder: Path) -> bool:
        """As SLURM says, or the result that the job has left."""
        try:
            import submitit
        except ImportError:  # here is only looked on
            return True
        return not getattr(submitit, facts["kind"])(folder=facts["folder"], job_id=facts["job"]).done()
