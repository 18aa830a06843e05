"""Ending a task means that it has ended."""

import asyncio

import pytest

from eventstore import tasks


async def test_a_task_that_loses_a_cancellation_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "ASK_AGAIN_S", 0.01)
    lost = 0

    async def work() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost == 3:
                    raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await tasks.end(task)
    assert task.cancelled() and lost == 3
    await tasks.end(task)


async def test_what_a_task_raises_is_its_own() -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await tasks.end(task)
    assert isinstance(task.exception(), ValueError)


async def test_all_are_seen_ended_by_somebody_who_is_cancelled_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the one that loses the first cancellation, which a TaskGroup would wait for for ever."""
    monkeypatch.setattr(tasks, "ASK_AGAIN_S", 0.01)
    lost = asyncio.Event()

    async def loses_one() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            lost.set()
        await asyncio.sleep(60)

    started = [asyncio.create_task(loses_one()), asyncio.create_task(asyncio.sleep(60))]

    async def owner() -> None:
        try:
            await asyncio.wait(started)
        finally:
            await tasks.end_all(started)

    owning = asyncio.create_task(owner())
    await asyncio.sleep(0)
    owning.cancel()
    await lost.wait()
    owning.cancel()
    await asyncio.wait([owning])
    assert owning.cancelled()
    assert all(task.cancelled() for task in started)
