"""Linear attention with scalar decay: what users call. Arguments are brought into the operators' form here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.recurrence.inputs import (
    TokenInputs,
    check_chunk_head_dim,
    check_head_parameter,
    check_inputs,
    check_pool,
    check_sequences,
    needs_grad,
)

MAX_BACKWARD_VALUE_DIM_CUDA = 128


def gates_of(g: Tensor | None) -> dict[str, Tensor]:
    return {} if g is None else {"g": g}


def add_constant_decay(inputs: TokenInputs, g_gamma: Tensor | None) -> TokenInputs:
    """The inputs with the constant decay of a head added to that of its tokens."""
    if g_gamma is None:
        return inputs
    g_gamma = check_head_parameter(g_gamma, "g_gamma", inputs)
    g = g_gamma.expand(inputs.v.shape[:3]).contiguous() if inputs.g is None else inputs.g + g_gamma
    return replace(inputs, gates={"g": g})


def check_kernel_limits(inputs: TokenInputs, has_backward: bool) -> None:
    """Sizes that the CUDA kernels over whole sequences do not take."""
    check_chunk_head_dim(inputs.q)
    if has_backward and not _ext.runs_on_cpu_kernels(inputs.q):
        check.in_range(
            inputs.v.shape[3], "on CUDA with gradients, the head size V of v", 1, MAX_BACKWARD_VALUE_DIM_CUDA
        )


@dataclass(frozen=True)
class _Call:
    """A whole-sequence call: inputs with all of the decay in g, state and offsets checked."""

    inputs: TokenInputs
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        x = self.inputs
        return x.q, x.k, x.v, x.g, self.initial_state, self.cu_seqlens

    def needs_grad(self) -> bool:
        return needs_grad(*self.tensors()[:5])


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None, scale: float | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, state_v_first: bool,
) -> _Call:  # fmt: skip
    inputs = add_constant_decay(check_inputs(q, k, v, gates_of(g), scale), g_gamma)
    return _Call(inputs, *check_sequences(inputs, initial_state, cu_seqlens, state_v_first))


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Linear attention with one decay per head and token, over whole sequences, in chunks; differentiable.

    For every value head, with the state :math:`S` of shape [K, V]::

        S_t = e^{g_t} S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Without a gate this is linear attention, with a constant one RetNet or lightning attention, with one of the data
    simple GLA; docs/ops/simple_gla.md says how Mamba-2 maps to it. Sources: Yang, Wang, Shen, Panda, Kim, "Gated Linear
    Attention Transformers with Hardware-Efficient Training", arXiv 2312.06635; Dao, Gu, "Transformers are SSMs",
    arXiv 2405.21060. The chunked form keeps the state in float32 and computes the gradient of the gate without
    cancellation; see csrc/recurrence/simple_gla/README.md.

    Results are bitwise reproducible, do not depend on other sequences of the batch, and an output never depends on a
    later token, not even through a NaN.

    Args:
        q: [B, T, H, K] queries; float32, bfloat16 or float16 (float64 on the CPU), K in 1...256, on CUDA 1...128.
        k: [B, T, H, K] keys, same dtype.
        v: [B, T, HV, V] values, same dtype; HV is a multiple of H, and value head h reads query and key head
            h // (HV // H). V in 1...256, on CUDA with gradients 1...128.
        g: [B, T, HV] natural logarithm of the decay per step, at most 0; default none. Values below -88 (-700 in
            float64) act as that bound, so -inf resets the state. Any floating dtype; computed in float32 (float64 for
            float64 q).
        g_gamma: [HV] the same for all tokens of a head. With `g` too, the two add.
        scale: factor of the output; default K ** -0.5.
        initial_state: [N, HV, K, V] float32 (float64 for float64 q) state before the first token; default zero. N = B,
            or the number of sequences in `cu_seqlens`.
        output_final_state: whether to return the state after the last token.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1] int32 or int64 offsets of sequences packed along T (B = 1): 0 = first <= ... <= last = T;
            empty sequences are allowed. On a GPU the contents are not read by the host: offsets outside these rules
            are clamped, and tokens outside every sequence get zero outputs and gradients.
        cu_seqlens_cpu: accepted for compatibility; not needed.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state ([N, HV, K, V] float32, or float64) or None.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape, device, head count or offset is not allowed, or the tensors are on a device whose kernels
            are not loaded.
    """
    del cu_seqlens_cpu
    call = _prepare(q, k, v, g, g_gamma, scale, initial_state, cu_seqlens, state_v_first)
    saves_states = call.needs_grad()
    check_kernel_limits(call.inputs, saves_states)
    o, final_state, _ = torch.ops.remora.simple_gla_fwd(
        *call.tensors(), None, call.inputs.scale, output_final_state, state_v_first, saves_states
    )
    return o, final_state if output_final_state else None


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` computed token by token: for short inputs, and in float32 without tensor cores.

    Differentiable; the gradient is that of the chunked form, which on CUDA takes K and V up to 128. Walking from the
    last token to the first is not part of this operator: `reverse` must be False; flip the inputs along T instead.
    Other arguments, returns and errors as in `chunk_simple_gla`.
    """
    if reverse:
        raise ValueError("reverse must be False: flip the inputs and the output along T instead")
    call = _prepare(q, k, v, g, g_gamma, scale, initial_state, cu_seqlens, state_v_first)
    if call.needs_grad():
        check_kernel_limits(call.inputs, True)
    o, final_state = torch.ops.remora.simple_gla_recurrent_fwd(
        *call.tensors(), call.inputs.scale, output_final_state, state_v_first
    )
    return o, final_state if output_final_state else None


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """Linear attention: `chunk_simple_gla` without decay, and by default divided by the weights' sum.

        z_t = z_{t-1} + k_t
        o_t = S_t^T q_t / (z_t . q_t + 1e-10 / scale)

    Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", arXiv 2006.16236. The weights k . q are those
    of a kernel only where they are positive: apply a feature map to q and k first.

    Args:
        normalize: whether to divide; sums of weights are computed in float32 (float64 for float64 q).
        initial_state: the state [N, HV, K, V], or with `normalize` a pair of it and the keys' sum z [N, 1, H, K], both
            float32 (float64 for float64 q).
        Other arguments as in `chunk_simple_gla`.

    Returns:
        o and the final state, a pair with `normalize`, or None.

    Raises:
        TypeError, ValueError: as in `chunk_simple_gla`; and ValueError if `initial_state` is a pair without
            `normalize` or no pair with it.
    """
    state, key_sum = initial_state, None
    if initial_state is not None and normalize:
        if not isinstance(initial_state, tuple) or len(initial_state) != 2:
            raise ValueError("with normalize=True, initial_state must be a pair (state, key sum)")
        state, key_sum = initial_state
    if isinstance(state, tuple):
        raise ValueError("with normalize=False, initial_state must be one tensor, got a tuple")
    o, final_state = chunk_simple_gla(
        q, k, v, scale=scale, initial_state=state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )
    if not normalize:
        return o, final_state
    if key_sum is not None:
        check.is_tensor(key_sum, "the key sum of initial_state")
        N, _, H, K = key_sum.shape if key_sum.dim() == 4 else (-1, -1, -1, -1)
        check.has_shape(key_sum, "the key sum of initial_state", "[N, 1, H, K]", [N, 1, *q.shape[2:]])
        key_sum = key_sum.reshape(N, H, K, 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        weights, key_sum = chunk_simple_gla(
            q.to(wide), k.to(wide), q.new_ones((*q.shape[:3], 1), dtype=wide), scale=scale, initial_state=key_sum,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    weights = weights.repeat_interleave(v.shape[2] // q.shape[2], dim=2)
    o = (o / (weights + 1e-10)).to(o.dtype)
    if final_state is None or key_sum is None:
        return o, None
    return o, (final_state, key_sum.squeeze(-1).unsqueeze(1))


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention: `chunk_simple_gla` with the decay 1 - 2^(-5 - h) of value head h = 0, 1, ...

    Source: Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei, "Retentive Network", arXiv 2307.08621. Rotary embeddings and
    normalisation are the layer's. Arguments, returns and errors as in `chunk_simple_gla`.
    """
    heads = torch.arange(_value_heads(v), dtype=torch.float32, device=v.device)
    return chunk_simple_gla(
        q, k, v, g_gamma=torch.log1p(-torch.exp2(-5 - heads)), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention: `chunk_simple_gla` with log decay -(8 / HV) (1 - layer_idx / num_layers) h of value head h.

    Source: Qin, Sun, Li, Shen, Sun, Zhong, "Lightning Attention-2", arXiv 2401.04658. Other arguments, returns and
    errors as in `chunk_simple_gla`; and ValueError unless 0 <= layer_idx < num_layers.
    """
    check.in_range(layer_idx, f"layer_idx (num_layers = {num_layers})", 0, num_layers - 1)
    HV = _value_heads(v)
    heads = torch.arange(HV, dtype=torch.float32, device=v.device)
    return chunk_simple_gla(
        q, k, v, g_gamma=-(8 / HV) * (1 - layer_idx / num_layers) * heads, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _value_heads(v: Tensor) -> int:
    check.is_tensor(v, "v")
    check.has_shape(v, "v", "[B, T, HV, V]", [None] * 4)
    check.in_range(v.shape[2], "the number of heads HV of v", 1, 2**31 - 1)
    return v.shape[2]


def simple_gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    g_gamma: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
) -> Tensor:
    """One decode step (or T of them) of `chunk_simple_gla`; updates `state` in place. Not differentiable.

    Args:
        q, k: [N, T, H, K]; v: [N, T, HV, V]; g: [N, T, HV] or None, as in `chunk_simple_gla`; usually T = 1.
        state: [slots, HV, K, V] contiguous float32 (float64 for float64 q) pool of states, updated in place;
            [slots, HV, V, K] with `state_v_first`.
        state_indices: [N] int32 or int64, the slot of each sequence. A sequence whose index is outside 0...slots - 1
            (by convention -1) is skipped: no state is read or written, its output is zero. The indices of one call
            must otherwise be distinct. Default: sequence n has slot n, and the pool has N slots.
        Other arguments as in `chunk_simple_gla`.

    Returns:
        o [N, T, HV, V] in the dtype of v.

    Raises:
        TypeError, ValueError: as `chunk_simple_gla`; and ValueError if `state` is not contiguous or an input requires
            a gradient while gradients are enabled.
    """
    inputs = add_constant_decay(check_inputs(q, k, v, gates_of(g), scale), g_gamma)
    state_indices = check_pool(state, inputs, state_indices, state_v_first)
    if needs_grad(q, k, v, g, g_gamma, state):
        raise ValueError("simple_gla_step has no gradient: call it under torch.no_grad()")
    x = inputs
    o: Tensor = torch.ops.remora.simple_gla_step_(
        x.q, x.k, x.v, x.g, state, state_indices, None, 1, x.scale, state_v_first
    )
    return o
