"""Phases measured on a scripted device, and what people and machines read of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from brim.errors import OutOfDeviceMemory
from brim.memory.certificate import Certificate, compare, low_water_bytes
from brim.memory.ledger import Ledger
from brim.memory.planner import make_plan
from brim.memory.profiling import Profiler
from brim.memory.report import WIDTH, format_ledger, format_start, report_json
from brim.platforms.fake import FakeDevice, FakePlatform
from brim.units import GIB, MIB

from .test_planner import request


def start() -> tuple[FakePlatform, Profiler]:
    """open, load with a transient while a neighbour comes, prove."""
    platform = FakePlatform(FakeDevice(total_bytes=16 * GIB, ours={"context": 300 * MIB}))
    profiler = Profiler(platform)
    with profiler.phase("load", rest="context", owner="loader") as scope:
        platform.take("weights", 512 * MIB)
        platform.take("reader", 100 * MIB)
        platform.take("reader", -90 * MIB)
        platform.device.neighbours["game"] = 3 * GIB
        scope.add("weights", "model", 512 * MIB)
    with profiler.phase("prove"):
        platform.take("step", 7 * MIB)
        platform.take("step", -7 * MIB)
        platform.device.neighbours.clear()
    return platform, profiler


def test_a_phase_charges_us_for_ours_only() -> None:
    _, profiler = start()
    load, prove = profiler.records
    assert load.change.ours_bytes == 522 * MIB and load.change.neighbours_bytes == 3 * GIB
    assert [(x.category, x.num_bytes, x.known_by) for x in load.lines] == [
        ("weights", 512 * MIB, "computed"),
        ("context", 10 * MIB, "measured"),
    ]
    assert load.peak_ours_bytes == 912 * MIB and load.transient_bytes == 90 * MIB
    assert prove.lines == () and prove.transient_bytes == 7 * MIB and prove.change.neighbours_bytes == -3 * GIB
    assert profiler.peak_ours_bytes == 912 * MIB
    assert sum(x.num_bytes for x in profiler.lines) == 522 * MIB


def test_the_rest_by_untrusted_readings_is_no_more_than_predicted() -> None:
    platform = FakePlatform(FakeDevice(), lie=lambda r: replace(r, trusted=False, reason="own account"))
    profiler = Profiler(platform)
    with profiler.phase("load", "context", "runtime") as scope:
        platform.take("weights", 3 * MIB)
        scope.add("weights", "model", MIB)
    assert [(x.owner, x.num_bytes, x.known_by) for x in profiler.lines] == [
        ("model", MIB, "computed"),
        ("runtime", 2 * MIB, "predicted"),
    ]


def test_what_a_phase_gives_back_lowers_what_earlier_phases_took() -> None:
    platform = FakePlatform(FakeDevice())
    profiler = Profiler(platform)
    with profiler.phase("load", "context", "runtime"):
        platform.take("segment", 17 * MIB)
    with profiler.phase("warm", "activations", "libraries") as scope:
        platform.take("kernels", 4 * MIB)
        scope.add("buffers", "inputs", 6 * MIB)
    with profiler.phase("measure", "activations", "left by steps"):
        platform.take("kernels", -3 * MIB)
    assert [(x.owner, x.num_bytes) for x in profiler.lines] == [("runtime", 12 * MIB), ("inputs", 6 * MIB)]
    assert sum(x.num_bytes for x in profiler.lines) == 18 * MIB


def test_more_given_back_than_was_ever_taken_is_shown() -> None:
    platform = FakePlatform(FakeDevice())
    profiler = Profiler(platform)
    with profiler.phase("load", "context", "runtime"):
        platform.take("context", -MIB)
    assert [(x.owner, x.num_bytes) for x in profiler.lines] == [("runtime", -MIB)]


def test_a_failed_phase_leaves_no_record() -> None:
    platform = FakePlatform(FakeDevice(total_bytes=GIB))
    profiler = Profiler(platform)
    with pytest.raises(OutOfDeviceMemory), profiler.phase("load"):
        platform.take("weights", 2 * GIB)
    assert profiler.records == []


def test_reports_fit_80_columns_and_add_up() -> None:
    _, profiler = start()
    for memory in ("max", "enough"):
        plan = make_plan(request(memory))
        ledger = plan.ledger.with_line("unattributed", "a" * 90, -5 * MIB, "measured")
        text = format_start(plan, ledger, profiler.records)
        assert max(len(row) for row in text.splitlines()) <= WIDTH
        assert "KV cache" in text and "16 full-length requests of 4,096 tokens at once" in text
        assert "weights" in text and "511.36 MiB" in text and "load" in text
    over = Ledger(MIB, GIB).with_line("weights", "model", 2 * MIB, "computed")
    assert "OVER THE CAP" in format_ledger(over)


def test_json_carries_the_same_numbers() -> None:
    _, profiler = start()
    plan = make_plan(request("enough"))
    report = json.loads(json.dumps(report_json(plan, plan.ledger, profiler.records)))
    assert report["cap_bytes"] == plan.cap_bytes
    assert sum(x["bytes"] for x in report["ledger"] if x["category"] not in ("other_processes", "reserve")) == plan.cap_bytes
    assert report["kv"]["tokens"] == 65_536 and report["kv"]["groups"][1]["blocks"] == 576
    assert [p["name"] for p in report["phases"]] == ["load", "prove"]


def test_certificate_is_written_whole(tmp_path: Path) -> None:
    platform, profiler = start()
    plan = make_plan(request("enough"))
    measured = plan.ledger.without("context").with_line("context", "runtime", 310 * MIB, "measured")
    low = low_water_bytes(profiler.records)
    assert low == 16 * GIB - 822 * MIB - 7 * MIB
    certificate = Certificate(
        plan=plan,
        outcome=replace(plan, kv_blocks=(4096, 576)),
        ledger=measured,
        phases=tuple(profiler.records),
        peak_ours_bytes=profiler.peak_ours_bytes,
        low_water_bytes=low,
        settings={"max_num_seqs": 16, "memory": plan.budget.request},
        sources={"max_num_seqs": "flag"},
        device=platform.describe(),
        versions={"brim": "0"},
    )
    path = certificate.write(tmp_path / "new" / "folder", "demo")
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.name.startswith("demo-")
    data = json.loads(path.read_text())
    assert (data["planned"]["kv"]["tokens"], data["kv"]["tokens"]) == (65_536, 65_520)
    assert data["holds"] is True and data["low_water_bytes"] == low
    assert data["settings"]["max_num_seqs"] == {"value": 16, "source": "flag"}
    context = next(x for x in data["predicted_and_measured"] if x["category"] == "context")
    assert context["difference_bytes"] == 10 * MIB
    assert {c.category for c in compare(plan.ledger, measured)} == {"context", "weights", "buffers", "workspace", "kv_cache"}
