"""One HTTP request over one or more generations: as a stream of events, or as one body."""

import asyncio
from collections.abc import Sequence

from aiohttp import web

from frontend.choices import ChoiceFrames, Form, WholeChoice
from frontend.chunks import (
    DONE,
    ChatChunks,
    Choice,
    Chunks,
    CompletionChunks,
    NvExtAnswer,
    WorkerId,
    chat_body,
    completion_body,
    error_frames,
    query_body,
    query_frames,
)
from frontend.errors import ClientTooSlow
from frontend.generation import Generation
from frontend.legs import Job
from frontend.service import Service
from frontend.sse import HEADERS, EventStream
from frontend.usage import Usage


def _usage(
    form: Form,
    generations: Sequence[Generation],
    shaped: Sequence[WholeChoice] | Sequence[ChoiceFrames],
) -> Usage:
    """Each prompt counts once, and is cached as far as its first choice found it."""
    of_prompts = generations[:: form.n]
    reported = [g.cached_tokens for g in of_prompts if g.cached_tokens is not None]
    return Usage(
        sum(g.isl for g in of_prompts),
        sum(g.osl for g in generations),
        sum(reported) if reported else None,
        sum(one.reasoning_tokens for one in shaped) if form.finds_reasoning else None,
    )


def _extra(form: Form, generations: Sequence[Generation]) -> NvExtAnswer | None:
    """What `nvext.extra_fields` asked for. Worker and timing are those of the first prompt."""
    if not form.extra_fields:
        return None
    first, asked = generations[0], form.extra_fields
    worker = None
    if "worker_id" in asked and first.worker is not None and first.prefill_worker is not None:
        worker = WorkerId(*first.worker, *first.prefill_worker)
    return NvExtAnswer(
        worker_id=worker,
        predicted_cached_tokens=(
            sum(g.predicted_tokens for g in generations[:: form.n])
            if "predicted_cached_tokens" in asked
            else None
        ),
        timing=first.timing if "timing" in asked else None,
    )


def answer_query(form: Form, job: Job, worker: WorkerId) -> web.Response:
    """Where the request would go, as a stream if the client asked for one. Nothing was sent."""
    make = query_frames if job.streaming else query_body
    return web.Response(
        body=make(form.id, form.created_s, form.model, form.chat, worker, job.token_ids),
        headers=HEADERS if job.streaming else {"Content-Type": "application/json"},
    )


def _release(service: Service, request: web.Request, generations: Sequence[Generation]) -> None:
    """Whatever happened: nothing goes on behind a client that is not served any more."""
    gone = request.transport is None or request.transport.is_closing()
    cancelled = False
    for generation in generations:
        if generation.is_running:
            generation.cancel("client disconnected" if gone else "request ended early")
            cancelled = True
        if generation.done.done() and not generation.done.cancelled():
            generation.done.exception()  # seen: it has been answered, or has no reader left
    if cancelled and gone:
        service.metrics.client_disconnected()


async def answer_whole(
    request: web.Request, service: Service, jobs: Sequence[Job], form: Form
) -> web.Response:
    """One JSON body when all is generated. Raises what any of the generations failed with."""
    texts: list[list[str]] = [[] for _ in jobs]

    def deliver(generation: Generation, text: str, finish_reason: str | None) -> None:
        texts[generation.index].append(text)

    def deliver_parts(generation: Generation, text: str, finish_reason: str | None) -> None:
        shaped[generation.index].add(text, generation.osl, finish_reason is not None)

    shaped: list[WholeChoice] = []
    if not form.is_plain:
        shaped = [WholeChoice(form, job, index) for index, job in enumerate(jobs)]
    chosen = deliver_parts if shaped else deliver
    generations = [Generation(service, job, index, chosen) for index, job in enumerate(jobs)]
    try:
        for generation in generations:
            generation.start()
        failure = await _failure(generations)
        if failure is not None:
            raise failure
    finally:
        _release(service, request, generations)
    choices = [
        shaped[index].finished(generation.take_sampled(), generation.finish_reason or "stop")
        if shaped
        else Choice("".join(texts[index]), generation.finish_reason or "stop")
        for index, generation in enumerate(generations)
    ]
    make_body = chat_body if form.chat else completion_body
    tail = _usage(form, generations, shaped), _extra(form, generations)
    body = make_body(form.id, form.created_s, form.model, choices, *tail)
    return web.Response(body=body, content_type="application/json")


async def answer_stream(
    request: web.Request, service: Service, jobs: Sequence[Job], form: Form
) -> tuple[web.StreamResponse, Exception | None]:
    """Server-sent events as text arrives; returns the ended response, and the error it ended with.

    The response begins with the first text, so that what fails before it is raised, and answered
    with a status of its own.
    """
    chunks: Chunks = (ChatChunks if form.chat else CompletionChunks)(
        form.id, form.created_s, form.model, len(jobs)
    )

    def overrun(error: ClientTooSlow) -> None:
        for generation in generations:
            generation.fail(error)

    stream = EventStream(request, service.limits, overrun)
    begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def usage_so_far() -> Usage | None:
        return _usage(form, generations, shaped) if form.continuous_usage else None

    def deliver(generation: Generation, text: str, finish_reason: str | None) -> None:
        usage = _usage(form, generations, shaped) if form.continuous_usage else None
        stream.send(chunks.text(text, generation.index, finish_reason, usage))
        if not begun.done():
            begun.set_result(None)

    def deliver_parts(generation: Generation, text: str, finish_reason: str | None) -> None:
        sampled, osl = generation.take_sampled(), generation.osl
        frames = shaped[generation.index].frames(text, osl, sampled, finish_reason, usage_so_far)
        if frames:
            stream.send(frames)
            if not begun.done():
                begun.set_result(None)

    shaped: list[ChoiceFrames] = []
    if not form.is_plain:
        shaped = [ChoiceFrames(form, job, index, chunks) for index, job in enumerate(jobs)]
    chosen = deliver_parts if shaped else deliver
    generations = [Generation(service, job, index, chosen) for index, job in enumerate(jobs)]
    failure: Exception | None = None
    try:
        for generation in generations:
            generation.start()
        await asyncio.wait([begun, *_ends(generations)], return_when=asyncio.FIRST_COMPLETED)
        if not begun.done():
            failure = await _failure(generations)
            assert failure is not None, "an end without text or finish reason"
            raise failure
        await stream.open()
        failure = await _failure(generations)
        if failure is not None:
            stream.send(error_frames(failure))
        else:
            usage = _usage(form, generations, shaped) if form.include_usage else None
            extra = _extra(form, generations)
            last = chunks.last(usage, extra) if usage or extra else b""
            stream.send(last + DONE)
        await stream.close()
    finally:
        begun.cancel()
        stream.abandon()
        _release(service, request, generations)
    return stream.response, failure


def _ends(generations: Sequence[Generation]) -> list["asyncio.Future[None]"]:
    return [generation.done for generation in generations]


async def _failure(generations: Sequence[Generation]) -> Exception | None:
    """Wait until all have ended well, or one has not; returns what the first of those failed with.

    Unlike `gather` this leaves the generations alone when the waiting itself is cancelled.
    """
    done, _ = await asyncio.wait(_ends(generations), return_when=asyncio.FIRST_EXCEPTION)
    for end in done:
        error = end.exception()
        if isinstance(error, Exception):
            return error
    return None
