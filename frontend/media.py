"""Images, sounds and videos in messages: what of them goes to a worker.

The frontend fetches nothing. A worker gets the URLs, `data:` ones among them, in the order of the
messages, as `{"image_url": [{"Url": …}, …], "audio_url": …, "video_url": …}`. What is too large for
it is refused where it is sent, as every request is that a frame does not hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frontend.errors import BadRequest
from frontend.openai_types import MEDIA_PARTS, Part

SCHEMES = ("http://", "https://", "data:")


def check_part(part: Part, place: str) -> None:
    """A part whose type is one of MEDIA_PARTS. Raises BadRequest."""
    given = getattr(part, part.type)
    param = f"{place}.{part.type}"
    if given is None:
        raise BadRequest(f"{param} is required", param, "missing_field")
    if part.type != "input_audio" and not given.url.startswith(SCHEMES):
        raise BadRequest(f"{param}.url: expected an http, https or data URL", f"{param}.url")


def media_for(
    messages: Sequence[Mapping[str, Any]], modalities: Sequence[str], model: str
) -> dict[str, list[dict[str, str]]] | None:
    """What the workers of `model`, which takes `modalities`, get; None: there is nothing.

    messages: checked ones. Raises BadRequest where one has what the model does not take.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for place, part in _parts(messages):
        kind = part["type"]
        modality = MEDIA_PARTS[kind]
        if modality not in modalities:
            raise BadRequest(f"{place}: {model} takes no {modality}", place)
        found.setdefault(f"{modality}_url", []).append({"Url": _url(part)})
    return found or None


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            for number, part in enumerate(content):
                if part["type"] in MEDIA_PARTS:
                    yield f"messages[{index}].content[{number}]", part


def _url(part: Mapping[str, Any]) -> str:
    given: Mapping[str, str] = part[part["type"]]
    if part["type"] == "input_audio":
        return f"data:audio/{given['format']};base64,{given['data']}"
    return given["url"]
