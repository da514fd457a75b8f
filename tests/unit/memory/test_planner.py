"""Budgets and plans: the arithmetic, the refusals, and that every suggestion really fits."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from brim.config.model_spec import ModelSpec, spec_from_hf_config
from brim.config.resolve import parse_memory
from brim.config.schema import MemoryRequest
from brim.errors import MemoryBudgetError
from brim.memory.budget import decide_budget
from brim.memory.footprint import Footprint, fixed_lines
from brim.memory.kv_layout import KVLayout
from brim.memory.kv_split import KVSplit
from brim.memory.ledger import LedgerLine
from brim.memory.plan import MemoryPlan
from brim.memory.planner import PlanRequest, make_plan
from brim.memory.step_memory import StepLimits
from brim.platforms.base import MemoryReading
from brim.units import GIB, MIB

from .conftest import DEMO_CONFIG
from .spec_footprint import spec_footprint

DEMO = spec_from_hf_config(DEMO_CONFIG)


def reading(free: int, ours: int = 300 * MIB, others: int = 0, **more: object) -> MemoryReading:
    total = free + ours + others
    return MemoryReading(
        total_bytes=total,
        free_bytes=free,
        ours_bytes=ours,
        others_bytes=others,
        limit_source="scripted",
        **more,  # type: ignore[arg-type]
    )


def request(memory: str = "max", free: int = 8 * GIB, spec: ModelSpec = DEMO, **changes: object) -> PlanRequest:
    base = PlanRequest(
        memory=parse_memory(memory),
        reading=reading(free),
        reserve_bytes=512 * MIB,
        layout=KVLayout.of(spec, 16, 2),
        footprint=spec_footprint(spec, context_bytes=300 * MIB, element_bytes=2, block_size=16),
        max_num_seqs=16,
        max_num_batched_tokens=512,
        max_model_len=4096,
        model_max_len=32768,
        granularity_bytes=4096,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


# --- budget


def test_max_is_ours_and_free_less_the_reserve() -> None:
    budget = decide_budget(MemoryRequest("max"), reading(19 * GIB, GIB, 4 * GIB), GIB)
    assert budget.cap_bytes == 19 * GIB and not budget.decided_by_plan
    assert "19.00 GiB = 1.00 GiB held + 19.00 GiB free" in budget.reasons[0]
    assert "other processes hold 4.00 GiB of 24.00 GiB (scripted)" in budget.reasons[0]


@pytest.mark.parametrize(("text", "cap"), [("50%", 12 * GIB), ("0.5", 12 * GIB), ("85%", 19 * GIB), ("100%", 19 * GIB)])
def test_a_share_is_of_the_total_and_at_most_what_is_there(text: str, cap: int) -> None:
    assert decide_budget(parse_memory(text), reading(19 * GIB, GIB, 4 * GIB), GIB).cap_bytes == cap


def test_bytes_are_taken_as_given_or_refused_with_the_arithmetic() -> None:
    now = reading(19 * GIB, GIB, 4 * GIB)
    assert decide_budget(parse_memory("5GiB"), now, GIB).cap_bytes == 5 * GIB
    close = decide_budget(parse_memory("19.5GiB"), now, GIB)
    assert close.cap_bytes == 19 * GIB + 512 * MIB and close.reserve_bytes == 512 * MIB
    with pytest.raises(MemoryBudgetError, match="leaves less than the reserve"):
        decide_budget(parse_memory("19.5GiB"), now, GIB, reserve_given=True)
    with pytest.raises(MemoryBudgetError, match=r"more than there is: 1\.00 GiB held \+ 19\.00 GiB free = 20\.00 GiB"):
        decide_budget(parse_memory("21GiB"), now, GIB)


def test_no_memory_at_all_and_untrusted_readings() -> None:
    with pytest.raises(MemoryBudgetError, match="no memory to work with") as caught:
        decide_budget(MemoryRequest("enough"), reading(100 * MIB, 50 * MIB, GIB), GIB)
    assert caught.value.ledger is not None and caught.value.ledger.bytes_of("other_processes") == GIB
    budget = decide_budget(MemoryRequest("max"), reading(GIB, trusted=False, reason="free does not move"), 0)
    assert budget.reasons[0] == "The device's readings are not trusted: free does not move."


# --- split


def test_minimum_of_the_demo_model() -> None:
    split = KVSplit(KVLayout.of(DEMO, 16, 2), StepLimits(16, 512, 4096))
    assert split.minimum == (257, 66)
    assert split.enough == (4097, 576)
    assert split.full_length_requests(split.minimum) == 1
    assert split.full_length_requests(split.enough) == 16
    assert split.full_length_requests((256, 66)) == 0


@st.composite
def splits(draw: st.DrawFn) -> KVSplit:
    kinds = draw(
        st.sampled_from([["full_attention"] * 4, ["sliding_attention"] * 3 + ["full_attention"], ["sliding_attention"] * 4])
    )
    config = DEMO_CONFIG | {
        "num_hidden_layers": 4,
        "layer_types": kinds,
        "sliding_window": draw(st.integers(1, 700)),
        "head_dim": 16,
    }
    layout = KVLayout.of(spec_from_hf_config(config), draw(st.sampled_from([1, 8, 16, 32])), 2)
    limits = StepLimits(draw(st.integers(1, 40)), draw(st.integers(40, 3000)), draw(st.integers(2, 5000)))
    return KVSplit(layout, limits, draw(st.sampled_from([1, 4096, 2 * MIB])))


@settings(max_examples=150, deadline=None)
@given(split=splits(), budget=st.integers(0, 1 << 34))
def test_split_keeps_the_budget_fills_it_and_holds_one_request(split: KVSplit, budget: int) -> None:
    blocks = split.within(budget)
    least = split.bytes_for(split.minimum)
    if blocks is None:
        assert least > budget
        return
    assert split.bytes_for(blocks) <= budget
    assert all(n >= m for n, m in zip(blocks, split.minimum, strict=True))
    assert split.full_length_requests(blocks) >= 1
    bigger = split.blocks_at(max(blocks) + 1)
    if bigger != blocks and any(group.window == 0 for group in split.layout.groups):
        assert split.bytes_for(split.blocks_at(blocks[0] + 1)) > budget
    assert all(a <= b for a, b in zip(blocks, split.within(budget * 2 + 1) or (), strict=True))


@settings(max_examples=60, deadline=None)
@given(split=splits())
def test_enough_holds_every_sequence(split: KVSplit) -> None:
    assert split.full_length_requests(split.enough) >= split.limits.max_num_seqs


# --- plan


def check(plan: MemoryPlan, asked: PlanRequest) -> None:
    """What every plan must keep."""
    assert plan.ledger.held_bytes <= plan.cap_bytes <= plan.ceiling_bytes <= asked.reading.reachable_bytes
    assert plan.ledger.bytes_of("kv_cache") == plan.kv_bytes
    assert plan.full_length_requests >= 1
    assert all(a <= b <= c for a, b, c in zip(plan.min_blocks, plan.kv_blocks, plan.max_blocks, strict=True))
    assert plan.ledger.total_bytes == asked.reading.total_bytes


def test_max_fills_the_cap_to_less_than_a_block_of_each_group() -> None:
    asked = request()
    plan = make_plan(asked)
    check(plan, asked)
    assert plan.cap_bytes == 8 * GIB + 300 * MIB - 512 * MIB
    assert plan.ledger.headroom_bytes < sum(g.block_bytes for g in asked.layout.groups) + 2 * 4096
    assert plan.ledger.bytes_of("weights") == 536_196_352


def test_enough_takes_no_more_than_it_needs() -> None:
    asked = request("enough")
    plan = make_plan(asked)
    check(plan, asked)
    assert plan.kv_blocks == plan.max_blocks == (4097, 576)
    assert plan.full_length_requests == 16 and plan.kv_tokens == 65_536
    assert plan.ledger.headroom_bytes == 0
    assert plan.reasons[-1].startswith("Enough for 16 requests of 4,096 tokens is 1.")


def test_enough_starts_with_less_where_there_is_less() -> None:
    asked = request("enough", free=512 * MIB + 536_196_352 + 150 * MIB)
    plan = make_plan(asked)
    check(plan, asked)
    assert 1 <= plan.full_length_requests < 16
    assert "the others wait" in plan.reasons[-1]


def test_auto_is_the_longest_that_fits() -> None:
    asked = request(free=512 * MIB + 536_196_352 + 130 * MIB, max_model_len="auto")
    plan = make_plan(asked)
    check(plan, asked)
    assert 2 < plan.limits.max_model_len < 32768
    with pytest.raises(MemoryBudgetError):
        make_plan(replace(asked, max_model_len=plan.limits.max_model_len + 1))
    assert make_plan(request(max_model_len="auto")).limits.max_model_len == 32768


def apply(flags: str, asked: PlanRequest) -> PlanRequest:
    words = flags.split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        field = flag.removeprefix("--").replace("-", "_")
        asked = replace(asked, **{field: parse_memory(value) if field == "memory" else int(value)})
    return asked


def test_refusal_carries_ledger_and_tried_suggestions() -> None:
    asked = request("max", free=512 * MIB + 536_196_352 + 45 * MIB)
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(asked)
    error = caught.value
    assert error.ledger is not None and error.ledger.headroom_bytes < 0
    assert "one request of 4,096 tokens takes" in str(error) and "Settings that would fit" in str(error)
    flags = [n.split()[0] for n in error.nearest]
    assert flags == ["--max-model-len", "--max-num-seqs", "--memory"] or "--max-num-batched-tokens" in flags
    for suggestion in error.nearest:
        check(make_plan(apply(suggestion, asked)), apply(suggestion, asked))


def test_suggested_settings_are_the_nearest() -> None:
    asked = request("max", free=512 * MIB + 536_196_352 + 45 * MIB)
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(asked)
    by_flag = {n.split()[0]: int(n.split()[1].removesuffix("MiB")) for n in caught.value.nearest}
    with pytest.raises(MemoryBudgetError):
        make_plan(replace(asked, max_model_len=by_flag["--max-model-len"] + 16))
    with pytest.raises(MemoryBudgetError):
        make_plan(replace(asked, memory=MemoryRequest("bytes", num_bytes=(by_flag["--memory"] - 1) * MIB)))


def test_more_than_there_is_suggests_what_starts() -> None:
    asked = request("40GiB")
    with pytest.raises(MemoryBudgetError, match="more than there is") as caught:
        make_plan(asked)
    assert caught.value.nearest == ("--memory max", "--memory 7980MiB")
    for suggestion in caught.value.nearest:
        make_plan(apply(suggestion, asked))


def test_nothing_fits_on_a_device_smaller_than_the_weights() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(request(free=600 * MIB))
    assert caught.value.nearest == ("--memory 840MiB",) or all("--memory" in n for n in caught.value.nearest)
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(request(free=520 * MIB, reserve_given=True))
    assert caught.value.nearest == ()


def test_loading_is_compared_with_the_cap_on_its_own() -> None:
    spec = DEMO
    print_free = 512 * MIB + 536_196_352 + 200 * MIB
    asked = request(free=print_free, spec=spec)
    make_plan(asked)
    greedy = replace(asked, footprint=replace(asked.footprint, load_transient_bytes=300 * MIB))
    with pytest.raises(MemoryBudgetError, match="loading the model takes"):
        make_plan(greedy)
    modest = replace(asked, footprint=replace(asked.footprint, load_transient_bytes=150 * MIB))
    assert make_plan(modest).kv_blocks == make_plan(asked).kv_blocks


@settings(max_examples=60, deadline=None)
@given(
    free=st.integers(300 * MIB, 6 * GIB),
    ours=st.integers(0, GIB),
    weights=st.integers(1, 2 * GIB),
    per_token=st.integers(0, 200_000),
    seqs=st.integers(1, 64),
    tokens=st.integers(64, 4096),
    length=st.one_of(st.just("auto"), st.integers(2, 32768)),
    memory=st.sampled_from(["max", "enough", "50%", "1GiB", "2000MiB", "3.5GiB"]),
    reserve_given=st.booleans(),
)
def test_any_request_plans_or_suggests_what_plans(
    free: int, ours: int, weights: int, per_token: int, seqs: int, tokens: int, length: object, memory: str, reserve_given: bool
) -> None:
    footprint = Footprint(
        fixed=fixed_lines(context_bytes=ours, weight_bytes=weights),
        lines_for=lambda limits: [
            LedgerLine("workspace", "w", per_token * limits.max_num_tokens, "computed"),
            LedgerLine("buffers", "b", limits.max_num_seqs * limits.max_model_len * 4, "computed"),
        ],
    )
    asked = request(memory, footprint=footprint, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length)
    asked = replace(asked, reading=reading(free, ours), reserve_given=reserve_given)
    try:
        check(make_plan(asked), asked)
    except MemoryBudgetError as error:
        assert error.ledger is not None
        for suggestion in error.nearest:
            changed = apply(suggestion, asked)
            check(make_plan(changed), changed)


# --- settling


def test_settling_moves_blocks_under_max_and_the_cap_under_enough() -> None:
    plan = make_plan(request())
    held = plan.ledger.without("kv_cache").held_bytes
    tighter = plan.settle(held + 100 * MIB)
    assert tighter.cap_bytes == plan.cap_bytes
    assert 99 * MIB < plan.kv_bytes - tighter.kv_bytes < 101 * MIB
    assert plan.settle(held - 10 * MIB).kv_bytes > plan.kv_bytes
    assert all(a <= b for a, b in zip(plan.settle(0).kv_blocks, plan.max_blocks, strict=True))

    enough = make_plan(request("enough"))
    settled = enough.settle(held + 100 * MIB)
    assert settled.kv_blocks == enough.kv_blocks
    assert settled.cap_bytes == held + 100 * MIB + enough.kv_bytes
    squeezed = enough.settle(enough.ceiling_bytes - 80 * MIB)
    assert squeezed.kv_blocks < enough.kv_blocks and squeezed.cap_bytes <= enough.ceiling_bytes
    with pytest.raises(MemoryBudgetError, match="Measured"):
        enough.settle(enough.ceiling_bytes - MIB)


@settings(max_examples=50, deadline=None)
@given(held=st.integers(0, 9 * GIB), memory=st.sampled_from(["max", "enough", "50%", "4GiB"]))
def test_settled_plans_keep_the_ceiling(held: int, memory: str) -> None:
    plan = make_plan(request(memory))
    assume(held + plan.split.bytes_for(plan.min_blocks) <= plan.ceiling_bytes)
    settled = plan.settle(held)
    assert held + settled.kv_bytes <= settled.cap_bytes <= settled.ceiling_bytes
    assert settled.full_length_requests >= 1


@pytest.mark.parametrize("drift", [-2 * MIB, 0, 2 * MIB])
def test_suggestions_still_start_where_the_next_reading_differs_a_little(drift: int) -> None:
    def at(context_bytes: int, memory: str, noise_bytes: int) -> PlanRequest:
        footprint = spec_footprint(DEMO, context_bytes=context_bytes, element_bytes=2, block_size=16)
        return replace(request(memory), footprint=footprint, noise_bytes=noise_bytes)

    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(at(300 * MIB, "850MiB", 2 * MIB))
    assert caught.value.nearest
    for flags in caught.value.nearest:
        make_plan(apply(flags, at(300 * MIB + drift, "850MiB", 0)))
