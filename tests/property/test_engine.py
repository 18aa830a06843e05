"""Laws of the mock engine, over any mix of requests, cancellations, pins and steps in a tiny cache.

Some of the requests have their prompt computed elsewhere.
"""

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from eventstore.events import BlockRemoved, BlockStored
from indexer.blocks import prompt_hashes
from workers.engine import EngineConfig, MockEngine, RequestRefused, StepOutput, StepResult
from workers.kv_cache import KvEvent
from workers.protocol import EngineRequest, StopConditions

EOS = 9
BLOCK_SIZE = 2
TINY = EngineConfig(
    block_size=BLOCK_SIZE,
    num_gpu_blocks=8,
    max_num_seqs=3,
    max_num_batched_tokens=5,
    max_num_waiting=4,
    context_length=24,
    output_token_ids=range(4),
    output_length_mean=6,
    kv_bytes_per_token=1_000_000,
    kv_transfer_gbps=1,  # 8 ms a token, about as long as a step
)
BESIDE_PINS = replace(TINY, num_gpu_blocks=2 * 24 // BLOCK_SIZE)
"""Every request has room beside all that may be pinned."""
ROOMY = EngineConfig(
    block_size=BLOCK_SIZE, context_length=24, output_token_ids=range(4), output_length_mean=6
)


class Submit(NamedTuple):
    request: EngineRequest
    priority: int
    is_remote: bool = False


class Cancel(NamedTuple):
    which: int


class Step(NamedTuple):
    pass


class Pin(NamedTuple):
    token_ids: list[int]
    ttl_ms: float


Call = Submit | Cancel | Step | Pin

# Most prompts share a head, so that there are hits, and copies computed at the same time.
prompts = st.builds(
    lambda head, tail: [0, 1, 1, 0, 1, 0, 0, 1][:head] + tail,
    st.integers(0, 8),
    st.lists(st.integers(0, 1), min_size=1, max_size=6),
)
requests = st.builds(
    EngineRequest,
    request_id=st.integers(0, 99).map(str),
    model=st.just("m"),
    token_ids=prompts,
    stop_conditions=st.builds(
        StopConditions,
        max_tokens=st.none() | st.integers(1, 10),
        min_tokens=st.none() | st.integers(0, 12),
        ignore_eos=st.booleans(),
        stop_token_ids_hidden=st.sampled_from([[], [3]]),
    ),
    eos_token_ids=st.just([EOS]),
)
submits = st.builds(Submit, requests, st.integers(0, 1), st.booleans())
pins = st.builds(Pin, prompts, st.floats(1, 300))
calls = st.lists(
    st.one_of(submits, submits, st.builds(Cancel, st.integers(0, 9)), pins, *[st.builds(Step)] * 3),
    min_size=10,
    max_size=40,
)
thorough = settings(deadline=None, max_examples=200)


class Driver:
    """Makes the calls, checks what must hold after each, and keeps what came of them."""

    def __init__(self, config: EngineConfig = TINY) -> None:
        self.engine = MockEngine(config, seed=5, worker_id=1)
        self.taken: dict[str, EngineRequest] = {}
        self.outputs: dict[str, list[StepOutput]] = {}
        self.ended: set[str] = set()
        self.results: list[StepResult] = []
        self.visible: dict[int, int | None] = {}
        """Sequence hash → parent, as the events tell."""
        self.now_ms = 0.0
        self.pinned_until_ms: dict[int, float] = {}
        """By sequence hash; renewals not counted."""
        self.removed_though_pinned = 0
        self.step_began_ms = 0.0

    def make(self, call: Call) -> None:
        match call:
            case Submit(request, priority, is_remote):
                if request.request_id in self.ended:
                    return  # ids are unique, as a frontend's are
                try:
                    self.engine.submit(request, priority=priority, is_remote=is_remote)
                except RequestRefused:
                    return
                self.taken[request.request_id] = request
                self.outputs[request.request_id] = []
            case Cancel(which):
                active = self.engine.request_ids()
                if active:
                    self.ended.add(active[which % len(active)])
                    assert self.engine.cancel(active[which % len(active)])
            case Step():
                self.step()
            case Pin(token_ids, ttl_ms):
                self.pin(token_ids, ttl_ms)
        self.engine.check()

    def pin(self, token_ids: list[int], ttl_ms: float) -> None:
        kept = self.engine.pin(token_ids, ttl_ms, self.now_ms)
        assert kept == prompt_hashes(token_ids, BLOCK_SIZE)[: len(kept)]
        assert self.visible.keys() >= set(kept)
        for each in kept:
            until_ms = self.pinned_until_ms.get(each, 0.0)
            self.pinned_until_ms[each] = max(until_ms, self.now_ms + ttl_ms)
        told = [each for run in self.engine.pinned(self.now_ms) for each in run.sequence_hashes]
        assert len(set(told)) == len(told)
        assert len(told) <= self.engine.config.max_pinned_ratio * self.engine.config.num_gpu_blocks

    def step(self) -> bool:
        busy = bool(self.engine.request_ids())
        self.step_began_ms = self.now_ms
        result = self.engine.step(self.now_ms)
        if result is None and busy:
            due_ms = self.engine.next_due_ms
            assert due_ms is not None and due_ms >= self.now_ms, "nothing to wait for"
            self.now_ms = self.step_began_ms = due_ms
            result = self.engine.step(self.now_ms)
        assert (result is not None) == busy
        if result is None:
            return False
        self.now_ms += result.duration_ms
        if result.duration_ms == 0:
            assert not result.outputs and not result.prefill_tokens
            assert result.kv_events or result.preempted, "a step that tells nothing"
            assert self.engine.next_due_ms is not None, "a step without progress"
        else:
            assert result.outputs or result.prefill_tokens, "a step without progress"
        assert result.prefill_tokens <= self.engine.config.max_num_batched_tokens
        self.results.append(result)
        for output in result.outputs:
            assert output.request_id not in self.ended, "an output after the last"
            self.outputs[output.request_id].append(output)
            if output.finish_reason is not None:
                self.ended.add(output.request_id)
        for event in result.kv_events:
            self.replay(event)
        return True

    def replay(self, event: KvEvent) -> None:
        if isinstance(event, BlockRemoved):
            for block_hash in event.sequence_hashes:
                del self.visible[block_hash]
                until_ms = self.pinned_until_ms.pop(block_hash, 0.0)
                self.removed_though_pinned += until_ms > self.step_began_ms
            return
        assert isinstance(event, BlockStored)
        parent = event.parent_hash
        for block_hash in event.sequence_hashes:
            assert parent is None or parent in self.visible, "stored before its parent"
            assert block_hash not in self.visible, "stored twice"
            self.visible[block_hash] = parent
            parent = block_hash

    def drain(self) -> None:
        """Step until idle; the number of steps is bounded by what there is to compute."""
        steps_max = sum(len(one.token_ids) + 24 for one in self.taken.values()) * 5
        for _ in range(steps_max + 1):
            if not self.step():
                return
            self.engine.check()
        raise AssertionError("requests that never end")

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]


