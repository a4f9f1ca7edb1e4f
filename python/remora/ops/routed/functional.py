"""Mixture-of-Memories: what users call. Arguments are checked and brought into the operators' form here.

Source: Du, Sun, Lan, Hu, Cheng, "MoM: Linear Sequence Modeling with Mixture-of-Memories", arXiv 2502.13685. A choice is
one memory a token is sent to; a token has J = k of them, and one more with a shared memory. A row is j * B * T + b * T
+ t for choice j of token (b, t). Memory m of sequence n is segment n * memories + m, memories = M (+ 1 if shared).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.recurrence.gated_delta_rule.functional import (
    check_beta_options,
    check_gate_parameters,
    gates_of,
    map_gates,
)
from remora.ops.recurrence.inputs import (
    TokenInputs,
    check_chunk_head_dim,
    check_inputs,
    check_state,
    check_state_indices,
    needs_grad,
)
from remora.ops.recurrence.simple_gla import functional as simple_gla


class MomRoute(NamedTuple):
    """Weights [B, T, k] float32 and indices [B, T, k] int32 of the choices; losses; hits [M] int32 of the memories.
    Without losses, the last three are None.
    """

    weights: Tensor
    indices: Tensor
    balance_loss: Tensor | None
    z_loss: Tensor | None
    hits: Tensor | None


class RoutePlan(NamedTuple):
    """The tokens of every memory: `rows` [J * B * T] int32, grouped by segment, in order of time and then of choice;
    dropped choices at the end. Segment s is rows[cu_seqlens[s]] ... rows[cu_seqlens[s + 1] - 1]. `positions` is the
    inverse of `rows`; `counts` [N * memories] are the choices of each segment before capacity.
    """

    rows: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    counts: Tensor


def _check_mask(mask: Tensor | None, like: Tensor, name: str) -> Tensor | None:
    if mask is None:
        return None
    check.is_tensor(mask, "mask")
    check.has_dtype(mask, "mask", (torch.bool,))
    check.has_shape(mask, "mask", "[B, T]", like.shape[:2])
    check.same_device(mask, "mask", like, name)
    return mask.reshape(-1).contiguous().to(torch.uint8)


def mom_route(
    logits: Tensor, topk: int, *, mask: Tensor | None = None, renormalize: bool = True, with_losses: bool = True
) -> MomRoute:
    """Sends every token to the `topk` memories with the largest logits.

        p_t = softmax(logits_t)                 w_t = softmax(the k chosen logits), or p of the chosen
        balance = M sum_e f_e P_e               f_e, P_e: means over tokens of [e chosen] and of p_te
        z = mean over tokens of logsumexp(logits_t)^2

    Balanced routing has balance = k. Equal logits are chosen in order of the memory; choices are in falling order.
    NaN ranks as -inf: indices are always valid and distinct, and a NaN logit makes the token's weights and both losses
    NaN. All of it in float32 (float64 for float64), and the gradient is exact, that of the losses included.

    Args:
        logits: [B, T, M] float64 (CPU only), float32, bfloat16 or float16.
        topk: k, 1 ... M.
        mask: [B, T] bool, True for real tokens. Padding has weights 0, indices -1 and no part in the losses.
        renormalize: whether the weights of a token sum to one.
        with_losses: whether to compute losses and hits; a decoding step needs none.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    check.is_tensor(logits, "logits")
    _ext.require_backend(logits, "logits")
    check.has_dtype(logits, "logits", check.FLOATS if _ext.runs_on_cpu_kernels(logits) else check.FLOATS[1:])
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape [B, T, M], got {list(logits.shape)}")
    B, T, M = logits.shape
    check.in_range(topk, f"topk (M = {M})", 1, M)
    real = _check_mask(mask, logits, "logits")
    weights, indices, _, losses, counts = torch.ops.remora.mom_route_fwd(
        logits.reshape(B * T, M).contiguous(), real, topk, renormalize, with_losses
    )
    weights, indices = weights.view(B, T, topk), indices.view(B, T, topk)
    if not with_losses:
        return MomRoute(weights, indices, None, None, None)
    return MomRoute(weights, indices, losses[0], losses[1], counts[:M])


