"""Runs side by side: a process each, with one BLAS thread, that lives as long as there is work and no longer.

Processes and not threads, because a run seeds the generators of its process and keeps the interpreter busy. A worker
that dies (out of memory) costs its own run alone; workers whose parent is gone leave at once, so that a sweep which
was killed can be gone on with in the same folder.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from spectra.errors import SpectraError

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PATIENCE = 60.0  # seconds in which a worker that is told to stop may save its state


@dataclass(frozen=True)
class Died:
    """What came of a job whose worker ended in the midst of it; `code` as of `Process.exitcode`."""

    code: int | None

    def __str__(self) -> str:
        how = f"was ended by signal {-self.code}" if self.code is not None and self.code < 0 else "ended"
        return f"the process that ran it {how} (too little memory?); run the sweep again, with fewer workers"


def run_here(work: Callable[[Any, str | None], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield (index, `work(job, None)`) one after the other in this process, with one thread, as the workers have."""
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with threadpool_limits(limits=1, user_api="blas"):
            for index, job in enumerate(jobs):
                yield index, work(job, None)
    finally:
        torch.set_num_threads(threads)


class Processes:
    """A spawned process a place, each started with its first job; leave by `with`, which ends them.

    Args: work: sent to every process once, with what it carries; it must catch what may go wrong in a job.
        places: names of devices, or None, which `work(job, place)` gets.
    """

    def __init__(self, work: Callable[[Any, str | None], Any], places: Sequence[str | None]) -> None:
        context = mp.get_context("spawn")
        self._workers = [_Worker(context, work, place) for place in places]

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) as jobs finish, started in their order; the result is `Died` where a process ended.

        Raises: SpectraError where `work` cannot be sent, or a process cannot start.
        """
        waiting = list(enumerate(jobs))
        while waiting or any(worker.job is not None for worker in self._workers):
            for worker in self._workers:
                if worker.job is None and waiting:
                    worker.give(waiting.pop(0))
            busy = {worker.handle: worker for worker in self._workers if worker.job is not None}
            for handle in wait(list(busy)):
                yield busy[handle].take()  # type: ignore[index]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an exception (Ctrl-C), they get SIGTERM and `PATIENCE` seconds to save; a second one ends them."""
        if kind is not None:
            _stop([worker.process for worker in self._workers if worker.process is not None])
        for worker in self._workers:
            worker.dismiss()


@dataclass
class _Worker:
    """A process and the pipe to it. It is started with its first job, and again after it died."""

    context: SpawnContext
    work: Callable[[Any, str | None], Any]
    place: str | None
    process: SpawnProcess | None = None
    job: int | None = None
    is_ready: bool = field(default=False)
    _pipe: Connection | None = None

    @property
    def handle(self) -> Connection:
        assert self._pipe is not None
        return self._pipe

    def give(self, job: tuple[int, Any]) -> None:
        if self.process is None:
            self._start()
        self.job, value = job
        with suppress(BrokenPipeError):  # it died while it was idle, which `take` tells
            self.handle.send(value)

    def take(self) -> tuple[int, Any]:
        """The result of its job, or `Died`."""
        assert self.job is not None and self.process is not None
        job, self.job = self.job, None
        try:
            if not self.is_ready:
                self.handle.recv()  # its first word, that it started
                self.is_ready = True
            return job, self.handle.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join()
            code, self.process = self.process.exitcode, None
            if not self.is_ready:
                raise SpectraError(
                    f"a worker process of the sweep could not start (exit status {code}, its words are above); guard "
                    'the script with `if __name__ == "__main__":` and define task functions at the top of a module '
                    "that can be imported, or take workers=0, which runs everything in this process"
                ) from error
            return job, Died(code)

    def _start(self) -> None:
        self._pipe, theirs = self.context.Pipe()
        self.is_ready = False
        self.process = self.context.Process(target=_serve, args=(theirs, self.work, self.place))
        try:
            with one_thread():
                self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self.process = None
            raise SpectraError(
                f"the base or the task functions cannot be sent to a worker process ({error}); define functions at the "
                "top of a module, or take workers=0, which runs everything in this process"
            ) from error
        finally:
            theirs.close()

    def dismiss(self) -> None:
        """No more work: it leaves when it has read this."""
        if self.process is not None:
            with suppress(BrokenPipeError, OSError):
                self.handle.send(None)
            self.process.join(PATIENCE)
            if self.process.is_alive():
                self.process.kill()
            self.handle.close()
            self.process = None


def _stop(running: Sequence[SpawnProcess]) -> None:
    try:
        for process in running:
            process.terminate()
        for process in running:
            process.join(PATIENCE)
    finally:
        for process in running:
            process.kill()


@contextmanager
def one_thread() -> Iterator[None]:
    """Have a process that is started now load its BLAS with one thread: two are slower where cores are shared."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, work: Callable[[Any, str | None], Any], place: str | None) -> None:
    """A worker's life: jobs in, results out, until the word to leave or the parent's end."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in the terminal is the parent's to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    pipe.send("ready")
    with suppress(EOFError, KeyboardInterrupt):  # training answers SIGTERM by saving, then by this exception
        while (job := pipe.recv()) is not None:
            pipe.send(work(job, place))


def _leave_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
