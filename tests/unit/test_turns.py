"""Places for predictions: clients take turns, none is lost, and none is given twice."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from mope.serving_hooks.turns import Turns


def test_clients_take_turns() -> None:
    order: list[str] = []

    async def one(turns: Turns, name: str) -> None:
        assert await turns.take(name)
        order.append(name)
        await asyncio.sleep(0)
        turns.leave()

    async def run() -> None:
        turns = Turns(1, 100, 1000)
        assert turns.at_once()
        tasks = [asyncio.create_task(one(turns, name)) for name in ["a"] * 5 + ["b"] * 2 + ["c"]]
        await asyncio.sleep(0)
        assert turns.num_waiting == 8
        turns.leave()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert order == ["a", "b", "c", "a", "b", "a", "a", "a"]


def test_too_many_do_not_wait() -> None:
    async def run() -> None:
        turns = Turns(1, 2, 3)
        assert await turns.take("a")
        waiting = [asyncio.create_task(turns.take(name)) for name in ("a", "a", "b")]
        await asyncio.sleep(0)
        assert not await turns.take("a")  # two of its own wait
        assert not await turns.take("c")  # three in all
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert turns.num_waiting == 0

    asyncio.run(run())


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "take", "leave", "cancel", "wait"]), st.integers(0, 3), st.integers(0, 30)),
        max_size=60,
    )
)
def test_no_place_is_lost_or_given_twice(steps: list[tuple[str, int, int]]) -> None:
    async def run() -> None:
        places, held = 3, 0
        turns = Turns(places, 4, 8)
        tasks: list[asyncio.Task[bool]] = []

        def count() -> int:
            return sum(task.done() and not task.cancelled() and task.result() for task in tasks)

        left = 0
        for what, client, which in steps:
            if what == "take":
                tasks.append(asyncio.create_task(turns.take(str(client))))
            elif what == "leave" and count() > left:
                turns.leave()
                left += 1
            elif what == "cancel" and tasks:
                tasks[which % len(tasks)].cancel()
            elif what == "wait":
                await asyncio.sleep(0)
            held = count() - left
            assert 0 <= held <= places
        for _ in range(3):
            await asyncio.sleep(0)
        while count() > left:
            turns.leave()
            left += 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert turns.num_waiting == 0
        assert [turns.at_once() for _ in range(places + 1)] == [True] * places + [False]

    asyncio.run(run())
