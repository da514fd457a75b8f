"""Device profiles: what is shipped, what a file may say, and the platform that stands for a device that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from brim.errors import ConfigError
from brim.platforms.fake import FakeDevice, FakePlatform
from brim.platforms.profile import (
    DEFAULTS,
    StartCosts,
    calibrated_folder,
    find_profile,
    known_profiles,
    profile_of,
    read_profile,
    usual_costs,
)
from brim.platforms.profile_platform import allocator_bytes, live_platform, profile_platform
from brim.units import GIB, MIB

SHIPPED = {"h100-80g", "h200-141g", "a100-40g", "a100-80g", "l40s-48g", "rtx4090-24g", "mi300x", "b60", "gb200", "host"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_CACHE_DIR", str(tmp_path / "cache"))


def test_every_shipped_profile_is_read_and_says_where_its_figures_come_from() -> None:
    found = {profile.name: profile for profile in known_profiles()}
    assert set(found) == SHIPPED
    for profile in found.values():
        assert profile.dtypes and profile.description
        for name, figure in profile.figures.items():
            assert name in DEFAULTS and figure.source
    assert found["h100-80g"].is_measured and not found["h200-141g"].is_measured
    assert all("not measured" in p.description or "nothing measured" in p.description or p.is_measured for p in found.values())


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    for profile in known_profiles():
        path = tmp_path / "one.toml"
        path.write_text(profile.to_toml())
        assert read_profile(path) == profile


def test_names_files_and_hosts_of_a_size(tmp_path: Path) -> None:
    assert find_profile("h100-80g").costs.of("total_bytes") == 85_017_493_504
    host = find_profile("cpu:16GiB")
    assert host.host_memory and host.costs.of("total_bytes") == 16 * GIB
    assert host.costs.figure("total_bytes").known_by == "computed"
    path = tmp_path / "mine.toml"
    path.write_text(find_profile("a100-40g").to_toml().replace('"a100-40g"', '"mine"'))
    assert find_profile(str(path)).name == "mine"


def test_an_unknown_device_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"a100-40g.*h100-80g.*--calibrate"):
        find_profile("h100")
    with pytest.raises(ConfigError, match="cpu:lots"):
        find_profile("cpu:lots")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[figures.total_bytes]", "[figures.total]", "'total' is no figure"),
        ("value = 85017493504", 'value = "80 GB"', "not a whole number"),
        ('known_by = "measured"', 'known_by = "guessed"', "'guessed'"),
        ("host_memory = false\n", "", "host_memory"),
        ("name =", "name", "not valid TOML"),
    ],
)
def test_a_file_that_is_wrong_says_what(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(find_profile("h100-80g").to_toml().replace(old, new))
    with pytest.raises(ConfigError, match=said):
        read_profile(path)


def test_a_calibrated_profile_is_found_before_a_shipped_one() -> None:
    calibrated_folder().mkdir(parents=True)
    text = find_profile("h100-80g").to_toml().replace("value = 616562688", "value = 1000000000")
    (calibrated_folder() / "h100-80g.toml").write_text(text)
    profile = profile_of("NVIDIA H100 80GB HBM3")
    assert profile is not None and profile.costs.of("context_bytes") == 1_000_000_000
    assert find_profile("h100-80g").costs.of("context_bytes") == 1_000_000_000
    assert profile_of("a device nobody knows") is None


def test_graphs_of_the_h100_are_never_below_what_was_measured_there() -> None:
    costs = find_profile("h100-80g").costs
    measured = {(35, 396, 32): 88, (27, 348, 28): 66, (0, 348, 28): 44, (39, 0, 28): 30, (27, 0, 28): 20}
    for (whole, pieces, layers), mib in measured.items():
        assert mib * MIB <= costs.graph_bytes(whole, pieces, layers) <= (mib + 10) * MIB
    assert costs.graph_bytes(0, 0, 28) == 0


def test_a_device_without_a_profile_has_the_usual_costs() -> None:
    assert usual_costs(host_memory=False) == StartCosts()
    assert usual_costs(host_memory=True).of("graph_fixed_bytes") == 0


def test_the_reading_of_an_h100_is_what_a_start_read_there() -> None:
    """The two open phases of the record: 800 and 782 MiB held with the kernels' scratch of 2.6 and 2.4 MiB."""
    profile = find_profile("h100-80g")
    eight_b, small = ([1_081_344, 33_792, 8192, 32_768, 524_288, 524_288, 32_768, 32_768, 1024, 513_024],
                      [540_672, 16_896, 8192, 38_912, 622_592, 622_592, 38_912, 38_912, 1024, 607_744])  # fmt: skip
    assert profile_platform(profile, eight_b).reading().ours_bytes == 800 * MIB
    assert profile_platform(profile, small).reading().ours_bytes == 782 * MIB
    now = profile_platform(profile, eight_b).reading()
    assert now.reachable_bytes - 256 * MIB == 84_739_817_472, "the cap of that start"


def test_segments_of_the_allocator() -> None:
    assert allocator_bytes([]) == 0
    assert allocator_bytes([MIB // 2, MIB // 2]) == 2 * MIB
    assert allocator_bytes([MIB + 1]) == 20 * MIB
    assert allocator_bytes([11 * MIB]) == 12 * MIB


def test_a_neighbour_takes_from_what_is_free() -> None:
    alone = profile_platform(find_profile("a100-40g"))
    beside = alone.beside(10 * GIB)
    assert beside.reading().free_bytes == alone.reading().free_bytes - 10 * GIB
    assert beside.reading().others_bytes == alone.reading().others_bytes + 10 * GIB
    with pytest.raises(ConfigError, match="free"):
        alone.beside(100 * GIB)


def test_a_host_too_small_for_the_runtime_is_refused() -> None:
    with pytest.raises(ConfigError, match="before anything is loaded"):
        profile_platform(find_profile("cpu:100MiB"))


def test_a_live_device_is_read_once() -> None:
    fake = FakePlatform(FakeDevice())
    planned = live_platform(fake)
    fake.device.take("model", 4 * GIB)
    assert planned.reading().ours_bytes == 300 * MIB
    assert planned.capabilities == fake.capabilities
