"""POST /v1/chat/completions and /v1/completions: from a request's bytes to jobs for the workers."""

import asyncio
import uuid
from collections.abc import Callable

from aiohttp import web

from frontend.body import read_json_body
from frontend.choices import Form
from frontend.errors import (
    BadRequest,
    ContextLengthExceeded,
    NotReady,
    ShuttingDown,
    row_of,
)
from frontend.exchange import answer_query, answer_stream, answer_whole
from frontend.hints import RoutingHints, routing_hints
from frontend.legs import Job, missing_roles, where
from frontend.media import media_for
from frontend.message import MessageFormat, message_format
from frontend.metrics import UNKNOWN_MODEL
from frontend.openai import (
    ChatRequest,
    CompletionRequest,
    Prompt,
    decode_chat,
    decode_completion,
    for_choice,
    prompts,
    sampling_options,
    stop_conditions,
    template_variables,
)
from frontend.served import ServedModel
from frontend.service import FRONTEND, Frontend, Service, service_for
from frontend.tool_use import tool_use

THREAD_CHARS_MIN = 16 * 1024
"""Longer texts are tokenized in a thread (the tokenizer lets go of the interpreter lock), so that
one long prompt does not hold up everyone's tokens."""

WORKER_WAIT_S = 5.0
"""How long a request waits for a worker that is listed but does not count yet."""


async def chat_completions(request: web.Request) -> web.StreamResponse:
    return await _Endpoint("chat_completions", "chat", "chatcmpl-", decode_chat).serve(request)


async def completions(request: web.Request) -> web.StreamResponse:
    return await _Endpoint("completions", "completions", "cmpl-", decode_completion).serve(request)


