"""How a kernel is called. Owns the one place between the launchers and Triton, so that launches can be listed instead of run."""

from __future__ import annotations

from typing import Any, Protocol


class Launch(Protocol):
    """kernel[grid](*arguments, **options), now or never."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """One launch."""


def launch_now(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Queue the kernel on the current stream; compiled and loaded where it was not yet."""
    kernel[grid](*arguments, **options)


def depending(launch: Launch) -> Launch:
    """The same, but every kernel that can starts before the ones ahead of it end (see `dependent`)."""

    def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if "PDL" in kernel.arg_names:
            options |= {"PDL": True, "launch_pdl": True}
        launch(kernel, grid, *arguments, **options)

    return start
