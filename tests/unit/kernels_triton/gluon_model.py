"""A model of the part of Hopper that Gluon's kernels here program, for machines without one: the kernel's own source runs, with
stand-ins for its imports. Values, shared memory, barriers and the freedom of what is asynchronous are modelled; layouts,
registers and speed are not (compiling checks the layouts).

Partitions and copies take turns in an order drawn from a seed, and what is asynchronous is at its worst: a copy's destination
holds NaN until it ends, a product reads its operands from its start to the wait for it. Raises GluonFault.
"""

from __future__ import annotations

import builtins
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class GluonFault(AssertionError):
    """What would go wrong on the chip: a race, a wait for ever, an access out of bounds."""


class Block(Tensor):
    """A tensor in registers; a scalar is one without dimensions."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        """Only its layout is asked for."""
        return SimpleNamespace(layout=None)


def block(value: Any) -> Any:
    """As a Block; numbers become scalars of 32 bits."""
    if not isinstance(value, Tensor):
        kinds = {bool: torch.bool, int: torch.int32, float: torch.float32}
        value = torch.tensor(value, dtype=kinds[type(value)])
    return value.as_subclass(Block)


class Pointer:
    """Elements of a tensor's storage from its first one on."""

    def __init__(self, storage: Tensor, offset: Any = 0) -> None:
        self._storage, self._offset = storage, offset
        self.dtype = SimpleNamespace(element_ty=storage.dtype)

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        """The address of a tensor, which may be a view."""
        count = tensor.untyped_storage().size() // tensor.element_size() - tensor.storage_offset()
        return cls(tensor.as_strided((count,), (1,)))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self._storage, self._offset + offset)

    def load(self, mask: Any = None, other: float = 0.0) -> Any:
        """The elements at the offsets; `other` where the mask is off."""
        at, keep = self._places(mask)
        return block(torch.where(keep, self._storage[torch.where(keep, at, 0)], other).to(self._storage.dtype))

    def store(self, value: Any, mask: Any = None) -> None:
        """Write where the mask is on."""
        at, keep = self._places(mask)
        self._storage[at[keep]] = value.as_subclass(Tensor).expand(at.shape)[keep].to(self._storage.dtype)

    def _places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self._offset).as_subclass(Tensor).long()
        keep = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
        real = at[keep]
        if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < self._storage.numel():
            raise GluonFault("an address out of bounds")
        return at, keep


class Barrier:
    """An mbarrier: a phase ends when everybody has arrived and every expected byte is there.

    Source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
    """

    def __init__(self) -> None:
        self._count = self._missing = self._bytes = self._phase = 0

    def init(self, count: int) -> None:
        """So many arrivals a phase."""
        self._count = self._missing = count

    def arrive(self, num_bytes: int = 0) -> None:
        """Arrive, and expect bytes in this phase."""
        if not self._missing:
            raise GluonFault("more arrivals in a phase than the barrier counts")
        self._missing -= 1
        self.copied(-num_bytes)

    def copied(self, num_bytes: int) -> None:
        """Expected bytes have come."""
        self._bytes -= num_bytes
        if not self._missing and not self._bytes:
            self._missing, self._phase = self._count, self._phase + 1

    def is_past(self, parity: int) -> bool:
        """Whether the phase of this parity is over, as try_wait.parity sees it."""
        return (self._phase & 1) != parity


