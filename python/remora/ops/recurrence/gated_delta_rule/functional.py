"""The (gated) delta rule: what users call. Arguments are checked and brought into the operators' form here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

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


def gates_of(g: Tensor | None, beta: Tensor, has_gate: bool) -> dict[str, Tensor]:
    """The gates of a call by name; a missing one that is needed fails the check for a tensor."""
    return {"beta": beta, **({"g": g} if has_gate else {})}  # type: ignore[dict-item]


def check_gate_parameters(
    use_gate: bool, A_log: Tensor | None, dt_bias: Tensor | None, inputs: TokenInputs
) -> tuple[Tensor | None, Tensor | None]:
    if not use_gate:
        for name, tensor in (("A_log", A_log), ("dt_bias", dt_bias)):
            if tensor is not None:
                raise ValueError(f"{name} needs use_gate_in_kernel=True")
        return None, None
    if A_log is None:
        raise ValueError("use_gate_in_kernel=True needs A_log of shape [HV], got None")
    A_log = check_head_parameter(A_log, "A_log", inputs)
    return A_log, None if dt_bias is None else check_head_parameter(dt_bias, "dt_bias", inputs)


def check_beta_options(use_beta_sigmoid: bool, allow_neg_eigval: bool) -> None:
    if allow_neg_eigval and not use_beta_sigmoid:
        raise ValueError("allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")


def map_gates(
    inputs: TokenInputs, A_log: Tensor | None, dt_bias: Tensor | None, use_beta_sigmoid: bool, allow_neg_eigval: bool
) -> TokenInputs:
    """The inputs with decay and write strength in place of their logits."""
    gates = dict(inputs.gates)
    if A_log is not None:
        gates["g"] = -A_log.exp() * F.softplus(gates["g"] if dt_bias is None else gates["g"] + dt_bias)
    if use_beta_sigmoid:
        gates["beta"] = gates["beta"].sigmoid() * 2 if allow_neg_eigval else gates["beta"].sigmoid()
    return replace(inputs, gates=gates)


@dataclass(frozen=True)
class _Call:
    """A whole-sequence call: inputs with the gate and beta maps applied, state and offsets checked."""

    inputs: TokenInputs
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        x = self.inputs
        return x.q, x.k, x.v, x.g, x.beta, self.initial_state, self.cu_seqlens

    def needs_grad(self) -> bool:
        return needs_grad(*self.tensors()[:6])


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, state_v_first: bool, *,
    has_gate: bool = True, use_gate: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False, allow_neg_eigval: bool = False,
) -> _Call:  # fmt: skip
    inputs = check_inputs(q, k, v, gates_of(g, beta, has_gate), scale)
    A_log, dt_bias = check_gate_parameters(use_gate, A_log, dt_bias, inputs)
    check_beta_options(use_beta_sigmoid, allow_neg_eigval)
    initial_state, cu_seqlens = check_sequences(inputs, initial_state, cu_seqlens, state_v_first)
    mapped = map_gates(inputs, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval)
    return _Call(mapped, initial_state, cu_seqlens)


def _chunk(call: _Call, use_qk_l2norm: bool, output_final_state: bool, v_first: bool) -> tuple[Tensor, Tensor | None]:
    check_chunk_head_dim(call.inputs.q)
    o, final_state, _ = torch.ops.remora.gated_delta_rule_fwd(
        *call.tensors(), None, call.inputs.scale, use_qk_l2norm, output_final_state, v_first, call.needs_grad()
    )
    return o, final_state if output_final_state else None


def _recurrent(
    call: _Call, use_qk_l2norm: bool, output_final_state: bool, v_first: bool
) -> tuple[Tensor, Tensor | None]:
    if call.needs_grad():
        check_chunk_head_dim(call.inputs.q)
    o, final_state = torch.ops.remora.gated_delta_rule_recurrent_fwd(
        *call.tensors(), call.inputs.scale, use_qk_l2norm, output_final_state, v_first
    )
    return o, final_state if output_final_state else None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""The gated delta rule over whole sequences, in chunks; differentiable.

    For every value head, with the state :math:`S` of shape [K, V]::

        S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - e^{g_t} S_{t-1}^T k_t))^T
        o_t = scale * S_t^T q_t

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv 2412.06464. The
    chunked form keeps the state in float32, uses an inverse whose entries stay below one and computes the gradient of
    the gate without cancellation; see csrc/recurrence/gated_delta_rule/README.md.

    Results are bitwise reproducible, do not depend on other sequences of the batch, and an output never depends on a
    later token, not even through a NaN.

    Args:
        q: [B, T, H, K] queries; float32, bfloat16 or float16 (float64 on the CPU), K in 1...256, on CUDA 1...128.
        k: [B, T, H, K] keys, same dtype. The rule is stable for keys of length at most one: normalise them or set
            `use_qk_l2norm_in_kernel`.
        v: [B, T, HV, V] values, same dtype; HV is a multiple of H, and value head h reads query and key head
            h // (HV // H). V in 1...256.
        g: [B, T, HV] natural logarithm of the decay per step, at most 0. Values below -88 (-700 in float64) act as
            that bound, so -inf resets the state. Any floating dtype; computed in float32 (float64 for float64 q).
        beta: [B, T, HV] write strength, in [0, 1], or [0, 2] with negative eigenvalues.
        scale: factor of the output; default K ** -0.5.
        initial_state: [N, HV, K, V] float32 (float64 for float64 q) state before the first token; default zero. N = B,
            or the number of sequences in `cu_seqlens`.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum of squares + 1e-6) first.
        use_beta_sigmoid_in_kernel: `beta` holds logits; its sigmoid is used.
        allow_neg_eigval: double that sigmoid.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1] int32 or int64 offsets of sequences packed along T (B = 1): 0 = first <= ... <= last = T;
            empty sequences are allowed. On a GPU the contents are not read by the host: offsets outside these rules
            are clamped, and tokens outside every sequence get zero outputs and gradients.
        cu_seqlens_cpu: accepted for compatibility; not needed.
        chunk_indices: accepted for compatibility; not needed.
        use_gate_in_kernel: `g` holds logits; the decay is -exp(A_log) * softplus(g + dt_bias).
        A_log: [HV], with `use_gate_in_kernel`.
        dt_bias: [HV] or None, with `use_gate_in_kernel`.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state ([N, HV, K, V] float32, or float64) or None.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape, device, head count, offset or combination of options is not allowed, or the tensors are on
            a device whose kernels are not loaded.
    """
    del cu_seqlens_cpu, chunk_indices
    call = _prepare(
        q, k, v, g, beta, scale, initial_state, cu_seqlens, state_v_first,
        use_gate=use_gate_in_kernel, A_log=A_log, dt_bias=dt_bias,
        use_beta_sigmoid=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip
    return _chunk(call, use_qk_l2norm_in_kernel, output_final_state, state_v_first)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule without a gate: `chunk_gated_delta_rule` with g = 0, which is not computed.

    Source: Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    arXiv 2406.06484. Arguments, returns and errors as there.
    """
    call = _prepare(q, k, v, None, beta, scale, initial_state, cu_seqlens, state_v_first, has_gate=False)
    return _chunk(call, use_qk_l2norm_in_kernel, output_final_state, state_v_first)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` computed token by token: for short inputs, and in float32 without tensor cores.

    Differentiable; the gradient is that of the chunked form, which on CUDA takes K up to 128. `g` may be None (no
    decay) and `beta` None (ones). Gates per channel (`gk`, `gv`) are not part of this operator and must be None.
    Other arguments, returns and errors as in `chunk_gated_delta_rule`.
    """
    for name, gate in (("gk", gk), ("gv", gv)):
        if gate is not None:
            raise ValueError(f"{name} must be None: gates per channel are not part of the gated delta rule")
    if beta is None:
        if use_beta_sigmoid_in_kernel:
            raise ValueError("use_beta_sigmoid_in_kernel=True needs beta, got None")
        beta = check.is_tensor(v, "v").new_ones(v.shape[:-1])
    call = _prepare(
        q, k, v, g, beta, scale, initial_state, cu_seqlens, state_v_first, has_gate=g is not None or use_gate_in_kernel,
        use_gate=use_gate_in_kernel, A_log=A_log, dt_bias=dt_bias,
        use_beta_sigmoid=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip
    return _recurrent(call, use_qk_l2norm_in_kernel, output_final_state, state_v_first)


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_delta_rule` computed token by token; `beta` None means ones. Arguments, returns and errors as there."""
    return fused_recurrent_gated_delta_rule(
        q, k, v, beta=beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, state_v_first=state_v_first,
    )  # fmt: skip


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> Tensor:
    """One decode step (or T of them) of the gated delta rule; updates `state` in place. Not differentiable.

    Args:
        q, k: [N, T, H, K]; v: [N, T, HV, V]; g, beta: [N, T, HV], as in `chunk_gated_delta_rule`; usually T = 1.
            `g` may be None: no decay.
        state: [slots, HV, K, V] contiguous float32 (float64 for float64 q) pool of states, updated in place;
            [slots, HV, V, K] with `state_v_first`.
        state_indices: [N] int32 or int64, the slot of each sequence. A sequence whose index is outside 0...slots - 1
            (by convention -1) is skipped: no state is read or written, its output is zero. The indices of one call
            must otherwise be distinct. Default: sequence n has slot n, and the pool has N slots.
        Other arguments as in `chunk_gated_delta_rule`.

    Returns:
        o [N, T, HV, V] in the dtype of v.

    Raises:
        TypeError, ValueError: as `chunk_gated_delta_rule`; and ValueError if `state` is not contiguous or an input
            requires a gradient while gradients are enabled.
    """
    inputs = check_inputs(q, k, v, gates_of(g, beta, g is not None or use_gate_in_kernel), scale)
    A_log, dt_bias = check_gate_parameters(use_gate_in_kernel, A_log, dt_bias, inputs)
    check_beta_options(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    state_indices = check_pool(state, inputs, state_indices, state_v_first)
    if needs_grad(q, k, v, g, beta, state, A_log, dt_bias):
        raise ValueError("gated_delta_rule_step has no gradient: call it under torch.no_grad()")
    o: Tensor = torch.ops.remora.gated_delta_rule_step_(
        inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, state, state_indices, None, 1, A_log, dt_bias,
        inputs.scale, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first,
    )  # fmt: skip
    return o
