"""What a frontend says of a model before it can serve it."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

import workers
from eventstore.tasks import end
from frontend.errors import ModelNotFound, NotReady
from frontend.served import ServedModels
from frontend.tokenizer import read_files
from tests.waiting import eventually
from workers.card import Instance, ModelCard


async def no_files(wanted: Mapping[str, str]) -> Mapping[str, bytes]:
    raise AssertionError("nothing is loaded here")


def test_a_model_whose_files_are_not_loaded_yet_is_not_unknown() -> None:
    """A client that is told 404 does not come again."""
    served = ServedModels(no_files, lambda: 0.0, lambda _: None, lambda _: None)
    card = ModelCard(name="listed", block_size=16, context_length=64, files={})
    served.put(
        Instance(
            worker_id=1,
            namespace="ns",
            component="backend",
            endpoint="generate",
            address="127.0.0.1:1",
            card=card,
        )
    )
    with pytest.raises(NotReady):
        served.get("listed")
    with pytest.raises(ModelNotFound):
        served.get("another")
    served.remove(1)
    with pytest.raises(ModelNotFound):
        served.get("listed")


def instance(worker_id: int, block_size: int) -> Instance:
    return Instance(
        worker_id=worker_id,
        namespace="ns",
        component="backend",
        endpoint="generate",
        address="127.0.0.1:1",
        card=ModelCard(name="m", block_size=block_size, context_length=64, files={}),
    )


async def test_who_is_refused_for_another_serves_when_that_one_has_left() -> None:
    async def shipped(wanted: Mapping[str, str]) -> Mapping[str, bytes]:
        return read_files(Path(workers.__file__).parent / "model")

    told: list[tuple[int, str]] = []
    served = ServedModels(
        shipped,
        lambda: 0.0,
        lambda _: None,
        lambda _: None,
        tell=lambda worker_id, why: told.append((worker_id, why)),
    )

    def serving() -> list[int]:
        return [each.worker_id for each in served.instances()]

    running = asyncio.create_task(served.run())
    try:
        served.put(instance(1, 16))
        served.connected(1)
        await eventually(lambda: serving() == [1])
        served.put(instance(2, 32))
        why = "its block_size is 32, m is served with 16"
        await eventually(lambda: served.refused() == {2: why})
        assert told == [], "it is not connected yet"
        served.connected(2)
        assert told == [(2, why)]
        served.remove(1)
        await eventually(lambda: serving() == [2])
        assert served.get("m").card.block_size == 32 and served.refused() == {}
        # The last leaves while another one has not been looked at yet.
        served.put(instance(3, 16))
        served.remove(2)
        served.connected(3)
        await eventually(lambda: serving() == [3])
    finally:
        await end(running)
