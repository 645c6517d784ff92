"""Batcher: requests that come one by one, worked off together."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Overloaded(Exception):
    """More is waiting than can be worked off in time; try again later."""


class Batcher:
    """Gathers what is submitted while the worker is busy, and `budget` seconds longer, into one call.

    Args:
      work: `work(requests) -> results`, one a request; a result that is an exception is raised by its `submit`. Runs in
        a thread of its own, one call at a time.
      largest: requests a call.
      budget: seconds that the first request of a call waits for company.
      waiting: requests that may wait; more are refused with `Overloaded`.
    """

    def __init__(
        self, work: Callable[[Sequence[Any]], Sequence[Any]], *, largest: int, budget: float, waiting: int
    ) -> None:
        self.work, self.largest, self.budget, self.waiting = work, largest, budget, waiting
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many wait."""
        return self._queue.qsize()

    async def submit(self, request: Any) -> Any:
        """The result of one request.

        Raises:
          Overloaded: too many are waiting; nothing was done with this one.
        """
        if self._queue.qsize() >= self.waiting:
            raise Overloaded
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, future))
        return await future

    async def close(self) -> None:
        """Works off what waits, then stops."""
        await self._queue.join()
        if self._task is not None:
            self._task.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.budget):
                    while len(batch) < self.largest:
                        batch.append(await self._queue.get())
            try:
                results = await loop.run_in_executor(self._thread, self.work, [request for request, _ in batch])
            except Exception as error:  # whatever it is, each waiting request is told
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                self._queue.task_done()
                if future.cancelled():
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
