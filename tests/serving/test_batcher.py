"""Requests that come one by one are worked off together; none is lost and none waits for ever."""

import asyncio
import time

import pytest

from metarec_jax.serving.batcher import Batcher, Overloaded


def make(work, **options):
    return Batcher(work, **{"largest": 8, "budget": 0.01, "waiting": 100} | options)


def test_requests_that_come_together_are_one_call_and_get_their_own_answers():
    calls = []

    def work(requests):
        calls.append(len(requests))
        return [r * r for r in requests]

    async def main():
        batcher = make(work)
        found = await asyncio.gather(*(batcher.submit(i) for i in range(20)))
        await batcher.close()
        return found

    assert asyncio.run(main()) == [i * i for i in range(20)]
    assert sum(calls) == 20
    assert max(calls) == 8
    assert len(calls) <= 4


def test_one_request_waits_no_longer_than_the_budget():
    async def main():
        batcher = make(lambda requests: requests, budget=0.05)
        begun = time.perf_counter()
        await batcher.submit(1)
        await batcher.close()
        return time.perf_counter() - begun

    assert 0.03 < asyncio.run(main()) < 1.0


def test_an_exception_of_one_is_its_own_and_one_of_the_call_is_everyones():
    def work(requests):
        if "all" in requests:
            raise ZeroDivisionError("all")
        return [ValueError(r) if r == "bad" else r for r in requests]

    async def main():
        batcher = make(work)
        one = await asyncio.gather(*map(batcher.submit, ("good", "bad")), return_exceptions=True)
        both = await asyncio.gather(*map(batcher.submit, ("good", "all")), return_exceptions=True)
        after = await batcher.submit("good")
        await batcher.close()
        return one, both, after

    one, both, after = asyncio.run(main())
    assert one[0] == after == "good"
    assert isinstance(one[1], ValueError)
    assert [type(e) for e in both] == [ZeroDivisionError] * 2


def test_overload_is_refused_at_once_and_what_was_accepted_is_done():
    done = []

    def work(requests):
        time.sleep(0.02)
        done.extend(requests)
        return requests

    async def main():
        batcher = make(work, largest=2, budget=0.0, waiting=5)
        found = await asyncio.gather(*(batcher.submit(i) for i in range(30)), return_exceptions=True)
        await batcher.close()
        return found

    found = asyncio.run(main())
    accepted = [r for r in found if not isinstance(r, Exception)]
    assert sorted(done) == sorted(accepted)
    assert 5 <= len(accepted) < 30
    assert all(isinstance(r, Overloaded) for r in found if isinstance(r, Exception))


def test_closing_works_off_what_waits():
    async def main():
        batcher = make(lambda requests: requests, largest=1, budget=0.0)
        waiting = [asyncio.ensure_future(batcher.submit(i)) for i in range(5)]
        await asyncio.sleep(0)
        await batcher.close()
        return await asyncio.wait_for(asyncio.gather(*waiting), 1)

    assert asyncio.run(main()) == list(range(5))


def test_closing_waits_for_the_call_that_runs():
    def slow(requests):
        time.sleep(0.2)
        return requests

    async def main():
        batcher = make(slow, budget=0.0)
        waiting = asyncio.ensure_future(batcher.submit(7))
        await asyncio.sleep(0.05)
        await batcher.close()
        return await asyncio.wait_for(waiting, 1)

    assert asyncio.run(main()) == 7


def test_a_caller_that_left_harms_nobody():
    async def main():
        batcher = make(lambda requests: requests)
        left = asyncio.ensure_future(batcher.submit(1))
        stays = asyncio.ensure_future(batcher.submit(2))
        await asyncio.sleep(0)
        left.cancel()
        found = await stays
        await batcher.close()
        return found

    assert asyncio.run(main()) == 2
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


async def cancelled():
    batcher = make(lambda requests: requests)
    waiting = asyncio.ensure_future(batcher.submit(1))
    await asyncio.sleep(0)
    waiting.cancel()
    try:
        await waiting
    finally:
        await batcher.close()
