"""Who runs next: admission, spans, and what is given back. No tensors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hnet_runtime.engine.messages import Request, SamplingParams
from hnet_runtime.engine.plan import ByteStep, Prefill, Span
from hnet_runtime.engine.policies import Decision, Situation, Through, make_policy
from hnet_runtime.engine.request import LiveRequest, RequestError
from hnet_runtime.engine.scheduler import PrefillRules, Scheduler
from hnet_runtime.state.rows import PAGE, pages_for
from tests.engine.fake_model import DEPTH, NUM_STAGES, FakeEngine, Scripted, next_byte

NOBODY_DECODES = 8  # times the budget, as EngineConfig.prefill_bytes_per_tick says


def request(request_id: str, length: int = 10, max_tokens: int = 5, priority: int = 0) -> LiveRequest:
    params = SamplingParams(max_tokens=max_tokens)
    letter = chr(ord("a") + sum(request_id.encode()) % 26).encode()
    return LiveRequest(Request(request_id=request_id, prompt=letter * length, params=params, priority=priority), 2, 0.0)


def scheduler_of(rows: int = 4, pages: tuple[int, ...] = (), budget: int = 16, most: int = 100 * PAGE) -> Scheduler:
    policy = make_policy("lockstep", NUM_STAGES)
    return FakeEngine(policy, rows, pages, most, rules=PrefillRules(budget, share=1.0)).scheduler


def admit(scheduler: Scheduler, *requests: LiveRequest) -> list[int]:
    """The rows of those who got one."""
    for each in requests:
        scheduler.enqueue(each)
    before = {each.row for each in scheduler.live()}
    assert scheduler.admit(1.0) == []
    return [each.row or 0 for each in scheduler.live() if each.row not in before]


def spans_of(scheduler: Scheduler) -> tuple[Span, ...]:
    return next((work.spans for work in scheduler.plan(1.0).work if isinstance(work, Prefill)), ())


def run_spans(scheduler: Scheduler) -> None:
    for span in spans_of(scheduler):
        scheduler[span.row].prefilled(span.end, [], 2.0)


# ── admission ─────────────────────────────────────────────────────────────────────────────────


def test_who_waits_goes_by_priority_and_then_by_arrival():
    scheduler = scheduler_of(rows=1)
    (first,) = admit(scheduler, request("first"))
    order = [("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", -1), ("f", 5), ("g", 0)]
    for name, priority in order:
        scheduler.enqueue(request(name, priority=priority))
    came = []
    while scheduler.num_live:
        (running,) = scheduler.live()
        came.append(running.request_id)
        scheduler.release(running)
        assert scheduler.admit(1.0) == []
    assert first == 1
    assert came == ["first", "c", "e", "a", "d", "g", "b", "f"]


def test_whoever_is_least_urgent_gives_up_its_row_and_the_urgent_one_keeps_its_own():
    engine = FakeEngine(
        make_policy("lockstep", NUM_STAGES), 4, (3,) * (NUM_STAGES - 1), 100 * PAGE, rules=PrefillRules(64)
    )
    scheduler = engine.scheduler
    late, urgent = request("late", 60, 90, priority=3), request("urgent", 60, 90, priority=-3)
    scheduler.enqueue(late)
    scheduler.enqueue(urgent)
    scheduler.admit(1.0)
    assert {each.request_id for each in scheduler.live()} == {"late", "urgent"}
    scheduler._preempt(2.0)
    assert [each.request_id for each in scheduler.live()] == ["urgent"]
    assert late.swapped is not None


def test_rows_go_to_requests_in_order_of_arrival():
    scheduler = scheduler_of(rows=2)
    requests = [request(name) for name in "abc"]
    assert admit(scheduler, *requests) == [1, 2]
    assert [each.row for each in requests] == [1, 2, None]
    assert (scheduler.num_live, scheduler.num_waiting) == (2, 1)
    scheduler.release(requests[1])
    assert admit(scheduler) == [2]
    assert requests[2].row == 2


def test_a_request_waits_for_the_pages_of_its_prompt_and_one_more_for_each_who_runs():
    scheduler = scheduler_of(pages=(4,), most=4 * PAGE)
    assert admit(scheduler, request("a", PAGE, max_tokens=3 * PAGE), request("b", 2 * PAGE, max_tokens=0)) == [1, 2]
    assert admit(scheduler, request("c", 2 * PAGE, max_tokens=0)) == []  # 2 pages and 3 of 4
    scheduler.check()
    assert (scheduler.num_live, scheduler.num_waiting, scheduler.kv_in_use) == (2, 1, 0.0)
    scheduler.cancel("b")
    assert admit(scheduler) == [2]


class Asked(Scripted):
    """Has everybody go through, and counts what it was asked."""

    def __init__(self) -> None:
        super().__init__([])
        self.chosen = 0

    def choose(self, situation: Situation) -> Decision:
        self.chosen += 1
        return Through()

    def goes_through(self, situation: Situation) -> bool:
        return True


def test_who_goes_on_is_asked_at_no_cost_and_counts_as_a_plan_once_it_is_under_way():
    policy = Asked()
    scheduler = FakeEngine(policy, 3, (), 0, rules=PrefillRules(64, share=1.0)).scheduler
    one, two, plain = request("one"), request("two"), SamplingParams(max_tokens=5, presence_penalty=1.0)
    admit(scheduler, one, two)
    assert scheduler.goes_on() == []  # they read
    run_spans(scheduler)
    for each in (one, two):
        each.append(97, None)
    scheduler.plan(1.0)
    assert policy.chosen == 1
    for _ in range(5):
        assert scheduler.goes_on() == [one, two]
    assert policy.chosen == 1
    scheduler.went_on(2)
    assert policy.chosen == 2
    scheduler.park(two, 1, 1.0)
    assert scheduler.goes_on() == []
    scheduler.unpark(two, 1.0)
    assert scheduler.goes_on() == [one, two]
    host_drawn = LiveRequest(Request(request_id="h", prompt=b"h", params=plain), 2, 0.0)
    scheduler.enqueue(host_drawn)
    assert scheduler.goes_on() == []  # it could have a row
    scheduler.admit(1.0)
    run_spans(scheduler)
    assert scheduler.goes_on() == []  # the host draws for it
    host_drawn.finish("abort")
    assert scheduler.goes_on() == [one, two]
    scheduler.enqueue(request("later"))
    assert scheduler.goes_on() == [one, two]  # no row is free
    scheduler.release(host_drawn)
    assert scheduler.goes_on() == []


def test_nobody_goes_on_further_than_its_pages():
    scheduler = FakeEngine(Asked(), 2, (4,), 100 * PAGE, rules=PrefillRules(64, share=1.0)).scheduler
    one = request("one", max_tokens=2 * PAGE)
    admit(scheduler, one)
    run_spans(scheduler)
    one.append(97, None)
    scheduler.plan(1.0)
    went = 0
    while scheduler.goes_on():
        scheduler.went_on(1)
        went += 1
    assert 0 < went < PAGE


def test_nobody_overtakes_the_first_who_waits():
    scheduler = scheduler_of(pages=(3,))
    admit(scheduler, request("a", 2 * PAGE, 0))
    assert admit(scheduler, request("large", 3 * PAGE, 0), request("small", 1, 0)) == []
    assert scheduler.num_waiting == 2


def test_a_request_that_could_never_have_its_pages_is_refused_at_once():
    scheduler = scheduler_of(pages=(3,))
    with pytest.raises(RequestError, match="4") as refused:
        scheduler.enqueue(request("a", 3 * PAGE, max_tokens=2))
    assert refused.value.param == "max_tokens"
    scheduler.enqueue(request("a", 3 * PAGE, max_tokens=1))  # and its id is free again
    scheduler.check()


@pytest.mark.parametrize("is_live", [True, False])
def test_an_id_in_use_is_refused(is_live):
    scheduler = scheduler_of()
    scheduler.enqueue(request("a"))
    if is_live:
        scheduler.admit(1.0)
    with pytest.raises(RequestError, match="'a'") as refused:
        scheduler.enqueue(request("a"))
    assert refused.value.param == "request_id"
    scheduler.check()


# ── plans ─────────────────────────────────────────────────────────────────────────────────────


def test_nothing_to_do_is_an_empty_plan():
    assert scheduler_of().plan(1.0).work == ()


def test_rows_whose_prompt_has_run_step_before_prompts_run():
    scheduler = scheduler_of(budget=4)
    requests = [request(name, 10) for name in "abc"]
    admit(scheduler, *requests)
    requests[2].prefilled(10, [], 2.0)
    requests[0].prefilled(10, [], 2.0)
    step, prefill = scheduler.plan(1.0).work
    assert step == ByteStep((1, 3))
    assert prefill == Prefill((Span(2, 0, 4, completes=False),))
    assert prefill.num_bytes == 4


def test_a_long_prompt_runs_in_spans_to_its_end():
    scheduler = scheduler_of(budget=4)
    decoding, long = request("d", 1), request("long", 11)
    admit(scheduler, decoding, long)
    decoding.prefilled(1, [], 1.0)
    seen = []
    while long.is_prefilling:
        seen += spans_of(scheduler)
        run_spans(scheduler)
    assert seen == [Span(2, 0, 4, False), Span(2, 4, 8, False), Span(2, 8, 11, True, snapshot=True)]


def test_while_nobody_decodes_prompts_may_take_eight_times_as_much():
    scheduler = scheduler_of(budget=4)
    admit(scheduler, request("a", 100))
    assert spans_of(scheduler) == (Span(1, 0, 4 * NOBODY_DECODES, completes=False),)


def shares(lengths: list[int], budget: int) -> list[int]:
    """Each prompt's bytes in the first tick beside a decoding row."""
    scheduler = scheduler_of(rows=len(lengths) + 1, budget=budget)
    decoding, prompts = request("decoding", 1), [request(str(i), length) for i, length in enumerate(lengths)]
    admit(scheduler, decoding, *prompts)
    decoding.prefilled(1, [], 1.0)
    found = {span.row: span for span in spans_of(scheduler)}
    for prompt in prompts:
        span = found.get(prompt.row)
        if span is not None:
            assert span.begin == 0 < span.end <= len(prompt.request.prompt)
            assert span.completes == (span.end == len(prompt.request.prompt))
    return [found[prompt.row].end if prompt.row in found else 0 for prompt in prompts]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 80))
