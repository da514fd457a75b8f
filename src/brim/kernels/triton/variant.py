"""One compiled form of a kernel as plain text, so that another process can make it. Owns listing, making and looking up.

Triton compiles a kernel anew for each combination of argument types, of integers that are 1 or divisible by 16, of pointers
that are aligned to 16 bytes, of constexprs and of options. A `VariantList` takes launches, runs none of them, and keeps each
combination once; it asks Triton's own binder, so it cannot disagree with a real launch. Torch-free: the processes that compile
start in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITCallable, create_function_from_signature

# Modules and classes that build the host's side of a launch, by Triton's name of the target.
_LAUNCHERS = {"cuda": ("triton.backends.nvidia.driver", "CudaLauncher"), "hip": ("triton.backends.amd.driver", "HIPLauncher")}
_GLUON = "triton.experimental.gluon._runtime"  # imported only for kernels written in it
# Kernels that take longest to compile, longest first; the others are much alike.
_SLOW = (
    "hopper_attention_kernel",
    "prefill_attention_kernel",
    "decode_attention_kernel",
    "threshold_kernel",
    "top_logprobs_kernel",
    "rope_and_cache_kernel",
)


def settle_key(function: Any) -> None:
    """Make Triton's key of a kernel the same in every process: of what it calls first, then its own.

    Triton 3.6 takes over the global values that a callee reads before it has made the callee's key, which is what finds them. So
    the key of a kernel, and with it the place in the cache, depended on which kernels the process had met before."""
    if function.hash is not None:
        return
    for name in function.fn.__code__.co_names:
        callee = function.fn.__globals__.get(name)
        if isinstance(callee, JITCallable) and callee is not function:
            settle_key(callee)
    function.cache_key  # noqa: B018 (made when it is asked for)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with everything that enters its compilation but the target. text: JSON, the same for the same variant."""

    text: str

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return str(json.loads(self.text)["kernel"])

    @property
    def cost_rank(self) -> tuple[int, int]:
        """Sorts those first that take longest to compile."""
        stored = json.loads(self.text)
        place = _SLOW.index(stored["kernel"]) if stored["kernel"] in _SLOW else len(_SLOW)
        return place, -int(stored["options"].get("num_warps", 4))

    def is_cached(self, target: GPUTarget) -> bool:
        """Whether Triton's cache on disk holds it."""
        source, options = self._source(target)
        key = get_cache_key(source, make_backend(target), options, get_cache_invalidating_env_vars())
        folder = get_cache_manager(hashlib.sha256(key.encode("utf-8")).hexdigest())
        return folder.get_group(f"{source.name[:150]}.json") is not None

    def compile(self, target: GPUTarget) -> None:
        """Put it into Triton's cache on disk, and what calls it on the host too. Uses no device; raises what compilers raise."""
        source, options = self._source(target)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        if target.backend in _LAUNCHERS:
            module, name = _LAUNCHERS[target.backend]
            getattr(importlib.import_module(module), name)(compiled.src, compiled.metadata)

    def _source(self, target: GPUTarget) -> tuple[Any, Any]:
        stored = json.loads(self.text)
        kernel = getattr(importlib.import_module(stored["module"]), stored["kernel"])
        settle_key(kernel)
        constants = {tuple(path): value for path, value in stored["constants"]}
        attributes = {tuple(path): value for path, value in stored["attributes"]}
        source_of = importlib.import_module(_GLUON).GluonASTSource if kernel.is_gluon() else ASTSource
        source = source_of(kernel, stored["signature"], constants, attributes)
        return source, make_backend(target).parse_options(stored["options"])


@dataclass(slots=True)
class VariantList:
    """Takes launches (see `launch.Launch`) for a target and keeps the variants they need."""

    target: GPUTarget
    variants: set[Variant] = field(default_factory=set)
    _binders: dict[Any, Any] = field(default_factory=dict)
    _known: dict[Hashable, Variant] = field(default_factory=dict)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """See `triton.runtime.jit.JITFunction.run`, whose first half this is; it tells launches apart by the same key."""
        backend = make_backend(self.target)
        if kernel.fn not in self._binders:
            settle_key(kernel)
            self._binders[kernel.fn] = create_function_from_signature(kernel.signature, kernel.params, backend)
        options["debug"] = options.get("debug", kernel.debug) or knobs.runtime.debug
        options["instrumentation_mode"] = knobs.compilation.instrumentation_mode
        bound, specialization, launch_options = self._binders[kernel.fn](*arguments, **options)
        key = (kernel.fn, tuple(specialization), str(launch_options))
        if key not in self._known:
            packed = kernel._pack_args(backend, options, bound, specialization, launch_options)
            self._known[key] = _variant_of(kernel, launch_options, packed)
        self.variants.add(self._known[key])


def _variant_of(kernel: Any, launch_options: dict[str, Any], packed: tuple[Any, ...]) -> Variant:
    """packed: what `JITFunction._pack_args` makes of a launch."""
    _, signature, constants, attributes = packed
    stored = {
        "module": kernel.module,
        "kernel": kernel.fn.__name__,
        "signature": signature,
        "constants": list(constants.items()),
        "attributes": list(attributes.items()),
        "options": launch_options,
    }
    return Variant(json.dumps(stored))
