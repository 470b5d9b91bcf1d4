"""Run jobs on this machine: one thread a core, one BLAS thread each.

BLAS threads do not help here: two of them make an eigensolver slower than one, and where another process is busy they
spin and cost up to a hundred times the work. The numerics release the interpreter lock, so plain threads fill the
cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TypeVar

import torch

Job = TypeVar("Job")
Place = TypeVar("Place")
Result = TypeVar("Result")


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Result]]:
    """Yield (index of the job, its result) as jobs finish, started in the given order.

    At most `workers` jobs are in memory at once. When the caller stops early (an exception, Ctrl-C, `close`), no
    further job starts, and those under way are waited for.
    """
    from threadpoolctl import threadpool_limits

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            if workers <= 1:
                for index, job in enumerate(jobs):
                    yield index, work(job)
            else:
                yield from _run_threads(work, jobs, workers)
    finally:
        torch.set_num_threads(threads_before)


def run_on(
    work: Callable[[Job, Place], Result], jobs: Sequence[Job], places: Sequence[Place]
) -> Iterator[tuple[int, Result]]:
    """`run` with a worker for each of the places (devices, as a rule): `work(job, place)` has its place to itself.

    A place that is named twice has two workers.
    """
    free: SimpleQueue[Place] = SimpleQueue()
    for place in places:
        free.put(place)

    def placed(job: Job) -> Result:
        place = free.get()
        try:
            return work(job, place)
        finally:
            free.put(place)

    return run(placed, jobs, len(places))


def _run_threads(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Result]]:
    # OpenMP keeps its thread count per calling thread, so each worker sets its own.
    pool = ThreadPoolExecutor(workers, thread_name_prefix="spectra", initializer=torch.set_num_threads, initargs=(1,))
    waiting = iter(enumerate(jobs))
    running: dict[Future[Result], int] = {}
    try:
        while True:
            while len(running) < workers and (following := next(waiting, None)) is not None:
                running[pool.submit(work, following[1])] = following[0]
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