def test_the_bytes_of_a_tick_are_poured_evenly_and_never_beyond_the_budget(lengths, budget):
    found = shares(lengths, budget)
    assert sum(found) == min(budget, sum(lengths))  # all of it, and no more
    served = min(len(lengths), budget)
    assert all(found[:served])  # the oldest ones move on, whatever comes after them
    assert not any(found[served:])
    level = max(found)
    for share, length in zip(found[:served], lengths, strict=False):
        assert share == length or share >= level - 1  # who got less than others is done


def test_short_prompts_leave_their_share_to_long_ones():
    assert shares([2, 100, 3], 25) == [2, 20, 3]


def test_with_fewer_bytes_than_prompts_nobody_who_came_first_starves():
    """New prompts arrive each tick; the first one runs to its end all the same."""
    scheduler = scheduler_of(rows=40, budget=1)
    decoding, first = request("decoding", 1), request("first", 6)
    admit(scheduler, decoding, first)
    decoding.prefilled(1, [], 1.0)
    for tick in range(6):
        assert first.is_prefilling
        admit(scheduler, request(f"long-{tick}", 500), request(f"short-{tick}", 1))
        run_spans(scheduler)
    assert not first.is_prefilling


# ── ends ──────────────────────────────────────────────────────────────────────────────────────


