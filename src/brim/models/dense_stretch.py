"""The dense work between attention calls as plain torch operations, for a compiler. Owns the formulas and `Stretch`.

What is compiled reads no more than its arguments: one compiled stretch serves every layer of a model. Products, norms,
activations and sums of a layer are one function, so that a compiler may join them; it takes the weights as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from brim.kernels.base import Activation, LinearWeight
from brim.kernels.compiler import Compiled, DenseCompiler, ensure_compiling
from brim.kernels.torch_ref import TorchLinearWeight


@dataclass(frozen=True, slots=True)
class DenseForm:
    """The numbers of a model that its dense formulas have beside weights."""

    eps: float
    activation: Activation
    intermediate_size: int


class Stretch:
    """A body compiled twice: for one token, and for any number above that. Its first num_rows_args arguments are [T, .].

    Both exist after two calls, of one token and of several: of the most there can be, so that what holds for it holds for fewer.
    """

    def __init__(self, body: Compiled, compiler: DenseCompiler, num_rows_args: int) -> None:
        self._one = compiler.compiled(body)
        self._many = compiler.compiled(body)
        self._num_rows_args = num_rows_args
        self._is_traced = False

    def __call__(self, *args: Tensor | None) -> None:
        """Run; compiles at the first call of its kind."""
        first = args[0]
        assert first is not None
        if first.shape[0] == 1:
            self._one(*args)
            return
        if not self._is_traced:
            for rows in args[: self._num_rows_args]:
                torch._dynamo.mark_dynamic(rows, 0)
            self._is_traced = True
        self._many(*args)


def plain_matrix(weight: LinearWeight) -> Tensor:
    """The matrix itself, [out_features, in_features], no copy."""
    assert isinstance(weight, TorchLinearWeight), "packed weights cannot be compiled over"
    return weight.storage


def begin_body(form: DenseForm) -> Compiled:
    """(residual[T, N], qkv[T, Q], norm, matrix, bias or None): qkv = norm(residual) @ matrix.T + bias."""
    eps = form.eps

    def begin(residual: Tensor, qkv: Tensor, norm: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
        ensure_compiling()
        qkv.copy_(_product(_rms_norm(residual, norm, eps).to(residual.dtype), matrix, bias))

    return begin


def layer_body(form: DenseForm) -> Compiled:
    """What follows the attention of a layer, up to the attention of the next one.

    (attended[T, H*D], residual[T, N], out, output matrix and bias, norm after attention or None, MLP norm, gate_up matrix and
    bias, down matrix and bias, norm after the MLP or None, next norm, next qkv matrix and bias): residual is updated in place;
    out is the next layer's qkv, or the normed residual where there is no next layer (next matrix None).
    """
    eps, activation, inner = form.eps, form.activation, form.intermediate_size

    def layer(
        attended: Tensor,
        residual: Tensor,
        out: Tensor,
        output: Tensor,
        output_bias: Tensor | None,
        post_attention_norm: Tensor | None,
        mlp_norm: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        post_mlp_norm: Tensor | None,
        next_norm: Tensor,
        next_qkv: Tensor | None,
        next_qkv_bias: Tensor | None,
    ) -> None:
        ensure_compiling()
        dtype = residual.dtype
        after_attention = _added(residual, _product(attended, output, output_bias), post_attention_norm, eps)
        gates = _product(_rms_norm(after_attention, mlp_norm, eps).to(dtype), gate_up, gate_up_bias)
        active = _activated(gates[:, :inner].float(), activation) * gates[:, inner:].float()
        after_mlp = _added(after_attention, _product(active.to(dtype), down, down_bias), post_mlp_norm, eps)
        residual.copy_(after_mlp)
        hidden = _rms_norm(after_mlp, next_norm, eps).to(dtype)
        out.copy_(hidden if next_qkv is None else _product(hidden, next_qkv, next_qkv_bias))

    return layer


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """In x's dtype; a float32 bias is added to the rounded product, so that no weight is ever converted."""
    product = linear(x, matrix)
    return product if bias is None else (product.float() + bias).to(product.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32."""
    x32 = x.float()
    return x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight


def _added(residual: Tensor, x: Tensor, post_norm: Tensor | None, eps: float) -> Tensor:
    """residual + x, normed first where the family does so, rounded to residual's dtype."""
    added = x.float() if post_norm is None else _rms_norm(x, post_norm, eps)
    return (residual.float() + added).to(residual.dtype)


def _activated(gate: Tensor, activation: Activation) -> Tensor:
    return silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
