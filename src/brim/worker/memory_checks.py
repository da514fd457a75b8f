"""Conformance checks of memory: readings, arenas, the peak, errors and the cap. Each raises CheckFailed with what it saw."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from brim.errors import OutOfDeviceMemory
from brim.platforms.base import MemoryReading
from brim.units import GIB, MIB, format_bytes
from brim.worker.check_bench import PROBE_SHARE, Bench, CheckFailed, Figures, Found, NotSupported, NotTried

_TRIES = 4
_PAUSE_S = 0.1
_TOTAL_SLACK_BYTES = 64 * MIB
_LARGEST_PROBE_BYTES = GIB


def readings_sane(bench: Bench) -> Found:
    """One reading on its own: no sign, no sum and no size in it may be impossible."""
    now = bench.reading()
    figures: Figures = {
        "total_bytes": now.total_bytes,
        "free_bytes": now.free_bytes,
        "ours_bytes": now.ours_bytes,
        "others_bytes": now.others_bytes,
    }
    wrong = [f"{name} is {value}" for name, value in figures.items() if isinstance(value, int) and value < 0]
    slack_bytes = bench.slack_bytes(_TOTAL_SLACK_BYTES) + now.total_bytes // 50
    if now.total_bytes == 0:
        wrong.append("total_bytes is 0")
    if now.free_bytes > now.total_bytes:
        wrong.append(f"{format_bytes(now.free_bytes)} are free of {format_bytes(now.total_bytes)}")
    others_bytes = max(0, now.total_bytes - now.free_bytes - now.ours_bytes)
    if abs(now.others_bytes - others_bytes) > slack_bytes:
        wrong.append(f"others hold {format_bytes(now.others_bytes)} but total - free - ours is {format_bytes(others_bytes)}")
    for source, most_bytes in _other_totals(bench).items():
        figures[f"total_bytes_of_{source}"] = most_bytes
        if now.total_bytes > most_bytes + slack_bytes:
            wrong.append(f"total is {format_bytes(now.total_bytes)} but {source} says {format_bytes(most_bytes)}")
    if wrong:
        raise _failed_or_declared(bench, now, "; ".join(wrong), figures)
    return Found(figures, "" if now.trusted else f"untrusted by its own account: {now.reason}")


def _other_totals(bench: Bench) -> dict[str, int]:
    """What others say the device's size is; a reading may be a slice of it, never more."""
    found = {}
    described = bench.platform.describe().get("total_bytes")
    if isinstance(described, int) and described > 0:
        found["describe"] = described
    if bench.tensors_count and not bench.platform.capabilities.host_memory:
        try:
            found["torch"] = int(torch.accelerator.get_memory_info(bench.device)[1])
        except (RuntimeError, NotImplementedError):  # a device type that torch has no such call for
            return found
    return found