def test_cancelling_takes_a_request_out_wherever_it_is():
    scheduler = scheduler_of(rows=1, pages=(2,))
    running, waiting = request("running"), request("waiting")
    admit(scheduler, running, waiting)
    assert scheduler.cancel("waiting") is waiting
    scheduler.check()
    assert scheduler.cancel("running") is running
    scheduler.check()
    assert (scheduler.num_live, scheduler.num_waiting, scheduler.kv_in_use) == (0, 0, 0.0)
    assert scheduler.cancel("running") is None
    assert scheduler.cancel("nobody") is None
    assert admit(scheduler, request("running")) == [1]


def test_check_finds_a_request_that_leaked():
    scheduler = scheduler_of()
    admit(scheduler, request("a"))
    scheduler._by_id["ghost"] = request("ghost")
    with pytest.raises(AssertionError, match="requests leaked"):
        scheduler.check()


# ── what prompts share ────────────────────────────────────────────────────────────────────────


def engine_of(**settings) -> FakeEngine:
    return FakeEngine(make_policy("lockstep", NUM_STAGES), **{"cache_bytes": 10**6, **settings})


def serve(engine: FakeEngine, *requests: LiveRequest) -> None:
    for each in requests:
        engine.scheduler.enqueue(each)
    for _ in range(100_000):
        if not (engine.scheduler.num_live or engine.scheduler.num_waiting):
            return
        engine.tick()
        engine.verify()
    raise AssertionError("still busy")


def cached(request: LiveRequest) -> int:
    output = request.take_output(0.0)
    assert output is not None
    assert output.usage is not None
    return output.usage.cached_bytes


