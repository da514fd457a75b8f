"""Steps captured once and replayed: device graphs, or a native backend's recorded programs. Owns capturing, keys and replay."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from brim.models.base import Model, Segment, StepTensors


class Replayable(Protocol):
    """Captured device work."""

    def replay(self) -> None:
        """Queue it; values are read from its buffers then."""


Capture = Callable[[], AbstractContextManager[Replayable]]
Progress = Callable[[str, float], None]


class MixedProgram(Protocol):
    """The forward pass of any step of at most so many tokens."""

    @property
    def is_whole(self) -> bool:
        """Captured with padded sequences, attention included."""

    def run(self, step: StepTensors) -> None:
        """Queue the forward pass of this step."""


@dataclass(frozen=True, slots=True)
class WholeProgram:
    """The forward pass as one graph."""

    graph: Replayable

    @property
    def is_whole(self) -> bool:
        """Yes."""
        return True

    def run(self, step: StepTensors) -> None:
        """Replay; what the graph reads was put into the static buffers."""
        self.graph.replay()


@dataclass(frozen=True, slots=True)
class PiecewiseProgram:
    """Graphs of the dense segments; attention runs call by call with the step's own bounds."""

    pieces: tuple[Replayable | Segment, ...]

    @property
    def is_whole(self) -> bool:
        """No: attention is not captured."""
        return False

    def run(self, step: StepTensors) -> None:
        """Graphs and attention calls in order."""
        for piece in self.pieces:
            if isinstance(piece, Segment):
                piece.run(step)
            else:
                piece.replay()


class StepPrograms:
    """Programs by size. Empty where the graph mode is NONE: steps then run call by call."""

    def __init__(self) -> None:
        self._decode: dict[tuple[int, bool], Replayable] = {}
        self._decode_sizes: list[int] = []
        self._mixed: dict[int, MixedProgram] = {}
        self._mixed_sizes: list[int] = []

    def __len__(self) -> int:
        return len(self._decode) + len(self._mixed)

    @property
    def num_decode(self) -> int:
        """Captured decode steps."""
        return len(self._decode)

    def record_decode(
        self, capture: Capture, sizes: Iterable[int], greedy_kinds: tuple[bool, ...], body: Callable[[int, bool], None]
    ) -> Iterator[int]:
        """Capture body(num_seqs, all_greedy) for each size, largest first; yields each size when it is done."""
        for num_seqs in sorted(sizes, reverse=True):
            for all_greedy in greedy_kinds:
                with capture() as program:
                    body(num_seqs, all_greedy)
                self._decode[num_seqs, all_greedy] = program
            self._decode_sizes.insert(0, num_seqs)
            yield num_seqs

    def record_whole(self, capture: Capture, num_tokens: int, model: Model, step: StepTensors) -> None:
        """Capture the forward pass of a step of num_tokens tokens."""
        with capture() as graph:
            model.forward(step)
        self._add_mixed(num_tokens, WholeProgram(graph))

    def record_pieces(self, capture: Capture, num_tokens: int, model: Model, step: StepTensors) -> None:
        """Capture the dense segments of a step of num_tokens tokens."""
        pieces: list[Replayable | Segment] = []
        for segment in model.segments:
            if segment.is_attention:
                pieces.append(segment)
                continue
            with capture() as graph:
                segment.run(step)
            pieces.append(graph)
        self._add_mixed(num_tokens, PiecewiseProgram(tuple(pieces)))

    def _add_mixed(self, num_tokens: int, program: MixedProgram) -> None:
        self._mixed[num_tokens] = program
        self._mixed_sizes = sorted(self._mixed)

    def decode(self, num_seqs: int, all_greedy: bool) -> tuple[int, Replayable] | None:
        """The smallest captured decode step that holds num_seqs, and its size. One for any sampling serves greedy rows too."""
        place = bisect_left(self._decode_sizes, num_seqs)
        if place == len(self._decode_sizes):
            return None
        size = self._decode_sizes[place]
        program = self._decode.get((size, all_greedy)) or self._decode.get((size, False))
        return None if program is None else (size, program)

    def mixed(self, num_tokens: int) -> tuple[int, MixedProgram] | None:
        """The smallest captured forward pass that holds num_tokens, and its size."""
        place = bisect_left(self._mixed_sizes, num_tokens)
        if place == len(self._mixed_sizes):
            return None
        size = self._mixed_sizes[place]
        return size, self._mixed[size]

    def clear(self) -> None:
        """Forget all programs (their addresses are about to go)."""
        self._decode.clear()
        self._decode_sizes.clear()
        self._mixed.clear()
        self._mixed_sizes.clear()
