"""What torch.compile is asked for. Owns `DenseCompiler`: backend, options, and one compiled function a call.

Nothing of the compiler's own configuration is changed: all that differs from its defaults is given as options of each compile.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from brim.errors import BrimError

Backend = str | Callable[..., Any]
Compiled = Callable[..., None]

# Choices by measuring would depend on the moment, and a cold cache would keep what a warm one never loads. Graphs are the
# worker's. Compiling in this process leaves no pool of processes behind.
_OPTIONS: dict[str, Any] = {
    "deterministic": True,
    "max_autotune": False,
    "coordinate_descent_tuning": False,
    "freezing": False,
    "triton.cudagraphs": False,
    "compile_threads": 1,
}


class CompileFailed(BrimError):
    """torch.compile does not work here; the message is the reason in one sentence."""


class DenseCompiler:
    """Compiles functions that write their results into tensors they are given.

    backend: a name torch.compile knows, or a callable (graph, example inputs) -> callable.
    """

    def __init__(self, backend: Backend = "inductor") -> None:
        self.backend = backend

    @property
    def name(self) -> str:
        """The backend's, for reports."""
        return self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", "custom")

    def compiled(self, body: Compiled) -> Compiled:
        """`body` compiled when it is first called. It has a cache of its own and is guarded by its tensors alone: what else it
        reads (numbers of the model) never changes, and a step never compiles again because some global state did."""
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        if self.backend == "inductor":
            known = set(torch._inductor.list_options())
            options.update({key: value for key, value in _OPTIONS.items() if key in known})
        function: Compiled = torch.compile(_own_code(body), fullgraph=True, backend=self.backend, options=options)
        return function

    def try_out(self, device: torch.device) -> str | None:
        """Why nothing can be compiled for this device, found by compiling something small; None: it works."""
        x = torch.ones(4, 8, device=device)
        out = torch.empty_like(x)
        try:
            self.compiled(_try_body)(x, out)
        except Exception as error:  # whatever a compiler or its compiler raises
            return compile_reason(error)
        return None if bool((out == 1.5).all()) else "a compiled function gave wrong values"


def compile_reason(error: BaseException) -> str:
    """What went wrong in one line: the first that says so, for a compiler's own words are long."""
    if isinstance(error, CompileFailed):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if not line.endswith("raised:")), "")
    return (said if len(lines) > 1 and said != lines[0] else f"{type(error).__name__}: {said}")[:300]


def ensure_compiling() -> None:
    """Called inside a body: raises CompileFailed where it runs as plain Python, because compiling is switched off."""
    if not torch.compiler.is_dynamo_compiling():
        raise CompileFailed("torch.compile is switched off by the environment")


def _own_code(body: Callable[..., None]) -> Callable[..., None]:
    """The same function over code of its own: compiled code is kept by code object, and is gone with it."""
    assert isinstance(body, FunctionType)
    return FunctionType(body.__code__.replace(), body.__globals__, body.__name__, body.__defaults__, body.__closure__)


def _try_body(x: Tensor, out: Tensor) -> None:
    ensure_compiling()
    out.copy_(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 0.5)