def asking(request_id: str, prompt: bytes, salt: str = "", priority: int = 0, **params) -> LiveRequest:
    made = SamplingParams(**{"max_tokens": 3, "utf8": "raw", **params})
    made_of = Request(request_id=request_id, prompt=prompt, params=made, cache_salt=salt, priority=priority)
    return LiveRequest(made_of, 2, 0.0)


SHARED = b"abcabTc!" * 12  # 96 bytes


def test_the_third_prompt_of_a_beginning_finds_all_of_it_and_the_second_shows_where_it_ends():
    engine = engine_of()
    requests = [asking(name, SHARED + name.encode() * 40) for name in "xyz"]
    for each in requests:
        serve(engine, each)
    assert [cached(each) for each in requests] == [0, 0, len(SHARED)]


def test_a_prompt_is_snapshotted_at_intervals_so_that_the_second_finds_most_of_a_beginning():
    engine = engine_of(rules=PrefillRules(interval=16))
    first, second = asking("x", SHARED + b"x" * 40), asking("y", SHARED[:90] + b"y" * 40)
    serve(engine, first)
    serve(engine, second)
    assert (cached(first), cached(second)) == (0, 80)
    assert engine.scheduler.num_hit_bytes == 80
    assert engine.scheduler.num_queried_bytes == 136 + 130


def test_a_known_prompt_has_its_first_byte_in_the_tick_it_is_admitted_in():
    engine = engine_of()
    serve(engine, asking("first", SHARED))
    again = asking("again", SHARED)
    engine.scheduler.enqueue(again)
    engine.tick()
    assert again.output[:1] == bytes([next_byte(SHARED)])
    assert not any(isinstance(work, Prefill) for work in engine.last_plan)
    serve(engine)
    assert cached(again) == len(SHARED)


def test_what_a_completion_wrote_is_known_in_the_next_turn():
    engine = engine_of()
    first = asking("first", SHARED, max_tokens=20)
    serve(engine, first)
    second = asking("second", SHARED + bytes(first.output) + b"more")
    serve(engine, second)
    assert cached(second) == len(SHARED) + 19  # the last byte was never fed


def test_a_stop_string_that_was_cut_out_is_known_in_the_next_turn_too():
    engine = engine_of()
    plain = asking("plain", SHARED, max_tokens=20)
    serve(engine, plain)
    engine.memory.clear()
    stop = bytes(plain.output[7:10])
    stopped = asking("stopped", SHARED, max_tokens=20, stop=(stop,))
    serve(engine, stopped)
    upto = bytes(plain.output).index(stop) + len(stop)
    assert plain.output.startswith(stopped.output + stop)
    second = asking("second", SHARED + bytes(plain.output[:upto]) + b"more")
    serve(engine, second)
    assert cached(second) == len(SHARED) + upto - 1


def test_salts_do_not_see_each_other():
    engine = engine_of()
    requests = [asking("a", SHARED), asking("b", SHARED, "tenant"), asking("c", SHARED, "tenant"), asking("d", SHARED)]
    for each in requests:
        serve(engine, each)
    assert [cached(each) for each in requests] == [0, 0, len(SHARED), len(SHARED)]


def test_requests_that_come_together_read_what_they_share_once():
    engine = engine_of(rows=8)
    requests = [asking(str(index), SHARED + bytes([97 + index]) * 40) for index in range(8)]
    serve(engine, *requests)
    assert [cached(each) for each in requests] == [0] + [len(SHARED)] * 7


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_choices_of_one_prompt_share_its_reading_even_where_nothing_is_cached(cache_bytes):
    engine = engine_of(rows=2, cache_bytes=cache_bytes)
    requests = [asking(str(index), b"\xfeTab", choice=index) for index in range(5)]
    serve(engine, *requests)
    assert [cached(each) for each in requests] == [0, 4, 4, 4, 4]
    engine.scheduler.check()


def test_without_a_cache_different_prompts_share_nothing():
    engine = engine_of(cache_bytes=0)
    requests = [asking(name, SHARED + name.encode()) for name in "xy"]
    serve(engine, *requests)
    assert [cached(each) for each in requests] == [0, 0]


