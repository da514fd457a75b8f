"""Whether a start compiles its model, and what became of it. Owns the choice, its reason, and doing without.

--compile is a mode, never a prerequisite: where compiling does not work, steps run call by call and the reason is reported,
or the start is refused where --strict was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from brim.config.schema import DeviceConfig
from brim.errors import BrimError, ConfigError, DeviceLost
from brim.kernels.base import Kernels
from brim.kernels.compiler import Backend, DenseCompiler, compile_reason
from brim.kernels.plain_weights import PlainWeightKernels
from brim.models.base import Model
from brim.models.compiled import CompiledDecoder
from brim.models.decoder import DecoderModel
from brim.platforms.base import Platform
from brim.worker.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class CompileChoice:
    """compiler: what compiles, None where nothing does, and then why. is_required: refuse to start instead of doing without."""

    compiler: DenseCompiler | None = None
    reason: str = "not asked for"
    is_required: bool = False

    @property
    def text(self) -> str:
        """For reports: on with which backend, or off and why."""
        return f"off: {self.reason}" if self.compiler is None else f"on: {self.compiler.name}"

    @property
    def model_class(self) -> type[DecoderModel]:
        """What to build."""
        return DecoderModel if self.compiler is None else CompiledDecoder

    def kernels(self, kernels: Kernels, device: torch.device) -> Kernels:
        """The same kernels, over weights that a compiler can read where it needs to."""
        return kernels if self.compiler is None or kernels.plain_weights else PlainWeightKernels(kernels, device)

    def without(self, reason: str) -> CompileChoice:
        """Not compiled after all. Raises ConfigError where that is refused."""
        if self.is_required:
            raise ConfigError(f"--compile does not work here ({reason}), and --strict refuses to do without; drop one of them.")
        return replace(self, compiler=None, reason=reason)


def choose_compile(config: DeviceConfig, device: torch.device, backend: Backend) -> CompileChoice:
    """What was asked for, tried on something small so that nothing is prepared for a compiler that cannot work.

    Raises ConfigError where it does not work and config.strict is set."""
    if not config.compile:
        return CompileChoice()
    choice = CompileChoice(DenseCompiler(backend), "", config.strict)
    assert choice.compiler is not None
    reason = choice.compiler.try_out(device)
    return choice if reason is None else choice.without(reason)


def compile_model(choice: CompileChoice, platform: Platform, model: Model, runner: ModelRunner, max_tokens: int) -> CompileChoice:
    """Compile for every number of tokens up to max_tokens, over the static buffers; what became of it.

    Raises DeviceLost, and ConfigError where doing without is refused.
    """
    if choice.compiler is None:
        return choice
    assert isinstance(model, CompiledDecoder)
    try:
        model.compile(choice.compiler, [runner.dense_step(count) for count in sorted({1, max_tokens}, reverse=True)])
        platform.synchronize()
    except Exception as error:  # whatever a compiler raises
        known = error if isinstance(error, BrimError) else platform.as_brim_error(error)
        if isinstance(known, DeviceLost):
            raise known from error
        return choice.without(compile_reason(error))
    return choice
