"""Run many tasks over a few processes, any of which may be killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def run_all(function: Callable[[Any], Any], tasks: list[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield each task with its result as it finishes; the result is None if the task kills its process twice.

    A killed process breaks its whole pool. The tasks in flight are then retried one by one to find the one at
    fault; the remaining tasks run in parallel again.
    """
    if workers == 0:
        yield from ((task, function(task)) for task in tasks)
        return
    waiting: deque[Any] = deque(tasks)
    suspects: deque[Any] = deque()
    while waiting or suspects:
        queue, together = (suspects, 1) if suspects else (waiting, workers)
        flying: dict = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(together, mp_context=context, initializer=_leave_with_parent) as pool:
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
                    yield from ((task, None) for task in flying.values())
                else:
                    suspects.extend(flying.values())


def _leave_with_parent() -> None:
    """End this process when its parent is killed; otherwise it would wait for tasks forever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this process is one of a pool
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