def test_who_waits_for_another_s_reading_goes_alone_when_that_one_leaves():
    engine = engine_of(rules=PrefillRules(bytes_per_tick=2))
    leader, follower = asking("leader", SHARED + b"x"), asking("follower", SHARED + b"y")
    engine.scheduler.enqueue(leader)
    engine.scheduler.enqueue(follower)
    engine.tick()
    engine.tick()
    assert (leader.fed > 0, follower.row) == (True, None)
    assert engine.scheduler.cancel("leader") is leader
    engine.tick()
    assert follower.fed > 0
    serve(engine)
    assert cached(follower) == 0


def test_who_waits_for_another_s_reading_holds_up_nobody_behind_him():
    engine = engine_of(rules=PrefillRules(bytes_per_tick=2))
    for each in (asking("leader", SHARED + b"x"), asking("follower", SHARED + b"y"), asking("other", b"\xfeHi")):
        engine.scheduler.enqueue(each)
    engine.tick()
    assert [each.request_id for each in engine.scheduler.live()] == ["leader", "other"]


def test_one_who_asks_for_prompt_logprobs_reads_its_whole_prompt():
    engine = engine_of()
    serve(engine, asking("first", SHARED))
    scored = asking("scored", SHARED, prompt_logprobs=0)
    serve(engine, scored)
    assert cached(scored) == 0
    assert engine.scheduler.num_queried_bytes == len(SHARED)


def test_return_chunks_is_complete_on_a_hit():
    engine = engine_of()
    outputs = []
    for name in ("miss", "hit"):
        each = asking(name, SHARED, return_chunks=True)
        serve(engine, each)
        outputs.append(each.take_output(0.0))
    miss, hit = outputs
    assert hit.usage.cached_bytes == len(SHARED)
    assert hit.chunks == miss.chunks
    assert hit.usage.chunks == miss.usage.chunks
    assert sum(chunk.stage == 1 for chunk in hit.chunks) >= 4 * 12


# ── pages that run out ────────────────────────────────────────────────────────────────────────


def test_the_one_who_came_last_makes_room_and_comes_back_first():
    engine = engine_of(rows=3, pages=(3,), cache_bytes=0, most=3 * PAGE)
    requests = [asking(name, name.encode() + b"T" * 40, max_tokens=100) for name in "abc"]
    late = asking("late", b"d")
    for each in requests:
        engine.scheduler.enqueue(each)
    seen: list[list[str]] = []
    while not engine.scheduler.num_preemptions:
        engine.tick()
        engine.verify()
        seen.append([each.request_id for each in engine.scheduler.live()])
    assert set(seen[-2]) - set(seen[-1]) == {max(seen[-2])}
    engine.scheduler.enqueue(late)
    order = []
    while engine.scheduler.num_waiting or engine.scheduler.num_live:
        engine.tick()
        engine.verify()
        order += [each.request_id for each in engine.scheduler.live() if each.request_id not in order]
    assert order.index("late") == len(order) - 1
    for each in requests:
        assert bytes(each.output) == written(each.request.prompt, 100)
    assert sum(each.take_output(0.0).usage.preemptions for each in requests) == engine.scheduler.num_preemptions > 0


def test_a_preempted_request_comes_back_before_its_equals_and_after_the_more_urgent():
    scheduler = scheduler_of(rows=1)
    preempted = request("preempted", priority=2)
    admit(scheduler, preempted)
    scheduler._preempt(1.0)
    for name, priority in (("later", 3), ("equal", 2), ("urgent", 1), ("most urgent", -1)):
        scheduler.enqueue(request(name, priority=priority))
    came = []
    while scheduler.num_waiting:
        scheduler.admit(2.0)
        scheduler.check()
        (running,) = scheduler.live()
        came.append(running.request_id)
        scheduler.release(running)
    assert came == ["most urgent", "urgent", "preempted", "equal", "later"]


def test_snapshots_give_way_before_rows_do():
    engine = engine_of(pages=(2,), most=2 * PAGE)
    serve(engine, asking("cached", b"a" + b"T" * 70, max_tokens=1))
    assert engine.memory.cached_bytes > 0
    serve(engine, asking("new", b"b" + b"T" * 70, max_tokens=40))
    assert engine.scheduler.num_preemptions == 0


def test_a_preempted_request_can_be_cancelled():
    engine = engine_of(rows=2, pages=(3,), cache_bytes=0, most=3 * PAGE)
    for name in "ab":
        engine.scheduler.enqueue(asking(name, name.encode() + b"T" * 60, max_tokens=60))
    while not engine.scheduler.num_preemptions:
        engine.tick()
    (gone,) = (name for name in "ab" if name not in [each.request_id for each in engine.scheduler.live()])
    assert engine.scheduler.num_waiting == 1
    assert engine.scheduler.cancel(gone).request_id == gone
    assert engine.scheduler.num_waiting == 0
    engine.verify()
    serve(engine)