def drive(these: list[Call], config: EngineConfig = TINY) -> Driver:
    driver = Driver(config)
    for call in these:
        driver.make(call)
    driver.drain()
    return driver


def alone(request: EngineRequest) -> tuple[list[int], str | None]:
    """What the request is answered on a roomy engine of its own."""
    driver = drive([Submit(request, 0)], ROOMY)
    last = driver.outputs[request.request_id][-1]
    return driver.tokens(request.request_id), last.finish_reason


@given(calls)
@thorough
def test_no_block_leaks_and_the_events_tell_the_cache(these: list[Call]) -> None:
    """When all is done nothing is in use, and the replayed events are the visible cache."""
    driver = drive(these)
    assert (driver.engine.active_blocks, driver.engine.num_waiting) == (0, 0)
    told: dict[int, int | None] = {}
    for run in driver.engine.cache_contents():
        parents = [run.parent_hash, *run.sequence_hashes]
        told.update(zip(run.sequence_hashes, parents, strict=False))
    assert told == driver.visible


@given(calls)
@thorough
def test_a_request_is_answered_as_if_it_were_alone(these: list[Call]) -> None:
    """Batching, reuse, eviction and preemption change when tokens come, never which ones."""
    driver = drive(these)
    for request_id, request in driver.taken.items():
        outputs = driver.outputs[request_id]
        tokens, reason = alone(request)
        assert driver.tokens(request_id) == tokens[: len(outputs)]
        finished = outputs and outputs[-1].finish_reason is not None
        if finished and request.stop_conditions.max_tokens is not None:
            # Without it, the end of the tiny cache would be an end, too.
            assert (len(outputs), outputs[-1].finish_reason) == (len(tokens), reason)


