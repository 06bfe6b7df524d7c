import asyncio
import random

import pytest

from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import OverloadedError


async def hold(admission: Admission, *, count: int = 1, until: asyncio.Event) -> None:
    async with admission.enter(count):
        await until.wait()


async def fail_inside(admission: Admission) -> None:
    async with admission.enter(2):
        assert admission.in_flight == 2
        raise ZeroDivisionError


async def test_places_are_given_back_whatever_happens() -> None:
    admission = Admission("songs", limit=2)
    with pytest.raises(ZeroDivisionError):
        await fail_inside(admission)
    assert admission.in_flight == 0


async def test_one_too_many_is_told_the_figures_and_when_to_come_back() -> None:
    admission = Admission("songs", limit=3, retry_after_s=2.5)
    async with admission.enter(2):
        with pytest.raises(
            OverloadedError, match="2 of 3 songs are in flight and 0 wait, no room for 2 more"
        ) as caught:
            async with admission.enter(2):
                pass
        assert caught.value.retry_after_s == 2.5
        assert caught.value.metadata == {"limit": "3", "in_flight": "2", "waiting": "0"}
        async with admission.enter():
            assert admission.in_flight == 3


async def test_those_who_wait_are_served_in_order() -> None:
    admission = Admission("songs", limit=1, max_waiting=3)
    served: list[int] = []

    async def song(number: int) -> None:
        async with admission.enter():
            served.append(number)
            await asyncio.sleep(0)

    async with admission.enter():
        waiting = [asyncio.create_task(song(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert admission.waiting == 3
        with pytest.raises(OverloadedError, match="3 wait"):
            async with admission.enter():
                pass
    await asyncio.gather(*waiting)
    assert served == [0, 1, 2]
    assert (admission.in_flight, admission.waiting) == (0, 0)


async def test_a_small_call_does_not_overtake_a_big_one() -> None:
    admission = Admission("songs", limit=2, max_waiting=2)
    done = asyncio.Event()
    order: list[str] = []

    async def song(name: str, count: int) -> None:
        async with admission.enter(count):
            order.append(name)

    first = asyncio.create_task(hold(admission, until=done))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(song("big", 2)), asyncio.create_task(song("small", 1))]
    await asyncio.sleep(0)
    assert admission.waiting == 2
    done.set()
    await asyncio.gather(first, *waiting)
    assert order == ["big", "small"]


async def test_who_gives_up_waiting_leaves_the_queue_and_lets_the_next_in() -> None:
    admission = Admission("songs", limit=2, max_waiting=2)
    done = asyncio.Event()
    first = asyncio.create_task(hold(admission, until=done))
    await asyncio.sleep(0)
    big = asyncio.create_task(hold(admission, count=2, until=done))
    small = asyncio.create_task(hold(admission, until=done))
    await asyncio.sleep(0)
    big.cancel()
    await asyncio.gather(big, return_exceptions=True)
    await asyncio.sleep(0)
    assert (admission.in_flight, admission.waiting) == (2, 0)
    done.set()
    await asyncio.gather(first, small)
    assert admission.in_flight == 0


async def test_a_place_that_comes_together_with_the_cancellation_is_not_lost() -> None:
    admission = Admission("songs", limit=1, max_waiting=1)
    done = asyncio.Event()
    first = asyncio.create_task(hold(admission, until=done))
    await asyncio.sleep(0)
    second = asyncio.create_task(hold(admission, until=done))
    await asyncio.sleep(0)
    done.set()
    await first  # hands its place over; the second has not run yet
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert (admission.in_flight, admission.waiting) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
async def test_no_place_is_lost_when_holders_and_waiters_are_cancelled_together(seed: int) -> None:
    chance = random.Random(seed)
    admission = Admission("songs", limit=2, max_waiting=10)
    tasks = [
        asyncio.create_task(hold(admission, count=chance.choice([1, 1, 2]), until=asyncio.Event())) for _ in range(8)
    ]
    while tasks:
        await asyncio.sleep(0)
        together = [tasks.pop(chance.randrange(len(tasks))) for _ in range(chance.randint(1, len(tasks)))]
        for task in together:
            task.cancel()
        results = await asyncio.gather(*together, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert (admission.in_flight, admission.waiting) == (0, 0)