# ── how prompts share the time ────────────────────────────────────────────────────────────────


def test_prompts_beside_decoding_rows_wait_until_these_had_their_share():
    engine = engine_of(rules=PrefillRules(bytes_per_tick=4, share=0.25), cache_bytes=0)
    decoding, prompt = asking("d", b"a", max_tokens=100), asking("p", b"b" * 40)
    engine.scheduler.enqueue(decoding)
    engine.tick()
    engine.scheduler.enqueue(prompt)
    read = []
    for _ in range(9):
        engine.tick()
        has_prompt = any(isinstance(work, Prefill) for work in engine.last_plan)
        engine.scheduler.spent(decoding=1.0, prefilling=1.0 if has_prompt else 0.0)
        read.append(has_prompt)
    assert read == [True, False, False] * 3
    engine.scheduler.cancel("d")
    engine.tick()
    assert prompt.fed == 40  # all that was left, at once


# ── any course of events ──────────────────────────────────────────────────────────────────────


def written(prompt: bytes, count: int) -> bytes:
    """What the fake model writes after a prompt."""
    sequence = prompt
    for _ in range(count):
        sequence += bytes([next_byte(sequence)])
    return sequence[len(prompt) :]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run and go in any order, under a policy that decides at random, over two stages with pages of
    their own and too few of them; a row always holds what its bytes say, and each writes what it would write alone."""

    @initialize(
        rows=st.integers(1, 4),
        pages=st.tuples(st.integers(3, 6), st.integers(3, 6)),
        rules=st.builds(PrefillRules, st.integers(1, 99), st.sampled_from([0.3, 1.0]), st.sampled_from([None, 7, 64])),
        cache_bytes=st.sampled_from([0, 500, 10**6]),
        numbers=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    )
    def begin(self, rows, pages, rules, cache_bytes, numbers) -> None:
        self.pages = pages
        self.engine = FakeEngine(Scripted(numbers), rows, pages, 3 * PAGE, cache_bytes, rules)
        self.present: list[LiveRequest] = []
        self.count = 0

    @rule(
        kept=st.integers(0, 130),
        tail=st.text("aTbc", max_size=40),
        max_tokens=st.integers(0, PAGE),
        salt=st.sampled_from(["", "", "", "other"]),
        scored=st.sampled_from([None, None, None, 0]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def submit(self, kept, tail, max_tokens, salt, scored, priority) -> None:
        prompt = b"\xfe" + (b"abTT!" * 30)[:kept] + tail.encode()
        self.count += 1
        params = {"max_tokens": max_tokens, "prompt_logprobs": scored, "return_chunks": True}
        new = asking(str(self.count), prompt, salt, priority, **params)
        if pages_for(new.max_positions) > min(self.pages):
            with pytest.raises(RequestError):
                self.engine.scheduler.enqueue(new)
        else:
            self.engine.scheduler.enqueue(new)
            self.present.append(new)

    @rule(count=st.integers(1, 30))
    def ticks(self, count) -> None:
        for _ in range(count):
            self.engine.tick()
            self.engine.verify()
        self.take_those_over()

    @rule(data=st.data())
    def cancel(self, data) -> None:
        if self.present:
            gone = data.draw(st.sampled_from(self.present))
            assert self.engine.scheduler.cancel(gone.request_id) is gone
            assert gone.request_id not in self.engine.scheduler
            self.present.remove(gone)

    def take_those_over(self) -> None:
        for request in self.engine.over:
            self.present.remove(request)
            prompt, count = request.request.prompt, request.params.max_tokens
            assert bytes(request.output) == written(prompt, count)
            fed = prompt + request.output[: max(count - 1, 0)]
            chunks = [(stage, start) for start, byte in enumerate(fed) for stage in range(1, DEPTH.get(byte, 0) + 1)]
            assert [(chunk.stage, chunk.start) for chunk in request.take_output(0.0).chunks] == chunks
        self.engine.over.clear()

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "engine"):
            self.engine.verify()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            serve(self.engine)
            self.take_those_over()
            assert not self.present
            assert self.engine.scheduler.kv_in_use == 0.0
            self.engine.memory.clear()
            assert all(each.pool.num_free == each.pool.num_pages for each in self.engine.arenas.pages)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)