class Shared:
    """A buffer in shared memory."""

    def __init__(self, machine: Machine, data: Tensor) -> None:
        self._machine, self.data, self.dtype = machine, data, data.dtype

    def index(self, at: Any) -> Shared:
        """One of its first dimension."""
        if not 0 <= int(at) < self.data.shape[0]:
            raise GluonFault("a buffer that is not there")
        return Shared(self._machine, self.data[int(at)])

    def permute(self, order: Sequence[int]) -> Shared:
        """Another view."""
        return Shared(self._machine, self.data.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        assert dtype == self.dtype
        return Shared(self._machine, self.data.view(*shape))

    def load(self, layout: Any) -> Any:
        """Into registers."""
        return block(self.data.clone())

    def store(self, value: Tensor) -> None:
        """By the generic proxy: products see it after a fence."""
        self.data.copy_(value)
        self._machine.unfenced.append((threading.current_thread(), self.place()))
        self._machine.pause()

    def place(self) -> range:
        """Bytes from the first to the last."""
        last = sum((size - 1) * stride for size, stride in zip(self.data.shape, self.data.stride(), strict=True))
        start = self.data.data_ptr()
        return range(start, start + (last + 1) * self.data.element_size())


class Product:
    """A matrix product under way. Reading it before the wait fails, for it is no tensor."""

    def __init__(self, machine: Machine, a: Any, b: Shared, start: Any) -> None:
        self._operands = [one.data for one in (a, b) if isinstance(one, Shared)]
        self._seen = [one.clone() for one in self._operands]
        for one in (a, b):
            if isinstance(one, Shared):
                machine.check_fenced(one)
        left = a.data if isinstance(a, Shared) else a.as_subclass(Tensor)
        self._product, self._start, self.result = left.float() @ b.data.float(), start, None

    def end(self) -> None:
        """The wait is over: what was read must have stayed."""
        for now, then in zip(self._operands, self._seen, strict=True):
            if not torch.equal(now.view(torch.int16), then.view(torch.int16)):
                raise GluonFault("shared memory changed under a product")
        start = self._start.result if isinstance(self._start, Product) else self._start
        self.result = block(self._product if start is None else start + self._product)


class Machine:
    """One multiprocessor, one program at a time. edit: changes the source, to see that faults are found."""

    def __init__(self, source: Path, seed: int = 0, edit: Callable[[str], str] = str) -> None:
        self._random = random.Random(seed)
        self._copies: list[Callable[[], None]] = []
        self._turn = threading.Semaphore(0)
        self.unfenced: list[tuple[threading.Thread, range]] = []
        self._fenced: list[tuple[threading.Thread, range]] = []
        self._program = self._num_programs = 0
        self._names: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": self._import}, "__name__": "kernel"}
        exec(compile(edit(source.read_text()), str(source), "exec"), self._names)

    def launch(
        self, kernel: Any, grid: tuple[int], *arguments: Any, num_warps: int, maxnreg: int = 255, **constants: Any
    ) -> None:
        """Run every program of the grid, one after the other in any order; a Launch."""
        given = [_argument(one) for one in arguments]
        self._num_programs = grid[0]
        for program in self._random.sample(range(grid[0]), grid[0]):
            self._program = program
            self._names[kernel.fn.__name__](*given, **constants)

    # -- taking turns

    def specialize(self, parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        """Run partitions until all have ended."""
        workers = [_Partition(self._turn, function, arguments) for function, arguments in parts]
        self._copies.clear()
        pace = {worker: self._random.random() ** 2 for worker in workers}  # in some programs one is much slower than the others
        copy_pace = self._random.random() ** 4
        for worker in workers:
            worker.start()
        try:
            while not all(worker.is_done for worker in workers):
                ready = [(worker.resume, pace[worker]) for worker in workers if not worker.is_done and worker.until()]
                ready += [(copy, copy_pace) for copy in self._copies]
                if not ready:
                    raise GluonFault("every partition waits for ever")
                (chosen,) = self._random.choices([one for one, _ in ready], [weight for _, weight in ready])
                if chosen in self._copies:
                    self._copies.remove(chosen)
                chosen()
                for worker in workers:
                    if worker.error is not None:
                        raise worker.error
        finally:
            for worker in workers:
                worker.end()
            self.unfenced.clear()
            self._fenced.clear()

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others run; go on when `until` holds."""
        thread = threading.current_thread()
        if isinstance(thread, _Partition):
            thread.wait_turn(until)

    def check_fenced(self, shared: Shared) -> None:
        """Raises GluonFault where the generic proxy wrote it and no fence came since. Who stored the same place itself, and
        fenced, reads what it stored, or the same bytes again (a difference is found when the product ends)."""
        place, me = shared.place(), threading.current_thread()
        mine = any(thread is me and _overlap(one, place) for thread, one in self._fenced)
        if any((thread is me or not mine) and _overlap(one, place) for thread, one in self.unfenced):
            raise GluonFault("a product reads what was stored without a fence")

    # -- what the kernel imports

    def _import(self, name: str, _globals: Any = None, _locals: Any = None, wanted: Sequence[str] = (), _level: int = 0) -> Any:
        if name == "__future__":
            return __import__(name, fromlist=list(wanted))
        nvidia = {
            "fence_async_shared": self._fence, "mbarrier": self._barriers(), "tma": SimpleNamespace(
                async_copy_global_to_shared=self._copy), "warpgroup_mma": self._product, "warpgroup_mma_wait": self._wait,
        }  # fmt: skip
        known: dict[str, dict[str, Any]] = {
            "triton.experimental": {"gluon": SimpleNamespace(jit=_jit)},
            "triton.experimental.gluon": {"language": self._language()},
            "triton.experimental.gluon.language.nvidia.hopper": nvidia,
            "triton.language.extra.cuda": {"gdc_launch_dependents": lambda: None, "gdc_wait": lambda: None},
        }
        return SimpleNamespace(**{one: known[name][one] for one in wanted})

    def _language(self) -> Any:
        layouts = ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout")
        return SimpleNamespace(
            **{name: lambda *args, **kwargs: None for name in layouts},
            NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *args: None),
            constexpr=lambda value: value, static_range=range, float32=torch.float32, int32=torch.int32, int64=torch.int64,
            program_id=lambda axis: block(self._program), num_programs=lambda axis: block(self._num_programs),
            load=lambda at, mask=None, other=0.0, cache_modifier="": at.load(mask, other), atomic_add=_atomic_add,
            store=lambda at, value, mask=None: at.store(block(value), mask), thread_barrier=lambda: None, exp=torch.exp,
            allocate_shared_memory=self._allocate, warp_specialize=self.specialize, convert_layout=lambda value, layout: value,
            arange=lambda start, end, layout: block(torch.arange(start, end, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout: block(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, layout: block(torch.full(shape, value, dtype=dtype)),
            zeros_like=torch.zeros_like, exp2=torch.exp2, where=lambda on, a, b: torch.where(block(on), a, b),
            minimum=lambda a, b: torch.minimum(block(a), block(b)), maximum=lambda a, b: torch.maximum(block(a), block(b)),
            max=lambda value, axis: value.max(axis).values, sum=lambda value, axis: value.sum(axis, dtype=value.dtype),
        )  # fmt: skip

    def _barriers(self) -> Any:
        return SimpleNamespace(
            MBarrierLayout=lambda: "barrier", init=lambda one, count: one.init(count), wait=self._wait_barrier,
            expect=lambda one, num_bytes: one.arrive(num_bytes), arrive=self._arrive,
        )  # fmt: skip

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barrier":
            ring = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda at: ring[int(at)])
        return Shared(self, torch.full(shape, float("nan"), dtype=dtype))

    def _fence(self) -> None:
        me = threading.current_thread()
        self._fenced += [one for one in self.unfenced if one[0] is me]
        self.unfenced = [one for one in self.unfenced if one[0] is not me]

    def _wait_barrier(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if pred:
            self.pause(lambda: barrier.is_past(int(phase)))

    def _arrive(self, barrier: Barrier) -> None:
        barrier.arrive()
        self.pause()

    def _copy(self, source: Any, at: Sequence[Any], barrier: Barrier, to: Shared) -> None:
        row, column = (int(one) for one in at)
        rows, cols = to.data.shape
        if row < 0 or column < 0:
            raise GluonFault("a copy from before the matrix")
        to.data.fill_(float("nan"))

        def arrives() -> None:
            inside = source.tensor[row : row + rows, column : column + cols]  # past the ends there is zero
            to.data.zero_()[: inside.shape[0], : inside.shape[1]] = inside
            barrier.copied(to.data.numel() * to.data.element_size())

        self._copies.append(arrives)
        self.pause()

    def _product(self, a: Any, b: Shared, start: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        assert is_async
        started = Product(self, a, b, start if use_acc else None)
        threading.current_thread().products.append(started)  # type: ignore[attr-defined]
        self.pause()
        return started

    def _wait(self, most: int, deps: Sequence[Any]) -> Any:
        queue = threading.current_thread().products  # type: ignore[attr-defined]
        while len(queue) > most:
            queue.pop(0).end()
        self.pause()
        found = [one.result if isinstance(one, Product) else one for one in deps]
        if any(one is None for one in found):
            raise GluonFault("the wait leaves a product under way that it returns")
        return found[0] if len(found) == 1 else tuple(found)


class _Partition(threading.Thread):
    """A group of warps, which runs when its turn comes."""

    def __init__(self, turn: threading.Semaphore, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self._back, self._go = turn, threading.Semaphore(0)
        self._function, self._arguments = function, arguments
        self._is_over = self.is_done = False
        self.until: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self.products: list[Product] = []

    def run(self) -> None:
        """The partition's function."""
        self._go.acquire()
        try:
            if not self._is_over:
                self._function(*self._arguments)
        except BaseException as error:
            self.error = None if self._is_over else error
        self.is_done = True
        self._back.release()

    def resume(self) -> None:
        """Run until the next pause, or to the end; called by the scheduler."""
        self._go.release()
        self._back.acquire()

    def wait_turn(self, until: Callable[[], bool]) -> None:
        """Give the turn back."""
        self.until = until
        self._back.release()
        self._go.acquire()
        if self._is_over:
            raise SystemExit

    def end(self) -> None:
        """Another partition failed, or all have ended."""
        self._is_over = True
        self._go.release()
        self.join()


def _overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def _argument(value: Any) -> Any:
    """As a kernel sees it: a pointer, a descriptor, a number."""
    if isinstance(value, Tensor):
        return Pointer.to(value)
    if isinstance(value, int):
        return block(value)
    if hasattr(value, "base"):
        tensor = value.base.as_strided(value.shape, value.strides)
        return SimpleNamespace(tensor=tensor, dtype=tensor.dtype, layout=None)
    return value


def _atomic_add(at: Pointer, value: int, sem: str) -> Any:
    before = at.load()
    at.store(before + value)
    return before


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda inner: inner
