"""Run many jobs over a few processes, any of which may be killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from kit.machine import keep_freed_memory

# Why a job has no result. Processes import the script that starts them, which without a guard starts them again.
DIED_TWICE = ("its process died twice, most likely for lack of memory (use fewer workers), or because the script that "
              'started it does so outside `if __name__ == "__main__":`')


def run_all(function: Callable[[Any], Any], jobs: list[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield each job with its result as it finishes; the result is None if its process dies even when it runs alone.

    A killed process breaks its whole pool. The jobs in flight are then retried one by one to find the one at
    fault; the remaining jobs run in parallel again.

    Raises:
        Exception: whatever `function` raises, once the jobs in flight have ended; their results are lost.
    """
    if workers == 0:
        yield from ((job, function(job)) for job in jobs)
        return
    waiting: deque[Any] = deque(jobs)
    suspects: deque[Any] = deque()
    while waiting or suspects:
        queue, together = (suspects, 1) if suspects else (waiting, workers)
        flying: dict = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(together, mp_context=context, initializer=_begin) as pool:
            try:
                while queue or flying:
                    # Few in flight: the rest of a large cohort waits here, not in the pool.
                    while queue and len(flying) < (1 if queue is suspects else together + 1):
                        flying[pool.submit(function, queue[0])] = queue[0]
                        queue.popleft()
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield flying.pop(future), result
            except BrokenProcessPool:
                if queue is suspects:
                    yield from ((job, None) for job in flying.values())
                else:
                    suspects.extend(flying.values())


def _begin() -> None:
    """Set up a process, which ends when its parent is killed; otherwise it would wait for jobs forever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this process is one of a pool
        parent.join()
        os._exit(1)

    keep_freed_memory()
    threading.Thread(target=watch, daemon=True).start()