@given(calls)
@thorough
def test_outputs_keep_to_what_was_asked(these: list[Call]) -> None:
    """One token a step, never over max_tokens, the end only where it may be and with its reason."""
    driver = drive(these)
    for request_id, outputs in driver.outputs.items():
        request, stop = driver.taken[request_id], driver.taken[request_id].stop_conditions
        assert all(len(output.token_ids) == 1 for output in outputs)
        assert all(output.finish_reason is None for output in outputs[:-1])
        assert len(outputs) <= (stop.max_tokens or TINY.context_length - len(request.token_ids))
        assert [output.cached_tokens is not None for output in outputs[:1]] in ([], [True])
        assert all(output.cached_tokens is None for output in outputs[1:])
        if outputs and (reason := outputs[-1].finish_reason) is not None:
            last = outputs[-1].token_ids[0]
            assert reason in ("length", "eos", "stop")
            assert reason != "eos" or (last == EOS and not stop.ignore_eos)
            assert reason != "stop" or last in stop.stop_token_ids_hidden
            assert reason == "length" or len(outputs) > (stop.min_tokens or 0)


@given(calls)
@thorough
def test_hits_are_real(these: list[Call]) -> None:
    """Cached tokens are whole blocks of a prefix that some other request had, or all but one."""
    driver = drive(these)
    sequences = {
        request_id: request.token_ids + driver.tokens(request_id)
        for request_id, request in driver.taken.items()
    }
    for request_id, outputs in driver.outputs.items():
        if not outputs or not (cached := outputs[0].cached_tokens):
            continue
        prompt = driver.taken[request_id].token_ids
        assert cached % BLOCK_SIZE == 0 or cached == len(prompt) - 1
        assert cached < len(prompt)
        whole = prompt[: -(-cached // BLOCK_SIZE) * BLOCK_SIZE]
        others = (tokens for other, tokens in sequences.items() if other != request_id)
        assert any(tokens[: len(whole)] == whole for tokens in others)


@given(calls)
@thorough
def test_what_is_pinned_stays_for_its_time(these: list[Call]) -> None:
    """No request evicts it, if there is room for each beside all that may be pinned."""
    driver = drive(these, BESIDE_PINS)
    assert driver.removed_though_pinned == 0


@given(requests, st.integers(0, 24), st.booleans())
@thorough
def test_prefill_here_and_decode_there_say_what_one_engine_says(
    request: EngineRequest, cached: int, eos_at_once: bool
) -> None:
    """Whatever part of the prompt the decode engine has cached, and wherever the output ends."""
    config = replace(TINY, num_gpu_blocks=100, output_length_mean=1 if eos_at_once else 6)
    whole = drive([Submit(request, 0)], config)
    prompt = EngineRequest(
        request_id="prompt",
        model="m",
        token_ids=request.token_ids,
        stop_conditions=StopConditions(max_tokens=1),
    )
    prefill = drive([Submit(prompt, 0)], config)
    assert [output.finish_reason for output in prefill.outputs["prompt"]] == ["length"]
    warm_up = EngineRequest(
        request_id="warm-up",
        model="m",
        token_ids=[*request.token_ids[:cached], 8],
        stop_conditions=StopConditions(max_tokens=1),
    )
    decode = drive([Submit(warm_up, 0), *[Step()] * 5, Submit(request, 0, True)], config)
    assert sum(result.prefill_tokens for result in decode.results) == len(warm_up.token_ids)
    theirs, ours = whole.outputs[request.request_id], decode.outputs[request.request_id]
    assert [(one.token_ids, one.finish_reason) for one in ours] == [
        (one.token_ids, one.finish_reason) for one in theirs
    ]
    assert prefill.visible.keys() <= decode.visible.keys(), "the prompt was not announced"


@given(calls)
@thorough
def test_equal_calls_give_equal_results(these: list[Call]) -> None:
    """An engine has no other input than its arguments and calls."""
    assert drive(these).results == drive(these).results


@given(requests, st.data())
@thorough
def test_a_cut_off_answer_goes_on_elsewhere_as_it_would_have(
    request: EngineRequest, data: st.DataObject
) -> None:
    """Prompt and output so far, sent as a prompt, get the rest of the same answer."""
    tokens, reason = alone(request)
    cut = data.draw(st.integers(0, len(tokens) - 1))
    stop = request.stop_conditions
    rest = EngineRequest(
        request_id="rest",
        model="m",
        token_ids=request.token_ids + tokens[:cut],
        stop_conditions=StopConditions(
            max_tokens=None if stop.max_tokens is None else stop.max_tokens - cut,
            min_tokens=None if stop.min_tokens is None else max(0, stop.min_tokens - cut),
            ignore_eos=stop.ignore_eos,
            stop_token_ids_hidden=stop.stop_token_ids_hidden,
        ),
        eos_token_ids=request.eos_token_ids,
    )
    assert alone(rest) == (tokens[cut:], reason)
