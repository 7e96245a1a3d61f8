"""The suite "cold" of ``compare bench``: how long the first call of a process takes.

Each op in a process of its own, twice: with an empty cache of compiled kernels on disk, and with
the one that the first left. What any first call pays (the GPU's context, imports) is paid before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .results import Row
from .tasks import Task, crashed, remaining
from .worker import Gone, Worker

if TYPE_CHECKING:
    from .bench import Run

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def work(run: Run, command: Sequence[str]) -> None:
    """Do a run's tasks that are not done, until its budget is spent."""
    start = run.clock()
    done = run.log.done(run.suite)
    left = [t for task in run.planned if (t := remaining(task, done)) is not None]
    for position, task in enumerate(left):
        for name in task.implementations:
            if (task.phases[0], name) in task.skip:
                continue
            if run.clock() - start > run.budget:
                run.left = len(left) - position
                return
            run._write([first_calls(replace(task, implementations=(name,)), command)])


def first_calls(task: Task, command: Sequence[str]) -> Row:
    """The row of one implementation of an op."""
    with tempfile.TemporaryDirectory() as folder:
        cold = _first_call(task, command, folder)
        warm = cold if cold.status != "ok" else _first_call(task, command, folder)
    if warm.status != "ok":
        return warm
    return replace(cold, cold_s=cold.cold_s, warm_s=warm.cold_s)


def _first_call(task: Task, command: Sequence[str], folder: str) -> Row:
    places = [f"{name}={os.path.join(folder, name)}" for name in CACHES]
    with closing(Worker(["env", *places, *command])) as worker:
        try:
            worker.start()
            said = list(worker.ask(asdict(task) | {"first_call": True}))
        except Gone as problem:
            return crashed(task, (task.phases[0], task.implementations[0]), str(problem))
    (message,) = (message for message in said if "rows" in message)
    return Row(**message["rows"][0])
