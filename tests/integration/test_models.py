"""Model files through a real object store."""

import asyncio
import hashlib
import secrets
from pathlib import Path

import pytest

import workers
from eventstore.connect import Nats
from workers.errors import BadModelFile
from workers.models import ModelStore, read_model

SHIPPED = Path(workers.__file__).parent / "model"


async def test_what_is_uploaded_comes_back(nats: Nats, namespace: str) -> None:
    files = read_model(SHIPPED)
    store = ModelStore(nats, namespace)
    names = await store.upload(files)
    assert names == {name: hashlib.sha256(files[name]).hexdigest() for name in files}
    assert await store.download(names) == files


async def test_a_file_of_many_chunks_and_an_empty_one(nats: Nats, namespace: str) -> None:
    files = {"large": secrets.token_bytes(5_000_000), "empty": b""}
    store = ModelStore(nats, namespace)
    assert await store.download(await store.upload(files)) == files


async def test_it_is_stored_once(nats: Nats, namespace: str) -> None:
    store = ModelStore(nats, namespace)
    first = await store.upload({"tokenizer.json": b"x" * 300_000})
    stream = f"OBJ_reckon_{namespace}_models"
    before = (await nats.jetstream.stream_info(stream)).state.last_seq
    assert await store.upload({"tokenizer.json": b"x" * 300_000}) == first
    assert (await nats.jetstream.stream_info(stream)).state.last_seq == before


async def test_many_workers_may_upload_at_once(nats: Nats, namespace: str) -> None:
    files = read_model(SHIPPED)
    stores = [ModelStore(nats, namespace) for _ in range(8)]
    names = await asyncio.gather(*(store.upload(files) for store in stores))
    assert all(each == names[0] for each in names)
    assert await stores[0].download(names[0]) == files


async def test_a_damaged_object_is_noticed_and_mended(nats: Nats, namespace: str) -> None:
    store = ModelStore(nats, namespace)
    names = await store.upload({"tokenizer.json": b"right"})
    bucket = await nats.jetstream.object_store(f"reckon_{namespace}_models")
    await bucket.put(names["tokenizer.json"], b"wrong")
    with pytest.raises(BadModelFile, match="SHA-256"):
        await store.download(names)
    await store.upload({"tokenizer.json": b"right"})
    assert await store.download(names) == {"tokenizer.json": b"right"}


async def test_an_unknown_file_is_an_error(nats: Nats, namespace: str) -> None:
    store = ModelStore(nats, namespace)
    with pytest.raises(BadModelFile, match="is not in"):
        await store.download({"tokenizer.json": "0" * 64})
    await store.upload({})
    with pytest.raises(BadModelFile, match="is not in"):
        await store.download({"tokenizer.json": "0" * 64})
