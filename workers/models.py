"""Model files in the JetStream object store, `reckon_<namespace>_models`, named by their SHA-256.

A worker puts its tokenizer and templates there once for all workers of the model, and the card says
which objects they are. A name is a promise of the content: what is there already is not put again,
and what is read is checked against its name.
"""

import asyncio
import base64
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import nats.errors
import nats.js.errors
from nats.js import api
from nats.js.object_store import ObjectStore

from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.replicas import answered, hold_replicas, replicas_of_new
from eventstore.subjects import check_namespace
from workers.errors import BadModelFile

NEEDED = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("config.json", "generation_config.json", "chat_template.jinja")
FILE_BYTES_MAX = 128 * 1024 * 1024
"""The largest tokenizers in use have some 40 MiB."""
READ_ATTEMPTS = 5
READ_PAUSE_S = 0.1
_CONFIG_DIFFERS = 10058


def read_model(path: Path) -> dict[str, bytes]:
    """The model's files in directory `path`, by name. Blocks. Raises BadModelFile."""
    files: dict[str, bytes] = {}
    for name in (*NEEDED, *OPTIONAL):
        file = path / name
        try:
            if file.stat().st_size > FILE_BYTES_MAX:
                raise BadModelFile(str(file), f"is over {FILE_BYTES_MAX} bytes")
            files[name] = file.read_bytes()
        except FileNotFoundError:
            if name in NEEDED:
                raise BadModelFile(str(file), "is missing") from None
        except OSError as error:
            raise BadModelFile(str(file), error.strerror or str(error)) from error
    return files


class ModelStore:
    """The object store of one namespace's models. Does not own the connection."""

    def __init__(self, connection: Nats, namespace: str, *, replicas: int | None = None) -> None:
        """replicas: see `eventstore.replicas`."""
        self._nats = connection
        self._replicas = replicas
        self._js = connection.jetstream
        self._bucket = f"reckon_{check_namespace(namespace)}_models"

    async def upload(self, files: Mapping[str, bytes]) -> dict[str, str]:
        """Make sure that the store has `files`; returns their SHA-256 (hex) by name.

        Several workers may do so at once. Raises LogUnavailable.
        """
        began_at = time.monotonic()
        try:
            store = await self._open()
            names = {}
            for name, content in files.items():
                names[name] = await _put(store, content)
            return names
        except (nats.errors.Error, OSError, TimeoutError) as error:
            what = f"cannot store model files in {self._bucket}"
            denied = self._nats.denied(what, began_at)
            raise denied or LogUnavailable(f"{what}: {error}") from error

    async def _open(self) -> ObjectStore:
        """Make the store if it is not there. Raises what a request can end in."""
        replicas = replicas_of_new(self._nats, self._replicas)
        config = api.ObjectStoreConfig(replicas=replicas)
        try:
            store = await answered(lambda: self._js.create_object_store(self._bucket, config))
        except nats.js.errors.APIError as error:
            if error.err_code != _CONFIG_DIFFERS:
                raise
            store = await self._js.object_store(self._bucket)
        await hold_replicas(self._nats, f"OBJ_{self._bucket}", self._replicas)
        return store

    async def download(self, files: Mapping[str, str]) -> dict[str, bytes]:
        """The contents of `files` (name → SHA-256, hex), by name.

        Raises BadModelFile if one is not there, too large or not what its name says, and
        LogUnavailable.
        """
        return {name: await self._get(name, sha256) for name, sha256 in files.items()}

    async def _get(self, name: str, sha256: str) -> bytes:
        why = ""
        for attempt in range(READ_ATTEMPTS):
            if attempt:  # another worker may just have put the same object again
                await asyncio.sleep(READ_PAUSE_S)
            try:
                content = await self._read(name, sha256)
            except nats.js.errors.NotFoundError:
                why = f"is not in {self._bucket}"
                continue
            except (nats.errors.Error, OSError, TimeoutError) as error:
                raise LogUnavailable(f"cannot read {name} of {self._bucket}: {error}") from error
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            why = f"is not what its SHA-256 says in {self._bucket}"
        raise BadModelFile(name, why)

    async def _read(self, name: str, sha256: str) -> bytes:
        """The library's own `get` copies all that came before for every chunk; this copies once."""
        store = await self._js.object_store(self._bucket)
        info = await store.get_info(sha256)
        if (info.size or 0) > FILE_BYTES_MAX:
            raise BadModelFile(name, f"is over {FILE_BYTES_MAX} bytes")
        chunks: list[bytes] = []
        seq = 0
        for _ in range(info.chunks or 0):
            message = await self._js.get_msg(
                f"OBJ_{self._bucket}",
                seq=seq + 1,
                subject=f"$O.{self._bucket}.C.{info.nuid}",
                direct=True,
                next=True,
            )
            seq = int(message.seq or 0)
            chunks.append(message.data or b"")
        return b"".join(chunks)


async def _put(store: ObjectStore, content: bytes) -> str:
    digest = hashlib.sha256(content)
    name = digest.hexdigest()
    stored = "SHA-256=" + base64.urlsafe_b64encode(digest.digest()).decode()
    try:
        info = await answered(lambda: store.get_info(name))
        present = info.digest == stored
    except nats.js.errors.NotFoundError:
        present = False
    if not present:
        await store.put(name, content)
    return name
