"""The truth about a scripted device: who holds what, what happens when, and whether the cap was ever passed. Owns the script's
playing; what anybody is told of it is `scripted_platform`'s.

Every byte goes through `take`. Moments are the phases of a start and the steps of serving.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from brim.errors import DeviceLost, OutOfDeviceMemory
from brim.platforms.fake import FakeDevice
from brim.platforms.scenario import Consumer, DeviceScript, Fault, FaultPlace, Neighbour, Work
from brim.units import format_bytes

ARENA, ALLOCATOR = "arena", "allocator"


class ScriptedFault(Exception):
    """A fault of kind "error": what a library would raise; whoever plays that library makes it its own."""


@dataclass(slots=True)
class ScriptedDevice(FakeDevice):
    """`script`, `neighbour_events`, `consumers` and `faults` are the scenario's; `phase` and `step` say where the start is.

    needed_bytes: what everything but KV cannot do without now; most_needed_bytes: the most of it since commit.
    over_cap_bytes: the most by which this process passed the cap that was set; over_cap_steps: while serving, for how many steps.
    """

    script: DeviceScript = field(default_factory=DeviceScript)
    neighbour_events: tuple[Neighbour, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    faults: tuple[Fault, ...] = ()
    phase: str = "open"
    step: int = 0
    cap_bytes: int | None = None
    over_cap_bytes: int = 0
    over_cap_steps: int = 0
    was_over_before_serving: bool = False
    most_ours_bytes: int = 0
    live_bytes: int = 0  # what the framework's allocator was asked for and not given back
    most_needed_bytes: int = 0
    log: list[str] = field(default_factory=list)
    fault_calls: Counter[int] = field(default_factory=Counter)
    seen: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ours = {}
        self.total_bytes = self.script.total_bytes
        self.over_allocation_loses = self.script.over_allocation_loses
        if self.script.outside_bytes:
            self.neighbours["driver"] = self.script.outside_bytes
        self._play(0)

    # -- time

    def enter(self, phase: str) -> None:
        """The start has come to this phase, or to "serve"."""
        if phase == self.phase:
            return
        self.phase = phase
        self._play(0)

    def next_step(self) -> None:
        """One step of serving is over."""
        self.step += 1
        self._play(self.step)
        self.over_cap_steps += self.cap_bytes is not None and self.ours_bytes > self.cap_bytes

    def _play(self, step: int) -> None:
        for event in self.neighbour_events:
            due = event.at == self.phase and not event.step if not step else event.step == step and event.at in ("serve", "open")
            if due:
                self.move_neighbour(event.name, event.bytes)

    def move_neighbour(self, name: str, num_bytes: int) -> None:
        """Another process now holds so much; never more than there is."""
        held_bytes = self.neighbours.get(name, 0)
        self.neighbours[name] = min(num_bytes, held_bytes + max(0, self.free_bytes))

    # -- memory

    def take(self, owner: str, num_bytes: int) -> None:
        """See FakeDevice; also keeps what the run is judged by."""
        FakeDevice.take(self, owner, num_bytes)
        self.most_ours_bytes = max(self.most_ours_bytes, self.ours_bytes)
        if self.cap_bytes is not None and self.ours_bytes > self.cap_bytes:
            over_bytes = self.ours_bytes - self.cap_bytes
            self.was_over_before_serving |= self.phase != "serve"
            if over_bytes > self.over_cap_bytes:
                self.over_cap_bytes = over_bytes
                self.log.append(
                    f"{self.phase}, step {self.step}: {owner} took the process {format_bytes(over_bytes)} over the cap"
                )
        self.note_need()

    def note_need(self) -> None:
        """Called after every change: the most that is needed beside KV once it is committed."""
        if self.phase in ("commit", "committing", "prove"):
            self.most_needed_bytes = max(self.most_needed_bytes, self.needed_bytes)

    @property
    def needed_bytes(self) -> int:
        """Everything but KV and but what an allocator only keeps."""
        held = sum(num_bytes for owner, num_bytes in self.ours.items() if owner not in (ARENA, ALLOCATOR))
        return held + self.live_bytes

    @property
    def neighbours_bytes(self) -> int:
        """What other processes and the driver hold."""
        return sum(self.neighbours.values())

    # -- work

    def due(self, work: Work, rows: int) -> Iterable[tuple[Consumer, int]]:
        """Consumers that take memory at this work, and how much."""
        for consumer in self.consumers:
            if consumer.on != work or rows < consumer.least_rows:
                continue
            if consumer.only_in and self.phase not in consumer.only_in:
                continue
            if consumer.from_step and self.step < consumer.from_step:
                continue
            key = (consumer.name, rows if consumer.times == "each_size" else 0)
            if consumer.times != "each" and key in self.seen:
                continue
            self.seen.add(key)
            yield consumer, consumer.bytes + consumer.per_row_bytes * rows

    def check(self, place: FaultPlace, num_bytes: int = 0) -> None:
        """A call of this place is about to happen. Raises what the script's fault says."""
        if self.lost:
            raise DeviceLost("The scripted device was lost.")
        for index, fault in enumerate(self.faults):
            if fault.on != place or (fault.only_in and self.phase not in fault.only_in) or num_bytes < fault.above_bytes:
                continue
            self.fault_calls[index] += 1
            if not fault.at <= self.fault_calls[index] < fault.at + fault.times:
                continue
            self.log.append(f"{self.phase}, step {self.step}: {place} fails: {fault.how}")
            self._fail(fault, place)

    def _fail(self, fault: Fault, place: str) -> None:
        if fault.how == "lost":
            self.lost = True
            raise DeviceLost(f"The scripted device was lost in a {place}.")
        if fault.how == "out_of_memory":
            raise OutOfDeviceMemory(f"The scripted device refuses a {place}: out of memory.")
        raise ScriptedFault(f"the scripted device refuses a {place}")