def route_plan(
    indices: Tensor,
    num_memories: int,
    *,
    cu_seqlens: Tensor | None = None,
    shared_memory: bool = False,
    capacity: int | None = None,
    drop: str = "newest",
    mask: Tensor | None = None,
) -> RoutePlan:
    """Groups the choices of all tokens by sequence and memory: a stable counting sort on the device. Sizes depend on
    shapes alone and nothing is read by the host.

    Args:
        indices: [B, T, k] int32 or int64 memories; a choice outside 0 ... num_memories - 1 is dropped.
        num_memories: M.
        cu_seqlens: [N + 1] offsets of sequences packed along T (B = 1); tokens outside every sequence are dropped.
        shared_memory: adds choice k of every token, memory M.
        capacity: how many choices a segment keeps, those of the shared memory excepted; default all.
        drop: which of them go where there are more: the "newest", or the "oldest", for which later tokens change what
            earlier ones read.
        mask: [B, T] bool, True for real tokens; others are dropped.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    check.is_tensor(indices, "indices")
    _ext.require_backend(indices, "indices")
    check.has_dtype(indices, "indices", (torch.int32, torch.int64))
    if indices.dim() != 3 or indices.shape[2] == 0:
        raise ValueError(f"indices must have shape [B, T, k] with k >= 1, got {list(indices.shape)}")
    B, T, k = indices.shape
    check.in_range(num_memories, "num_memories", 1, 2**31 - 2)
    if drop not in ("oldest", "newest"):
        raise ValueError(f"drop must be 'oldest' or 'newest', got {drop!r}")
    if capacity is not None:
        check.in_range(capacity, "capacity", 0, 2**31 - 1)
    if cu_seqlens is not None:
        check.is_tensor(cu_seqlens, "cu_seqlens")
        check.sequence_offsets(cu_seqlens, B, T)
        check.same_device(cu_seqlens, "cu_seqlens", indices, "indices")
        cu_seqlens = cu_seqlens.clamp(0, T).to(torch.int32).contiguous()
    real = _check_mask(mask, indices, "indices")
    flat = indices.reshape(B * T, k).clamp(-1, num_memories).to(torch.int32).contiguous()
    return RoutePlan(
        *torch.ops.remora.route_plan(
            flat, cu_seqlens, real, T, num_memories, shared_memory, -1 if capacity is None else capacity,
            drop == "oldest",
        )
    )  # fmt: skip


def mom_combine(o: Tensor, weights: Tensor) -> Tensor:
    """o_t = sum_j w_tj o_jt in float32, in order of choices. A choice without weight, the shared one, has one.

    Args:
        o: [J, B * T, HV, V] outputs of the choices.
        weights: [B, T, k] float32 (float64 for float64 o), J = k or k + 1.

    Returns:
        [B, T, HV, V] in the dtype of o. Differentiable in both.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape or device that is not allowed.
    """
    check.is_tensor(o, "o")
    check.is_tensor(weights, "weights")
    _ext.require_backend(o, "o")
    check.has_dtype(o, "o", check.FLOATS if _ext.runs_on_cpu_kernels(o) else check.FLOATS[1:])
    if weights.dim() != 3:
        raise ValueError(f"weights must have shape [B, T, k], got {list(weights.shape)}")
    B, T, k = weights.shape
    check.has_shape(o, "o", "[J, B * T, HV, V]", [None, B * T, None, None])
    if o.shape[0] not in (k, k + 1):
        raise ValueError(f"o must have k = {k} or k + 1 choices, got {o.shape[0]}")
    check.same_device(weights, "weights", o, "o")
    check.has_dtype(weights, "weights", check.FLOATS)
    wide = torch.float64 if o.dtype == torch.float64 else torch.float32
    out: Tensor = torch.ops.remora.mom_combine_fwd(
        o.flatten(2).contiguous(), weights.reshape(B * T, k).to(wide).contiguous()
    )
    return out.view(B, T, *o.shape[2:])


def _by_choice(x: Tensor, name: str, dims: int, B: int, T: int, J: int) -> Tensor:
    """[B, T, ...] or [B, T, J, ...] as [J, B * T, ...], without a copy where strides allow."""
    check.is_tensor(x, name)
    if x.dim() not in (dims, dims + 1) or x.shape[:2] != (B, T) or (x.dim() > dims and x.shape[2] != J):
        raise ValueError(f"{name} must start with [B, T] = [{B}, {T}] or [B, T, J] = [{B}, {T}, {J}], and have "
                         f"{dims} or {dims + 1} dimensions, got {list(x.shape)}")  # fmt: skip
    if x.dim() == dims:
        return x.reshape(B * T, *x.shape[2:]).expand(J, B * T, *x.shape[2:])
    return x.movedim(2, 0).flatten(1, 2)


def _check_choices(weights: Tensor, indices: Tensor) -> None:
    check.is_tensor(weights, "weights")
    check.is_tensor(indices, "indices")
    check.has_dtype(indices, "indices", (torch.int32, torch.int64))
    if indices.dim() != 3 or indices.shape[2] == 0:
        raise ValueError(f"indices must have shape [B, T, k] with k >= 1, got {list(indices.shape)}")
    check.has_shape(weights, "weights", "[B, T, k] (as indices)", indices.shape)


def _inputs_by_choice(
    q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], weights: Tensor, indices: Tensor, scale: float | None,
    shared_memory: bool,
) -> TokenInputs:  # fmt: skip
    _check_choices(weights, indices)
    B, T, topk = indices.shape
    J = topk + (1 if shared_memory else 0)
    q, k, v = (_by_choice(x, name, 4, B, T, J) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    return check_inputs(q, k, v, {name: _by_choice(x, name, 3, B, T, J) for name, x in gates.items()}, scale)


class _Segments(NamedTuple):
    """The sequences of all memories: their plan, their states [N * memories, ...] and how many they are."""

    plan: RoutePlan
    initial_state: Tensor | None
    sizes: tuple[int, int]  # N, memories


def _segments(
    x: TokenInputs, indices: Tensor, num_memories: int, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    shared_memory: bool, capacity: int | None, drop: str, mask: Tensor | None, plan: RoutePlan | None,
    state_v_first: bool,
) -> _Segments:  # fmt: skip
    check_chunk_head_dim(x.q)
    B, T, topk = indices.shape
    shared = 1 if shared_memory else 0
    J, memories = topk + shared, num_memories + shared
    if plan is None:
        plan = route_plan(
            indices, num_memories, cu_seqlens=cu_seqlens, shared_memory=shared_memory, capacity=capacity, drop=drop,
            mask=mask,
        )  # fmt: skip
    check.has_shape(plan.rows, "plan.rows", "[J * B * T]", [J * B * T])
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check.has_shape(plan.cu_seqlens, "plan.cu_seqlens", "[N * memories + 1]", [N * memories + 1])
    state = None
    if initial_state is not None:
        check.is_tensor(initial_state, "initial_state")
        if initial_state.dim() != 5 or initial_state.shape[:2] != (N, memories):
            raise ValueError(f"initial_state must have shape [N, memories, HV, K, V] with N = {N}, "
                             f"memories = {memories}, got {list(initial_state.shape)}")  # fmt: skip
        state = initial_state.flatten(0, 1)
        check_state(state, "initial_state", x, N * memories, state_v_first)
        state = state.contiguous()
    return _Segments(plan, state, (N, memories))


class _Choices(NamedTuple):
    """What a step works on: the pool [slots * memories, ...], the slots of its sequences, the memories [J, N] of their
    choices, and how many memories a slot has.
    """

    pool: Tensor
    state_indices: Tensor | None
    memories: Tensor
    num_memories: int


def _choices(
    x: TokenInputs, indices: Tensor, state: Tensor, state_indices: Tensor | None, shared_memory: bool, v_first: bool
) -> _Choices:
    N, T, topk = indices.shape
    if T != 1:
        raise ValueError(f"indices must have T = 1 in a step, got T = {T}")
    check.is_tensor(state, "state")
    if state.dim() != 5 or not state.is_contiguous() or state.shape[1] <= shared_memory:
        raise ValueError(f"state must be contiguous [slots, memories, HV, K, V], got {list(state.shape)}")
    slots, memories = state.shape[:2]
    pool = state.view(-1, *state.shape[2:])
    check_state(pool, "state", x, None, v_first)
    if state_indices is None:
        check.in_range(slots, "the slots of state without state_indices (N)", N, N)
    state_indices = check_state_indices(state_indices, x, N, slots)
    num_memories = memories - (1 if shared_memory else 0)
    chosen = indices.view(N, topk).t()
    chosen = torch.where((chosen >= 0) & (chosen < num_memories), chosen, -1).to(torch.int32)
    if shared_memory:
        chosen = torch.cat([chosen, chosen.new_full((1, N), num_memories)])
    return _Choices(pool, state_indices, chosen.contiguous(), memories)


def mom_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    weights: Tensor,
    indices: Tensor,
    num_memories: int,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    shared_memory: bool = False,
    capacity: int | None = None,
    drop: str = "newest",
    mask: Tensor | None = None,
    plan: RoutePlan | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over the tokens that each memory is sent, and the weighted sum of what they answer.

        S^m_t = chunk_gated_delta_rule of the tokens with m among their choices; other tokens leave S^m as it is
        o_t = sum_j w_tj scale (S^{m_tj}_t)^T q_tj  (+ that of the shared memory)

    Args:
        q, k: [B, T, H, K], v: [B, T, HV, V], g, beta: [B, T, HV], shared by the choices of a token; or each with a
            dimension J after T, different for every choice. g None: no decay.
        weights, indices: [B, T, k] of `mom_route`. An index outside 0 ... M - 1 is no choice.
        num_memories: M.
        initial_state: [N, M(+1), HV, K, V] float32 (float64 for float64 q); default zero.
        shared_memory: memory M gets every token, as choice k, with weight one.
        capacity, drop, mask: as in `route_plan`. A dropped choice adds nothing; weights are not redistributed.
        plan: that of `route_plan` for these indices and options, if it is at hand.
        Other arguments as in `chunk_gated_delta_rule`.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final states or None. A memory without tokens returns its initial
        state. Differentiable in all tensors, weights and states included.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    if use_gate_in_kernel and g is None:
        raise ValueError("use_gate_in_kernel=True needs g, got None")
    gates = gates_of(g, beta, g is not None)
    x = _inputs_by_choice(q, k, v, gates, weights, indices, scale, shared_memory)
    A_log, dt_bias = check_gate_parameters(use_gate_in_kernel, A_log, dt_bias, x)
    check_beta_options(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    x = map_gates(x, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    plan, state, sizes = _segments(
        x, indices, num_memories, initial_state, cu_seqlens, shared_memory, capacity, drop, mask, plan, state_v_first
    )
    tensors = (x.q, x.k, x.v, x.g, x.beta, state)
    o, final_state, _ = torch.ops.remora.gated_delta_rule_fwd(
        *tensors, plan.cu_seqlens, plan.rows, x.scale, use_qk_l2norm_in_kernel, output_final_state, state_v_first,
        needs_grad(*tensors),
    )  # fmt: skip
    return mom_combine(o, weights), final_state.unflatten(0, sizes) if output_final_state else None


def mom_gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    weights: Tensor,
    indices: Tensor,
    state: Tensor,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    shared_memory: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> Tensor:
    """One decode step of `mom_gated_delta_rule`: touches the states of the chosen (and shared) memories only.

    Args:
        q, k, v, g, beta, weights, indices: as there, with T = 1 and B = N. The indices of a token must be distinct.
        state: [slots, M(+1), HV, K, V] contiguous pool, updated in place.
        state_indices: [N] slot of each sequence, as in `gated_delta_rule_step`; default n.
        Other arguments as there.

    Returns:
        o [N, 1, HV, V]. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed, or requires a
            gradient while gradients are enabled.
    """
    if use_gate_in_kernel and g is None:
        raise ValueError("use_gate_in_kernel=True needs g, got None")
    gates = gates_of(g, beta, g is not None)
    x = _inputs_by_choice(q, k, v, gates, weights, indices, scale, shared_memory)
    A_log, dt_bias = check_gate_parameters(use_gate_in_kernel, A_log, dt_bias, x)
    check_beta_options(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    pool, state_indices, memories, num_memories = _choices(
        x, indices, state, state_indices, shared_memory, state_v_first
    )
    if needs_grad(q, k, v, g, beta, weights, state, A_log, dt_bias):
        raise ValueError("mom_gated_delta_rule_step has no gradient: call it under torch.no_grad()")
    o = torch.ops.remora.gated_delta_rule_step_(
        x.q, x.k, x.v, x.g, x.beta, pool, state_indices, memories, num_memories, A_log, dt_bias, x.scale,
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first,
    )  # fmt: skip
    return mom_combine(o, weights)


def mom_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    num_memories: int,
    *,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    shared_memory: bool = False,
    capacity: int | None = None,
    drop: str = "newest",
    mask: Tensor | None = None,
    plan: RoutePlan | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with scalar decay over the tokens that each memory is sent, and the weighted sum of its answers.

        S^m_t = chunk_simple_gla of the tokens with m among their choices; other tokens leave S^m as it is
        o_t = sum_j w_tj scale (S^{m_tj}_t)^T q_tj  (+ that of the shared memory)

    Args:
        q, k, v, g, weights, indices, num_memories: as in `mom_gated_delta_rule`.
        g_gamma: [HV] constant decay, added to g.
        Other arguments as in `mom_gated_delta_rule` and `chunk_simple_gla`.

    Returns:
        As `mom_gated_delta_rule`.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    x = _inputs_by_choice(q, k, v, simple_gla.gates_of(g), weights, indices, scale, shared_memory)
    x = simple_gla.add_constant_decay(x, g_gamma)
    plan, state, sizes = _segments(
        x, indices, num_memories, initial_state, cu_seqlens, shared_memory, capacity, drop, mask, plan, state_v_first
    )
    tensors = (x.q, x.k, x.v, x.g, state)
    saves_states = needs_grad(*tensors)
    simple_gla.check_kernel_limits(x, saves_states)
    o, final_state, _ = torch.ops.remora.simple_gla_fwd(
        *tensors, plan.cu_seqlens, plan.rows, x.scale, output_final_state, state_v_first, saves_states
    )
    return mom_combine(o, weights), final_state.unflatten(0, sizes) if output_final_state else None


def mom_simple_gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    state: Tensor,
    *,
    g_gamma: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    shared_memory: bool = False,
    state_v_first: bool = False,
) -> Tensor:
    """One decode step of `mom_simple_gla`: touches the states of the chosen (and shared) memories only.

    Arguments, returns and errors as in `mom_gated_delta_rule_step`; `g_gamma` as in `mom_simple_gla`.
    """
    x = _inputs_by_choice(q, k, v, simple_gla.gates_of(g), weights, indices, scale, shared_memory)
    x = simple_gla.add_constant_decay(x, g_gamma)
    pool, state_indices, memories, num_memories = _choices(
        x, indices, state, state_indices, shared_memory, state_v_first
    )
    if needs_grad(q, k, v, g, g_gamma, weights, state):
        raise ValueError("mom_simple_gla_step has no gradient: call it under torch.no_grad()")
    o = torch.ops.remora.simple_gla_step_(
        x.q, x.k, x.v, x.g, pool, state_indices, memories, num_memories, x.scale, state_v_first
    )
    return mom_combine(o, weights)
