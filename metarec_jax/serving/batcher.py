"""Batcher: combine concurrent requests into batches."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Overloaded(Exception):
    """Too many requests are waiting; try again later."""


class Batcher:
    """Collects requests while the worker is busy, and up to `budget` seconds longer, into one call.

    Args:
      work: `work(requests) -> results`, one result per request, run in its own thread, one call at a time. A result
        that is an exception is raised by its `submit`.
      largest: maximum number of requests per call.
      budget: seconds that the first request of a call waits for others.
      waiting: maximum number of waiting requests; further ones raise `Overloaded`.
    """

    def __init__(
        self, work: Callable[[Sequence[Any]], Sequence[Any]], *, largest: int, budget: float, waiting: int
    ) -> None:
        self.work, self.largest, self.budget, self.waiting = work, largest, budget, waiting
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Number of waiting requests."""
        return self._queue.qsize()

    async def submit(self, request: Any) -> Any:
        """Return the result of one request.

        Raises:
          Overloaded: too many requests are waiting; this one was not processed.
        """
        if self._queue.qsize() >= self.waiting:
            raise Overloaded
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, future))
        return await future

    async def close(self) -> None:
        """Process the waiting requests, then stop."""
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
            except Exception as error:  # each request of the batch gets the error
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                self._queue.task_done()
                if future.cancelled():
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
