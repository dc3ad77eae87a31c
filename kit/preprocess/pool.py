"""Many tasks over a few processes, one of which may be killed."""

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
    """Yield each task with its result, in the order they end; with None if it kills its process, twice.

    A killed process breaks its whole pool. Tasks in flight are then tried again one by one, so that the one at
    fault is known, and the others go on together.
    """
    if workers == 0:
        yield from ((task, function(task)) for task in tasks)
        return
    waiting, suspects = deque(tasks), deque()
    while waiting or suspects:
        queue, together = (suspects, 1) if suspects else (waiting, workers)
        flying: dict = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(together, mp_context=context, initializer=_leave_with_parent) as pool:
            try:
                while queue or flying:
                    # A few in flight are enough: the rest of a large cohort waits here, not in the pool.
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
    """End this process when its parent is killed: it would wait for tasks for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
