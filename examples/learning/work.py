"""Runs cells, one (task, seed) each, here or in processes of one thread; hands back finished units.

Knows processes and how a cell's lab is built. Does not know files of results or comparisons.
"""

import logging
import multiprocessing as mp
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.learning.arms import Arm
from examples.learning.deal import Sizes, deal
from examples.learning.lab import Knobs, Lab, Measured, Models, quiet
from examples.learning.programs import arms_of
from examples.learning.results import Row, Unit
from examples.learning.tasks import TASKS, BenchTask

LOOK_S = 2.0
"""How often the parent looks whether its workers live."""


class WorkError(RuntimeError):
    """A cell failed; the message holds its traceback."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cells have in common. `steps`, when above 0, replaces every task's steps."""

    data: Path
    models: Models
    sizes: Sizes
    knobs: Knobs
    held_back: bool = False
    open_rows: int = 80
    verified: bool = True
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """One (task, seed) and the units of it that are still to be done."""

    task: str
    seed: int
    todo: tuple[Unit, ...]


Finished = tuple[Unit, list[Row], float]
"""A unit, its rows, and the core-seconds it took."""


def units_of(task: str, seed: int, programs: Sequence[str]) -> list[Unit]:
    """All units of one cell."""
    return [_unit(task, seed, arm) for arm in arms_of(list(programs))]


def run_cell(cell: Cell, setup: Setup) -> Iterator[Finished]:
    """Measure the cell's units, in the order of the arms, which do not depend on each other."""
    quiet()
    began = time.process_time()
    lab = Lab(
        _task(cell.task, setup),
        deal(
            TASKS[cell.task],
            setup.data,
            _sizes(TASKS[cell.task], setup),
            seed=cell.seed,
            held_back=setup.held_back,
            verified=setup.verified,
        ),
        setup.models,
        setup.knobs,
        cell.seed,
    )
    for arm in arms_of(list(dict.fromkeys(unit[0] for unit in cell.todo if unit[0] != "-"))):
        unit = _unit(cell.task, cell.seed, arm)
        if unit not in cell.todo:
            continue
        rows = [_row(unit, found) for found in arm.measure(lab)]
        now = time.process_time()
        yield unit, rows, now - began
        began = now


def run(
    cells: Sequence[Cell], setup: Setup, *, jobs: int, store: Callable[[Finished], None]
) -> None:
    """Run all cells and `store` each unit as soon as it is finished.

    Raises:
        WorkError: a cell failed, or a worker was killed.
    """
    if jobs <= 1:
        for cell in cells:
            for finished in run_cell(cell, setup):
                store(finished)
        return
    context = mp.get_context("spawn")
    todo: Any = context.Queue()
    done: Any = context.Queue()
    for cell in cells:
        todo.put(cell)
    for _ in range(jobs):
        todo.put(None)
    workers = [
        context.Process(target=_worker, args=(todo, done, setup, os.getpid()), daemon=True)
        for _ in range(jobs)
    ]
    for worker in workers:
        worker.start()
    try:
        _gather(workers, done, store)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _gather(workers: list[Any], done: Any, store: Callable[[Finished], None]) -> None:
    left = len(workers)
    while left:
        try:
            news = done.get(timeout=LOOK_S)
        except queue.Empty:
            dead = [w for w in workers if w.exitcode not in (None, 0)]
            if dead:
                raise WorkError(
                    f"a worker ended with {dead[0].exitcode}; run again, finished units are kept"
                ) from None
            continue
        if news is None:
            left -= 1
        elif isinstance(news, str):
            raise WorkError(news)
        else:
            store(news)


def _worker(todo: Any, done: Any, setup: Setup, parent: int) -> None:
    silence()
    try:
        while (cell := todo.get()) is not None:
            for finished in run_cell(cell, setup):
                done.put(finished)
                if os.getppid() != parent:
                    return  # nobody is left to store it
        done.put(None)
    except Exception:
        done.put(traceback.format_exc())


def silence() -> None:
    """Libraries' progress bars and notices do not belong between our lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("coordinator").setLevel(logging.ERROR)


def _task(name: str, setup: Setup) -> BenchTask:
    return replace(TASKS[name], steps=setup.steps) if setup.steps else TASKS[name]


def _sizes(task: BenchTask, setup: Setup) -> Sizes:
    rows = min(setup.open_rows, setup.sizes.device_rows)
    return replace(setup.sizes, device_rows=rows) if task.is_open else setup.sizes


def _unit(task: str, seed: int, arm: Arm) -> Unit:
    return arm.program, task, arm.setting, arm.ablation, seed


def _row(unit: Unit, found: Measured) -> Row:
    return Row(unit, found.model, found.role, found.metric, found.value)
