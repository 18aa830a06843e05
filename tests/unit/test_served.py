"""What a frontend says of a model before it can serve it."""

from collections.abc import Mapping

import pytest

from frontend.errors import ModelNotFound, NotReady
from frontend.served import ServedModels
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
