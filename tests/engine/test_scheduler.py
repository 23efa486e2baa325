"""Who runs next: admission, spans, and what is given back. No tensors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hnet_runtime.engine.messages import Request, SamplingParams
from hnet_runtime.engine.plan import ByteStep, Prefill, Span
from hnet_runtime.engine.request import LiveRequest, RequestError
from hnet_runtime.engine.scheduler import Scheduler
from hnet_runtime.state.rows import PAGE, PagePool, RowPool, pages_for

NOBODY_DECODES = 8  # times the budget, as EngineConfig.prefill_bytes_per_tick says


def request(request_id: str, length: int = 10, max_tokens: int = 5) -> LiveRequest:
    params = SamplingParams(max_tokens=max_tokens)
    return LiveRequest(Request(request_id=request_id, prompt=b"x" * length, params=params), 1, 0.0)


def scheduler_of(rows: int = 4, pages: tuple[int, ...] = (), budget: int = 16, most: int = 100 * PAGE) -> Scheduler:
    return Scheduler(RowPool(rows), [PagePool(rows + 1, count, most) for count in pages], budget)


def admit(scheduler: Scheduler, *requests: LiveRequest) -> list[int]:
    for each in requests:
        scheduler.enqueue(each)
    return scheduler.admit(1.0)


def spans_of(scheduler: Scheduler) -> tuple[Span, ...]:
    return next((work.spans for work in scheduler.plan().work if isinstance(work, Prefill)), ())


def run_spans(scheduler: Scheduler) -> None:
    for span in spans_of(scheduler):
        scheduler[span.row].prefilled(span.end, [], 2.0)


# ── admission ─────────────────────────────────────────────────────────────────────────────────


def test_rows_go_to_requests_in_order_of_arrival():
    scheduler = scheduler_of(rows=2)
    requests = [request(name) for name in "abc"]
    assert admit(scheduler, *requests) == [1, 2]
    assert [each.row for each in requests] == [1, 2, None]
    assert (scheduler.num_live, scheduler.num_waiting) == (2, 1)
    scheduler.release(requests[1])
    assert scheduler.admit(2.0) == [2]
    assert requests[2].row == 2


def test_a_request_waits_for_the_pages_of_its_longest_course():
    scheduler = scheduler_of(pages=(5, 4))
    first, second = request("a", 2 * PAGE, max_tokens=PAGE + 1), request("b", PAGE + 1, max_tokens=0)
    assert (first.max_positions, second.max_positions) == (3 * PAGE, PAGE + 1)
    assert admit(scheduler, first, second) == [1]  # 3 of 4 pages are taken, and 2 are wanted
    scheduler.check()
    assert scheduler.kv_in_use == 0.75  # of the scarcer stage
    scheduler.release(first)
    assert scheduler.admit(2.0) == [1]
    assert scheduler.kv_in_use == 0.5


def test_nobody_overtakes_the_first_who_waits():
    scheduler = scheduler_of(pages=(3,))
    admit(scheduler, request("a", 2 * PAGE, 0))
    assert admit(scheduler, request("large", 2 * PAGE, 0), request("small", 1, 0)) == []
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
    assert scheduler_of().plan().work == ()


def test_rows_whose_prompt_has_run_step_before_prompts_run():
    scheduler = scheduler_of(budget=4)
    requests = [request(name, 10) for name in "abc"]
    admit(scheduler, *requests)
    requests[2].prefilled(10, [], 2.0)
    requests[0].prefilled(10, [], 2.0)
    step, prefill = scheduler.plan().work
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
    assert seen == [Span(2, 0, 4, False), Span(2, 4, 8, False), Span(2, 8, 11, True)]


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


# ── any course of events ──────────────────────────────────────────────────────────────────────


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run and go in any order, over two stages with pages of their own."""

    @initialize(
        rows=st.integers(1, 4), pages=st.tuples(st.integers(3, 8), st.integers(3, 8)), budget=st.integers(1, 99)
    )
    def begin(self, rows: int, pages: tuple[int, int], budget: int) -> None:
        self.budget, self.num_rows, self.pages = budget, rows, pages
        self.scheduler = scheduler_of(rows, pages, budget, most=4 * PAGE)
        self.waiting: list[LiveRequest] = []
        self.live: list[LiveRequest] = []
        self.count = 0

    @rule(length=st.integers(1, 3 * PAGE), max_tokens=st.integers(0, PAGE))
    def submit(self, length: int, max_tokens: int) -> None:
        self.count += 1
        new = request(str(self.count), length, max_tokens)
        if pages_for(new.max_positions) > min(self.pages):
            with pytest.raises(RequestError):
                self.scheduler.enqueue(new)
        else:
            self.scheduler.enqueue(new)
            self.waiting.append(new)

    @rule()
    def admit(self) -> None:
        rows = self.scheduler.admit(1.0)
        admitted, self.waiting = self.waiting[: len(rows)], self.waiting[len(rows) :]
        assert [each.row for each in admitted] == rows
        self.live += admitted
        if self.waiting and len(self.live) < self.num_rows:  # then it is pages that the next one waits for
            taken = sum(pages_for(each.max_positions) for each in self.live)
            assert taken + pages_for(self.waiting[0].max_positions) > min(self.pages)

    @rule()
    def tick(self) -> None:
        plan = self.scheduler.plan()
        stepping = [row for work in plan.work if isinstance(work, ByteStep) for row in work.rows]
        spans = [span for work in plan.work if isinstance(work, Prefill) for span in work.spans]
        assert sorted(stepping) == sorted(each.row for each in self.live if not each.is_prefilling)
        prompts = {each.row: each for each in self.live if each.is_prefilling}
        assert len({span.row for span in spans}) == len(spans)
        assert {span.row for span in spans} <= set(prompts)
        budget = self.budget * (1 if stepping else NOBODY_DECODES)
        left = sum(len(each.request.prompt) - each.fed for each in prompts.values())
        assert sum(span.end - span.begin for span in spans) == min(budget, left)
        for span in spans:
            assert prompts[span.row].fed == span.begin < span.end
            assert span.completes == (span.end == len(prompts[span.row].request.prompt))
            prompts[span.row].prefilled(span.end, [], 2.0)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.live:
            gone = data.draw(st.sampled_from(self.live))
            self.scheduler.release(gone)
            self.live.remove(gone)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        present = [*self.live, *self.waiting]
        if present:
            gone = data.draw(st.sampled_from(present))
            assert self.scheduler.cancel(gone.request_id) is gone
            assert gone.request_id not in self.scheduler
            (self.live if gone in self.live else self.waiting).remove(gone)

    @invariant()
    def nothing_leaks(self) -> None:
        self.scheduler.check()
        assert [each.request_id for each in self.scheduler.live()] == [each.request_id for each in self.live]
        assert (self.scheduler.num_live, self.scheduler.num_waiting) == (len(self.live), len(self.waiting))
        taken = sum(pages_for(each.max_positions) for each in self.live)
        assert self.scheduler.kv_in_use == pytest.approx(max(taken / count for count in self.pages))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
