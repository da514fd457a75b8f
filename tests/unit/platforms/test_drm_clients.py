"""The kernel's account of this process, in the forms that drivers write it."""

from __future__ import annotations

from pathlib import Path

from brim.platforms.drm_clients import DrmClients
from brim.units import MIB

XE = """pos:\t0
flags:\t0100002
drm-driver:\txe
drm-client-id:\t{client}
drm-pdev:\t{device}
drm-total-system:\t0
drm-resident-system:\t0
drm-total-gtt:\t192 KiB
drm-resident-gtt:\t192 KiB
drm-total-vram0:\t{total} KiB
drm-shared-vram0:\t16 MiB
drm-resident-vram0:\t{resident} KiB
"""
I915 = "drm-driver: i915\ndrm-client-id: 7\ndrm-pdev: 0000:04:00.0\ndrm-total-local0: 3 MiB\n"
NO_MEMORY = "drm-driver: nvidia-drm\ndrm-client-id: 1\ndrm-pdev: 0000:01:00.0\n"
CARD = "0000:03:00.0"


def root_with(root: Path, files: dict[int, tuple[str, str]]) -> Path:
    """Open files by number: where they lead, and what the kernel says of them."""
    for name in ("fd", "fdinfo"):
        (root / "proc/self" / name).mkdir(parents=True)
    for number, (target, text) in files.items():
        (root / f"proc/self/fd/{number}").symlink_to(target)
        (root / f"proc/self/fdinfo/{number}").write_text(text)
    return root


def test_a_client_counts_once_and_clients_of_a_device_add_up(tmp_path: Path) -> None:
    first = XE.format(client=3, device=CARD, total=23992, resident=23992)
    second = XE.format(client=4, device=CARD, total=1024, resident=1024)
    files = {5: ("/dev/dri/renderD128", first), 6: ("/dev/dri/renderD128", first), 9: ("/dev/dri/card0", second)}
    assert DrmClients(root_with(tmp_path, files)).held_bytes() == {CARD: (23992 + 1024) << 10}


def test_resident_memory_counts_and_allocated_where_only_that_is_shown(tmp_path: Path) -> None:
    evicted = XE.format(client=3, device=CARD, total=4096, resident=1024)
    files = {5: ("/dev/dri/renderD128", evicted), 6: ("/dev/dri/renderD129", I915)}
    assert DrmClients(root_with(tmp_path, files)).held_bytes() == {CARD: MIB, "0000:04:00.0": 3 * MIB}


def test_other_files_and_drivers_without_an_account_are_left_out(tmp_path: Path) -> None:
    text = XE.format(client=3, device=CARD, total=1, resident=1)
    files = {1: ("/tmp/file", text), 2: ("socket:[77]", text), 3: ("/dev/dri/renderD130", NO_MEMORY)}
    assert DrmClients(root_with(tmp_path, files)).held_bytes() == {}


def test_no_proc_is_no_account(tmp_path: Path) -> None:
    assert DrmClients(tmp_path / "nowhere").held_bytes() == {}


def test_the_real_proc_can_be_read() -> None:
    assert all(num_bytes >= 0 for num_bytes in DrmClients().held_bytes().values())
