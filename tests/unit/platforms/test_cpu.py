"""The CPU platform over scripted /proc and /sys trees, and once over the real ones."""

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brim.errors import OutOfDeviceMemory
from brim.platforms.base import MemoryReading
from brim.platforms.cpu import CpuPlatform
from brim.platforms.procfs import ProcFiles
from brim.units import GIB, MIB

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "36 32 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
HYBRID_MOUNTS = V1_MOUNT + "42 32 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
UNLIMITED_V1 = "9223372036854771712\n"

Tree = Callable[[dict[str, str | None]], Path]


def meminfo(total: int = 64 * GIB, available: int | None = 48 * GIB) -> str:
    lines = [f"MemTotal: {total // 1024} kB", "MemFree:  1024 kB", "Cached: 2097152 kB", "Buffers: 1024 kB", "Shmem: 1048576 kB"]
    if available is not None:
        lines.append(f"MemAvailable: {available // 1024} kB")
    return "\n".join([*lines, "HugePages_Total: 0"]) + "\n"


def status(rss: int = GIB, peak: int = 2 * GIB) -> str:
    sizes = {"VmHWM": peak, "VmRSS": rss, "VmSize": 8 * GIB, "VmData": 2 * GIB}
    return "Name:\tpython\n" + "".join(f"{name}:\t{size // 1024} kB\n" for name, size in sizes.items())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes a machine of 64 GiB, 48 available, 1 held, with the given files added; None leaves a file out."""

    def build(files: dict[str, str | None]) -> Path:
        base: dict[str, str | None] = {
            "proc/meminfo": meminfo(),
            "proc/self/status": status(),
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/clear_refs": "",
            "proc/self/maps": "",
        }
        for name, text in (base | files).items():
            if text is not None:
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        return tmp_path

    return build


def read(root: Path, **limits: int) -> MemoryReading:
    return CpuPlatform(root, rlimit=limits.get).reading()


def test_bare_machine(tree: Tree) -> None:
    now = read(tree({}))
    assert now == MemoryReading(
        total_bytes=64 * GIB,
        free_bytes=48 * GIB,
        ours_bytes=GIB,
        others_bytes=15 * GIB,
        limit_source="installed memory",
    )
    assert now.reachable_bytes == 49 * GIB


def test_container_limit_counts_not_the_host(tree: Tree) -> None:
    now = read(
        tree(
            {
                "proc/meminfo": meminfo(692 * GIB, 600 * GIB),
                "sys/fs/cgroup/memory.max": f"{150 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{40 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {30 * GIB}\nactive_file 7\n",
            }
        )
    )
    assert now.total_bytes == 150 * GIB and now.limit_source == "cgroup limit /sys/fs/cgroup/memory.max"
    assert now.free_bytes == 140 * GIB, "page cache is not used memory"
    assert now.others_bytes == 9 * GIB and now.trusted


def test_the_least_of_nested_limits_binds(tree: Tree) -> None:
    files: dict[str, str | None] = {"proc/self/cgroup": "0::/pod/box\n"}
    for path, limit, used in (("pod/box", "max", 2), ("pod", str(10 * GIB), 8), ("", str(20 * GIB), 19)):
        files[f"sys/fs/cgroup/{path}/memory.max"] = limit
        files[f"sys/fs/cgroup/{path}/memory.current"] = str(used * GIB)
    now = read(tree(files))
    assert now.total_bytes == 10 * GIB and now.limit_source.endswith("/pod/memory.max")
    assert now.free_bytes == GIB, "the outer group is nearly full"


def test_high_is_a_limit_too(tree: Tree) -> None:
    now = read(
        tree(
            {
                "sys/fs/cgroup/memory.max": str(10 * GIB),
                "sys/fs/cgroup/memory.high": str(6 * GIB),
                "sys/fs/cgroup/memory.current": str(2 * GIB),
            }
        )
    )
    assert (now.total_bytes, now.free_bytes) == (6 * GIB, 4 * GIB)
    assert now.limit_source.endswith("memory.high")


def test_version_one(tree: Tree) -> None:
    now = read(
        tree(
            {
                "proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/docker/abc\n",
                "proc/self/mountinfo": V1_MOUNT,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": str(8 * GIB),
                "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": str(5 * GIB),
                "sys/fs/cgroup/memory/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}\n",
            }
        )
    )
    assert (now.total_bytes, now.free_bytes) == (8 * GIB, 5 * GIB)


def test_version_one_mounted_from_inside_a_container(tree: Tree) -> None:
    mount = "36 32 0:33 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    now = read(
        tree(
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n",
                "proc/self/mountinfo": mount,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(8 * GIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
            }
        )
    )
    assert (now.total_bytes, now.free_bytes) == (8 * GIB, 5 * GIB)


def test_hybrid_reads_both(tree: Tree) -> None:
    now = read(
        tree(
            {
                "proc/self/cgroup": "4:memory:/a\n0::/b\n",
                "proc/self/mountinfo": HYBRID_MOUNTS,
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(8 * GIB),
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(1 * GIB),
                "sys/fs/cgroup/unified/b/memory.max": str(7 * GIB),
                "sys/fs/cgroup/unified/b/memory.current": str(6 * GIB),
            }
        )
    )
    assert (now.total_bytes, now.free_bytes) == (7 * GIB, GIB)


def test_namespace_that_hides_our_path(tree: Tree) -> None:
    now = read(
        tree(
            {
                "proc/self/cgroup": "0::/../../elsewhere\n",
                "sys/fs/cgroup/memory.max": str(9 * GIB),
                "sys/fs/cgroup/memory.current": "0",
            }
        )
    )
    assert now.total_bytes == 9 * GIB


def test_no_mountinfo_uses_the_usual_places(tree: Tree) -> None:
    files = {"proc/self/mountinfo": None, "sys/fs/cgroup/memory.max": str(9 * GIB), "sys/fs/cgroup/memory.current": "0"}
    assert read(tree(files)).total_bytes == 9 * GIB


def test_no_limits_anywhere(tree: Tree) -> None:
    for text in ("max\n", "-1", UNLIMITED_V1):
        assert read(tree({"sys/fs/cgroup/memory.max": text})).limit_source == "installed memory"


@pytest.mark.parametrize("text", ["", "banana", "-7", "0", "12 34"])
def test_nonsense_limits_are_reported_and_not_used(tree: Tree, text: str) -> None:
    now = read(tree({"sys/fs/cgroup/memory.max": text}))
    assert now.total_bytes == 64 * GIB and not now.trusted
    assert "/sys/fs/cgroup/memory.max says" in now.reason


def test_limit_without_usage_is_reported(tree: Tree) -> None:
    now = read(tree({"sys/fs/cgroup/memory.max": str(4 * GIB)}))
    assert (now.total_bytes, now.free_bytes, now.trusted) == (4 * GIB, 3 * GIB, False)


def test_over_the_limit_is_nothing_free(tree: Tree) -> None:
    now = read(tree({"sys/fs/cgroup/memory.max": str(GIB), "sys/fs/cgroup/memory.current": str(3 * GIB)}))
    assert now.free_bytes == 0 and now.others_bytes == 0


def test_old_kernel_without_available(tree: Tree) -> None:
    now = read(tree({"proc/meminfo": meminfo(available=None)}))
    assert now.free_bytes == MIB + 2 * GIB + MIB - GIB
    assert not now.trusted and "MemAvailable" in now.reason


def test_more_free_than_there_is_is_not_believed(tree: Tree) -> None:
    now = read(tree({"proc/meminfo": meminfo(8 * GIB, 90 * GIB)}))
    assert now.free_bytes == 7 * GIB and not now.trusted


def test_no_proc_at_all_falls_back(tmp_path: Path) -> None:
    platform = CpuPlatform(tmp_path, rlimit=lambda name: None)
    now = platform.reading()
    assert now.trusted and 0 < now.ours_bytes < now.total_bytes and 0 < now.free_bytes <= now.total_bytes
    platform.reset_peak()
    assert platform.peak_ours_bytes() >= now.ours_bytes // 2
    assert platform.describe()["device"] == "unknown"


def test_process_limits(tree: Tree) -> None:
    maps = "7f0000000000-7f0040000000 ---p 00000000 00:00 0\n7f0040000000-7f0080000000 rw-p 00000000 00:00 0\n"
    root = tree({"proc/self/maps": maps})
    now = read(root, RLIMIT_AS=12 * GIB)
    assert now.total_bytes == 12 * GIB and now.limit_source == "process limit RLIMIT_AS"
    assert now.free_bytes == 5 * GIB, "8 mapped, of which 1 is only reserved"
    assert read(root, RLIMIT_DATA=3 * GIB).free_bytes == GIB


def test_peak_is_reset_or_else_sampled(tree: Tree) -> None:
    root = tree({})
    platform = CpuPlatform(root, rlimit=lambda name: None)
    assert platform.peak_ours_bytes() == 2 * GIB
    platform.reset_peak()  # this kernel leaves VmHWM at 2 GiB
    assert (root / "proc/self/clear_refs").read_text() == "5"
    assert platform.peak_ours_bytes() == GIB
    (root / "proc/self/status").write_text(status(rss=GIB + 300 * MIB))
    platform.reading()
    (root / "proc/self/status").write_text(status(rss=GIB))
    assert platform.peak_ours_bytes() == GIB + 300 * MIB
    (root / "proc/self/status").write_text(status(rss=GIB, peak=3 * GIB))
    assert platform.peak_ours_bytes() == 3 * GIB


def test_cap_and_room(tree: Tree) -> None:
    platform = CpuPlatform(tree({}), rlimit=lambda name: None)
    platform.account(47 * GIB)
    platform.account(-47 * GIB)
    with pytest.raises(OutOfDeviceMemory, match="installed memory leaves 48"):
        platform.account(49 * GIB)
    platform.set_cap(3 * GIB)
    platform.account(2 * GIB)
    with pytest.raises(OutOfDeviceMemory, match="cap of 3"):
        platform.account(2 * GIB + 1)
    assert platform.arena_bytes == 2 * GIB
    assert platform.pressure_bytes(reserve_bytes=GIB) == -2 * GIB
    assert platform.pressure_bytes(reserve_bytes=50 * GIB) == 2 * GIB


def test_defaults(tree: Tree) -> None:
    limits = CpuPlatform(tree({}), rlimit=lambda name: None).default_limits()
    assert (limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len_cap) == (16, 256, 4096)
    assert limits.memory == "enough" and limits.reserve_bytes == 48 * GIB // 20
    small = CpuPlatform(tree({"proc/meminfo": meminfo(4 * GIB, 2 * GIB)}), rlimit=lambda name: None)
    assert small.default_limits().reserve_bytes == 512 * MIB


def test_cores_and_description(tree: Tree) -> None:
    cpuinfo = "processor : 0\nmodel name : Example 9000\nflags : fpu avx2 avx512_bf16\n"
    platform = CpuPlatform(tree({"proc/cpuinfo": cpuinfo, "sys/fs/cgroup/cpu.max": "100000 100000\n"}), rlimit=lambda name: None)
    assert platform.usable_cores == 1
    assert platform.describe()["device"] == "Example 9000"
    assert platform.capabilities.dtypes[0] == "bfloat16"


FILES = [
    *("proc/meminfo", "proc/self/status", "proc/self/cgroup", "proc/self/mountinfo", "proc/cpuinfo"),
    *(f"sys/fs/cgroup/memory.{name}" for name in ("max", "high", "current", "stat")),
]
CONTENT = st.one_of(
    st.text(max_size=60),
    st.integers(-5, 1 << 65).map(str),
    st.integers(0, 1 << 40).map(lambda n: f"inactive_file {n}"),
    st.integers(0, 1 << 40).map(lambda n: f"VmRSS: {n} kB\nMemTotal: {n} kB\nMemAvailable: {2 * n} kB"),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.dictionaries(st.sampled_from(FILES), CONTENT))
def test_no_content_breaks_a_reading(tree: Tree, texts: dict[str, str]) -> None:
    platform = CpuPlatform(tree(dict(texts)), rlimit=lambda name: None)
    now = platform.reading()
    assert now.total_bytes > 0 and 0 <= now.free_bytes <= now.total_bytes and now.others_bytes >= 0
    assert platform.describe()["platform"] == "cpu"


# --- the real machine


def test_real_readings_follow_what_we_take() -> None:
    platform = CpuPlatform()
    exact = ProcFiles(Path("/")).exact_rss_bytes()
    before = platform.reading()
    assert exact is None or abs(exact - before.ours_bytes) < 8 * MIB
    platform.reset_peak()
    block = mmap.mmap(-1, 64 * MIB)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(block)), 1, 64 * MIB)
    held = platform.reading()
    block.close()
    after = platform.reading()
    assert abs(held.ours_bytes - before.ours_bytes - 64 * MIB) < 4 * MIB
    assert abs(after.ours_bytes - before.ours_bytes) < 4 * MIB
    assert held.ours_bytes - MIB <= platform.peak_ours_bytes() < before.ours_bytes + 72 * MIB
    platform.reset_peak()
    assert platform.peak_ours_bytes() < before.ours_bytes + 20 * MIB
    assert platform.release_unused() >= 0
