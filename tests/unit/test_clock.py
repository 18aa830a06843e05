"""Virtual time passes only while nothing else can happen, and everything happens in order."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from simulations.clock import START_NS, Stuck, TaskOwner, VirtualLoop
from tests.elsewhere import tasks_elsewhere

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_a_sleep_of_a_day_takes_a_day_of_no_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        assert (loop.time(), loop.now_ns()) == (0, START_NS)
        await asyncio.sleep(86_400)
        assert loop.time() == pytest.approx(86_400)
        assert loop.now_ns() - START_NS == pytest.approx(86_400e9)

    run(main())


def test_sleepers_wake_in_the_order_of_their_times() -> None:
    woken: list[float] = []

    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        assert now_s() == pytest.approx(seconds)
        woken.append(seconds)

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for seconds in (3.0, 1.0, 2.0, 1.5):
                tasks.create_task(sleeper(seconds))

    run(main())
    assert woken == [1.0, 1.5, 2.0, 3.0]


def test_a_deadline_ends_a_wait_when_it_is_due() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(10)
        assert now_s() == pytest.approx(5)

    run(main())


def test_waiting_for_what_cannot_come_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="for ever"):
        run(main())


def test_never_waiting_is_an_error() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110 (it is to be noticed)
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match="rounds"):
        run(main())


def test_there_are_no_threads() -> None:
    async def main() -> None:
        with pytest.raises(NotImplementedError):
            await asyncio.to_thread(int)

    run(main())


def test_a_killed_process_leaves_no_task() -> None:
    """Not those that its tasks have started, and not those that sit in a `finally`."""
    ended: list[str] = []

    async def stubborn(name: str) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(100)
            ended.append(name)

    async def process() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stubborn("inner"))
            await stubborn("outer")

    async def main() -> None:
        owner = TaskOwner("p")
        bystander = asyncio.create_task(stubborn("bystander"))
        owner.spawn(process())
        await asyncio.sleep(1)
        assert len(owner) == 2
        await owner.kill()
        assert len(owner) == 0
        assert now_s() == pytest.approx(1)
        assert not bystander.done()
        await asyncio.wait([bystander])

    run(main())
    assert ended == ["bystander"]


def test_a_task_group_cancels_in_the_same_order_in_every_run() -> None:
    """It keeps its tasks in a set, which follows memory addresses elsewhere."""

    async def main() -> list[str]:
        cancelled: list[str] = []

        async def member(name: str) -> None:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                cancelled.append(name)
                raise

        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as tasks:
                for number in range(40):
                    tasks.create_task(member(f"member {number}"))
                await asyncio.sleep(1)
                raise ValueError
        return cancelled

    first = run(main())
    assert sorted(first) == sorted(f"member {number}" for number in range(40))
    with tasks_elsewhere():
        assert run(main()) == first


def test_a_task_without_a_name_is_named_after_its_number_in_the_loop() -> None:
    """Such names stand in the words of a failure, and asyncio's count all tasks of the process."""

    async def main() -> list[str]:
        owner = TaskOwner("p")

        async def process() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(asyncio.sleep(1))
                tasks.create_task(asyncio.sleep(1), name="named")

        owner.spawn(process())
        await asyncio.sleep(0.5)
        names = owner.names()
        await owner.kill()
        return names

    first = run(main())
    assert first == ["p", "task 3", "named"]
    with tasks_elsewhere():
        assert run(main()) == first