class _Endpoint:
    """One of the two, for one request."""

    def __init__(
        self,
        name: str,
        model_type: str,
        id_prefix: str,
        decode: Callable[[bytes], ChatRequest | CompletionRequest],
    ) -> None:
        self._name = name
        self._model_type = model_type
        self._id_prefix = id_prefix
        self._decode = decode
        self._model = UNKNOWN_MODEL
        self._streaming = False

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer, and count the answer."""
        frontend = request.app[FRONTEND]
        started_s = frontend.clock()
        self._metrics = frontend.metrics
        error_type = "internal"
        try:
            response, failure = await self._answer(request, frontend, started_s)
            error_type = "" if failure is None else row_of(failure).label
            return response
        except asyncio.CancelledError:
            error_type = "cancelled"
            raise
        except Exception as error:
            error_type = row_of(error).label
            raise
        finally:
            self._metrics.of_model(self._model).ended(
                self._name,
                "stream" if self._streaming else "unary",
                error_type,
                frontend.clock() - started_s,
            )

    async def _answer(
        self, request: web.Request, frontend: Frontend, started_s: float
    ) -> tuple[web.StreamResponse, Exception | None]:
        if frontend.draining.is_set():
            raise ShuttingDown()
        body = await read_json_body(request, frontend.limits)
        asked = self._decode(body)
        services = await _until_loaded(frontend, asked.model, self._model_type)
        self._model, self._metrics = asked.model, services[0].metrics
        self._streaming = bool(asked.stream)
        hints = routing_hints(asked.nvext, request.headers)
        request_id = str(uuid.uuid4())
        service = service_for(services, asked.model, hints, request_id)
        served = service.models.get(asked.model)
        self._metrics = service.metrics
        await _until_ready(service, served.card.name)
        given = _prompts(service, served, asked)
        token_lists = await _tokenize(service, served, asked, given)
        message, media = None, None
        if isinstance(asked, ChatRequest):
            message = message_format(asked, served.card, str(given[0]), request_id)
            media = media_for(asked.messages, served.card.modalities, served.card.name)
        form = self._form(asked, served, service, hints, request_id, given, message)
        stop = stop_conditions(asked)
        if not stop.ignore_eos:
            stop.stop_token_ids_hidden += served.card.eos_token_ids
        demands_call = message is not None and message.demands_guided
        sampling = sampling_options(asked, demands_call=demands_call)
        jobs = [
            Job(
                request_id=request_id if index == 0 else f"{request_id}-{index}",
                endpoint=self._name,
                streaming=self._streaming,
                served=served,
                token_ids=token_ids,
                stop=stop,
                sampling=for_choice(sampling, index % form.n),
                include_stop=bool(asked.include_stop_str_in_output),
                # What parsers look for may be special tokens.
                skip_special_tokens=asked.skip_special_tokens is not False and message is None,
                hints=hints,
                media=media,
                started_s=started_s,
            )
            for index, token_ids in enumerate(ids for ids in token_lists for _ in range(form.n))
        ]
        if hints.query_only:
            if len(token_lists) > 1:
                raise BadRequest("query_instance_id asks about one prompt", "prompt")
            return answer_query(form, jobs[0], where(service, jobs[0])), None
        if self._streaming:
            return await answer_stream(request, service, jobs, form)
        return await answer_whole(request, service, jobs, form), None

    def _form(
        self,
        asked: ChatRequest | CompletionRequest,
        served: ServedModel,
        service: Service,
        hints: RoutingHints,
        request_id: str,
        given: list[Prompt],
        message: MessageFormat | None,
    ) -> Form:
        options = asked.stream_options
        echoes: tuple[str, ...] = ()
        if isinstance(asked, CompletionRequest) and asked.echo:
            echoes = tuple(_text(served, prompt) for prompt in given)
        return Form(
            id=self._id_prefix + request_id,
            created_s=int(service.now_s()),
            model=served.card.name,
            chat=isinstance(asked, ChatRequest),
            n=asked.n or 1,
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            extra_fields=hints.extra_fields,
            message=message,
            logprobs=asked.logprobs is not None and asked.logprobs is not False,
            echoes=echoes,
        )


async def _until_loaded(frontend: Frontend, model: str, model_type: str) -> list[Service]:
    """Give a model that workers are listed for the moment that loading its files takes.

    So it is just after a start, and while all its workers register anew. Raises ModelNotFound, and
    NotReady after WORKER_WAIT_S.
    """
    deadline_s = frontend.clock() + WORKER_WAIT_S
    while True:
        try:
            return frontend.serving(model, model_type)
        except NotReady:
            if frontend.clock() >= deadline_s:
                raise
        await asyncio.sleep(0.02)


async def _until_ready(service: Service, model: str) -> None:
    """Give listed workers of a role that the model lacks the moment they take to be in the state.

    So it is just after their start, and after the log was lost: the caretaker has them register
    again. Returns after WORKER_WAIT_S in any case; the router then says what is wrong.
    """
    router = service.router
    if router.has_workers(model):
        return  # the usual case, told cheaply
    deadline_s = service.clock() + WORKER_WAIT_S
    while (  # noqa: ASYNC110  the fold has no event to wait for
        missing_roles(service, model)
        and any(not router.has_workers(model, role) for role in service.models.listed_roles(model))
        and service.clock() < deadline_s
    ):
        await asyncio.sleep(0.02)


async def _tokenize(
    service: Service,
    served: ServedModel,
    asked: ChatRequest | CompletionRequest,
    given: list[Prompt],
) -> list[list[int]]:
    """The token ids of every prompt. Raises BadRequest where one can't be had or does not fit."""
    param = "messages" if isinstance(asked, ChatRequest) else "prompt"
    tokenizer = served.tokenizer
    found: list[list[int]] = []
    for prompt in given:
        if isinstance(prompt, list):
            if not tokenizer.knows(prompt):
                raise BadRequest(
                    f"a token id is not below the vocabulary's size, {tokenizer.vocab_size}", param
                )
            found.append(prompt)
            continue
        started_s = service.clock()
        special = not isinstance(asked, ChatRequest)
        if len(prompt) < THREAD_CHARS_MIN:
            ids = tokenizer.encode(prompt, add_special_tokens=special)
        else:
            ids = await asyncio.to_thread(tokenizer.encode, prompt, add_special_tokens=special)
        service.metrics.tokenizer_took("tokenize", service.clock() - started_s)
        found.append(ids)
    context = served.card.context_length
    max_tokens = stop_conditions(asked).max_tokens
    for ids in found:
        if not ids:
            raise BadRequest("the prompt has no tokens", param)
        if len(ids) >= context:
            raise ContextLengthExceeded(len(ids), None, context, param)
        if max_tokens is not None and len(ids) + max_tokens > context:
            raise ContextLengthExceeded(len(ids), max_tokens, context, "max_tokens")
    return found


def _text(served: ServedModel, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return served.tokenizer.decode(prompt, skip_special_tokens=False)


def _prompts(
    service: Service, served: ServedModel, asked: ChatRequest | CompletionRequest
) -> list[Prompt]:
    if isinstance(asked, CompletionRequest):
        return prompts(asked)
    if served.template is None:
        raise BadRequest(f"{served.card.name} has no chat template", "model")
    return [
        served.template.render(
            asked.messages,
            now_ns=int(service.now_s() * 1e9),
            tools=tool_use(asked).listed,
            add_generation_prompt=asked.add_generation_prompt is not False,
            variables=template_variables(asked),
        )
    ]
