"""A frontend's word to a worker that it does not use."""

from tests.unit.test_tcp import WORKER, Worker, connected, serving
from tests.waiting import eventually
from workers.protocol import Refused


async def test_a_refusal_goes_out_and_is_not_answered() -> None:
    worker = Worker()
    async with serving(worker) as (_, address), connected(address) as client:
        client.refuse(3, "its block_size is 32")
        said = Refused(WORKER, 3, "its block_size is 32")
        await eventually(lambda: worker.refusals == [said])
        assert client.is_connected
    client.refuse(3, "its block_size is 32")  # nobody there: nothing happens