def readings_move(bench: Bench) -> Found:
    """Take memory and give it back: ours and free must follow, on a host free only roughly."""
    num_bytes = bench.probe_bytes()
    figures: Figures = {}
    wrong = ""
    for _ in range(_TRIES):
        figures, wrong = _move(bench, num_bytes)
        if not wrong:
            trusted = bench.platform.capabilities.trusted_readings
            return Found(figures, "" if trusted else "They follow here, although the platform does not trust them.")
        # The host's free memory moves in steps as coarse as what the kernel keeps for each core: try with more.
        more_bytes = 4 * num_bytes
        room_bytes = min(_LARGEST_PROBE_BYTES, bench.reading().free_bytes // PROBE_SHARE)
        if bench.platform.capabilities.host_memory and more_bytes <= room_bytes:
            num_bytes = more_bytes
        time.sleep(_PAUSE_S)  # a neighbour that came or went is not the platform's fault
    raise _failed_or_declared(bench, bench.reading(), wrong, figures)


def _move(bench: Bench, num_bytes: int) -> tuple[Figures, str]:
    before = bench.reading()
    with bench.taken(num_bytes):
        during = bench.reading()
    after = bench.reading()
    figures: Figures = {
        "taken_bytes": num_bytes,
        "ours_moved_bytes": during.ours_bytes - before.ours_bytes,
        "free_moved_bytes": during.free_bytes - before.free_bytes,
        "ours_kept_bytes": after.ours_bytes - before.ours_bytes,
        "free_kept_bytes": after.free_bytes - before.free_bytes,
    }
    slack_bytes = bench.slack_bytes(num_bytes)
    shared = bench.platform.capabilities.host_memory
    wrong = []
    if abs(during.ours_bytes - before.ours_bytes - num_bytes) > slack_bytes:
        wrong.append(f"ours moved by {format_bytes(during.ours_bytes - before.ours_bytes)}")
    if abs(after.ours_bytes - before.ours_bytes) > slack_bytes:
        wrong.append(f"ours stayed {format_bytes(after.ours_bytes - before.ours_bytes)} higher after giving it back")
    fell_bytes = before.free_bytes - during.free_bytes
    if fell_bytes < num_bytes // 4 if shared else abs(fell_bytes - num_bytes) > slack_bytes:
        wrong.append(f"free fell by {format_bytes(fell_bytes)}")
    if not shared and abs(after.free_bytes - before.free_bytes) > slack_bytes:
        wrong.append(f"free stayed {format_bytes(before.free_bytes - after.free_bytes)} lower after giving it back")
    return figures, f"{format_bytes(num_bytes)} were taken: {'; '.join(wrong)}" if wrong else ""


def _failed_or_declared(bench: Bench, now: MemoryReading, wrong: str, figures: Figures) -> Exception:
    """A lie that the platform owns up to is no fault of it: start-up then goes by its own account."""
    if bench.platform.capabilities.trusted_readings and now.trusted:
        return CheckFailed(wrong, figures)
    reason = now.reason or "it declares no trusted_readings"
    return NotSupported(f"The platform says that its readings are not to be trusted ({reason}): {wrong}", figures)


def arena(bench: Bench) -> Found:
    """Reserve, commit, touch, uncommit: addresses stay, contents survive growth, the account is kept and comes back."""
    platform = bench.platform
    account_before = platform.arena_bytes
    with bench.arena() as (made, blocks):
        address, block_bytes = made.address, made.block_bytes
        figures: Figures = {"reserved_bytes": made.reserved_bytes, "block_bytes": block_bytes, "committed_blocks": blocks}
        if made.growable:
            made.commit(1)
        view = bench.view(made)
        first, last = view[:block_bytes], view[(blocks - 1) * block_bytes : blocks * block_bytes]
        first.fill_(0x5A)
        started = time.perf_counter()
        made.commit(blocks)
        figures["commit_ms"] = round((time.perf_counter() - started) * 1000, 3)
        last.fill_(0xA5)
        platform.synchronize()
        _require_equal(first, 0x5A, "the first block's content changed when the arena grew")
        _require_equal(last, 0xA5, "the last committed block does not hold what was written")
        if platform.arena_bytes - account_before != made.committed_bytes:
            held = format_bytes(platform.arena_bytes - account_before)
            raise CheckFailed(f"{format_bytes(made.committed_bytes)} are committed but the account says {held}", figures)
        platform.synchronize()
        made.uncommit(1)
        _require_equal(first, 0x5A, "the first block's content changed when the arena shrank")
        made.commit(blocks)
        last.fill_(3)
        platform.synchronize()
        _require_equal(last, 3, "a block committed again does not hold what was written")
        if made.address != address:
            raise CheckFailed(f"the range moved from {address:#x} to {made.address:#x}", figures)
    if platform.arena_bytes != account_before:
        raise CheckFailed(f"{format_bytes(platform.arena_bytes - account_before)} stay in the account after close", figures)
    return Found(figures, "" if made.growable else "Static: all of it is taken at once.")


def _require_equal(block: torch.Tensor, value: int, otherwise: str) -> None:
    if not bool((block == value).all()):
        raise CheckFailed(otherwise)


def arena_readings(bench: Bench) -> Found:
    """What the device loses to an arena: nothing for a reserved range, exactly what is committed, nothing after close."""
    before = bench.reading().ours_bytes
    with bench.arena() as (made, blocks):
        later = made.growable
        reserved = bench.reading().ours_bytes - before
        made.commit(blocks)
        num_bytes = made.committed_bytes
        committed = bench.reading().ours_bytes - before
        made.uncommit(0)
        uncommitted = bench.reading().ours_bytes - before
    bench.platform.release_unused()  # a plain allocation is still in torch's cache
    closed = bench.reading().ours_bytes - before
    figures: Figures = {
        "arena_bytes": num_bytes,
        "ours_moved_by_reserve_bytes": reserved,
        "ours_moved_by_commit_bytes": committed,
        "ours_kept_after_uncommit_bytes": uncommitted,
        "ours_kept_after_close_bytes": closed,
    }
    held_bytes = 0 if later else num_bytes
    seen = {"reserving": (reserved, held_bytes), "committing": (committed, num_bytes), "uncommitting": (uncommitted, held_bytes),
            "closing": (closed, 0)}  # fmt: skip
    slack_bytes = bench.slack_bytes(num_bytes)
    wrong = [
        f"after {what} ours is {format_bytes(moved)} higher instead of {format_bytes(wanted)}"
        for what, (moved, wanted) in seen.items()
        if abs(moved - wanted) > slack_bytes
    ]
    if wrong:
        raise _failed_or_declared(bench, bench.reading(), "; ".join(wrong), figures)
    return Found(figures)


def commit_later(bench: Bench) -> Found:
    """A view taken over the whole range while one block was committed reads and writes pages committed after it."""
    capabilities = bench.platform.capabilities
    if not capabilities.reserve_commit:
        asked = bench.config.device.arena == "static"
        raise bench.without("reserve and commit", "--arena static asks to do without." if asked else "")
    with bench.arena() as (made, blocks):
        if not made.growable:
            raise CheckFailed(f"the arena '{capabilities.arena_backend}' takes everything at once")
        made.commit(1)
        view = bench.view(made)
        made.commit(blocks)
        later = view[made.block_bytes : blocks * made.block_bytes]
        later.fill_(7)
        bench.platform.synchronize()
        _require_equal(later, 7, "pages committed after the view was taken do not hold what was written through it")
        return Found({"view_bytes": view.numel(), "written_bytes": later.numel()})


def peak(bench: Bench) -> Found:
    """reset_peak, take, give back: the peak saw what was held meanwhile, and forgets it at the next reset."""
    if not bench.platform.capabilities.resettable_peak:
        raise bench.without("resettable peak")
    num_bytes = bench.probe_bytes()
    slack_bytes = bench.slack_bytes(num_bytes)
    before_bytes = bench.reading().ours_bytes
    bench.platform.reset_peak()
    with bench.taken(num_bytes):
        pass
    seen_bytes = bench.platform.peak_ours_bytes() - before_bytes
    bench.platform.reset_peak()
    left_bytes = bench.platform.peak_ours_bytes() - before_bytes
    figures: Figures = {"taken_bytes": num_bytes, "peak_moved_bytes": seen_bytes, "peak_after_reset_bytes": left_bytes}
    if abs(seen_bytes - num_bytes) > slack_bytes:
        raise CheckFailed(
            f"{format_bytes(num_bytes)} were held for a while and the peak rose by {format_bytes(seen_bytes)}", figures
        )
    if left_bytes > slack_bytes:
        raise CheckFailed(f"after reset_peak the peak is still {format_bytes(left_bytes)} higher", figures)
    return Found(figures)


def errors(bench: Bench) -> Found:
    """Out of memory becomes OutOfDeviceMemory, a bug stays a bug; where it is safe, with an allocation that cannot succeed."""
    platform = bench.platform
    made_up = platform.as_brim_error(torch.OutOfMemoryError("out of memory"))
    if not isinstance(made_up, OutOfDeviceMemory):
        raise CheckFailed(f"torch.OutOfMemoryError is taken for {type(made_up).__name__}")
    if platform.as_brim_error(ValueError("a bug")) is not None:
        raise CheckFailed("a ValueError is taken for a failure of the device")
    if platform.capabilities.over_allocation_kills or not bench.tensors_count:
        return Found({}, "Only with a made-up error: taking too much is not safe here.")
    asked_bytes = 4 * bench.reading().total_bytes
    refusal = _refusal(lambda: torch.empty(asked_bytes, dtype=torch.uint8, device=bench.device))
    if refusal is None:
        raise CheckFailed(f"{format_bytes(asked_bytes)}, four times the device, were allocated")
    _require_out_of_memory(bench, refusal)
    _require_usable(bench)
    return Found({"asked_bytes": asked_bytes}, f"{type(refusal).__name__} was understood.")


def cap(bench: Bench) -> Found:
    """A cap just above what is held: more than that is refused with OutOfDeviceMemory, less is not, and the process lives on."""
    platform = bench.platform
    num_bytes = bench.probe_bytes() // 2
    platform.set_cap(bench.reading().ours_bytes + num_bytes)
    figures: Figures = {"room_bytes": num_bytes, "asked_bytes": 2 * num_bytes}
    try:
        refusal = _refusal(lambda: platform.account(2 * num_bytes))
        if refusal is None:
            platform.account(-2 * num_bytes)
            raise CheckFailed("the account lets an arena pass the cap", figures)
        if not isinstance(refusal, OutOfDeviceMemory):
            raise CheckFailed(f"the account refuses with {type(refusal).__name__}: {refusal}", figures)
        platform.account(num_bytes // 4)
        platform.account(-(num_bytes // 4))
        if not platform.capabilities.cap_enforced:
            return Found(figures, "The account refuses; the allocator does not, as declared.")
        if not bench.tensors_count:
            return Found(figures, "The account refuses; tensors do not count here.")
        refusal = _refusal(lambda: torch.empty(2 * num_bytes, dtype=torch.uint8, device=bench.device).fill_(1))
        if refusal is None:
            raise CheckFailed(f"{format_bytes(2 * num_bytes)} were allocated with {format_bytes(num_bytes)} left", figures)
        _require_out_of_memory(bench, refusal)
        _require_usable(bench)
        return Found(figures, f"{type(refusal).__name__} was understood.")
    finally:
        platform.set_cap(platform.reading().total_bytes)


def _refusal(take: Callable[[], object]) -> Exception | None:
    """The error that `take` ends with; None where it succeeds."""
    try:
        take()
    except NotTried:
        raise
    except Exception as error:
        return error
    return None


def _require_out_of_memory(bench: Bench, error: Exception) -> None:
    known = error if isinstance(error, OutOfDeviceMemory) else bench.platform.as_brim_error(error)
    if not isinstance(known, OutOfDeviceMemory):
        taken_for = "nothing it knows" if known is None else type(known).__name__
        raise CheckFailed(f"a refused allocation ({type(error).__name__}: {str(error)[:120]}) is taken for {taken_for}")


def _require_usable(bench: Bench) -> None:
    if float(torch.ones(16, device=bench.device).sum()) != 16.0:
        raise CheckFailed("the device computes wrongly after a refused allocation")
