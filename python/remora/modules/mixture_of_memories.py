"""The Mixture-of-Memories layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remora.modules.cache import Cache, LayerCache
from remora.modules.convolution import ShortConvolution
from remora.modules.gated_delta_net import reset_decay
from remora.modules.grouped_linear import GroupedLinear
from remora.modules.normalization import GatedRMSNorm, RMSNorm
from remora.ops import (
    RoutePlan,
    causal_conv1d,
    causal_conv1d_step,
    mom_gated_delta_rule,
    mom_gated_delta_rule_step,
    mom_route,
    mom_simple_gla,
    mom_simple_gla_step,
    route_plan,
)

MemoryMixer = Literal["gated_delta_rule", "simple_gla"]
Drop = Literal["newest", "oldest"]


class Routing(NamedTuple):
    """What the router of one layer did in one call.

    Attributes:
        balance_loss: scalar fp32 with a gradient; `topk` for a router that uses all memories alike.
        z_loss: scalar fp32 with a gradient, the mean squared log-sum-exp of the router's logits.
        hits: `[M]`, how many tokens chose each memory.
    """

    balance_loss: Tensor
    z_loss: Tensor
    hits: Tensor


class _Projected(NamedTuple):
    """The tokens as their memories see them, before the convolutions; `J` choices of `R = B * T` tokens.

    Attributes:
        q, k, v: `[J, R, H * K]`, `[J, R, H * K]`, `[J, R, H * V]`.
        g: log decay, `[J, R, H]` fp32.
        beta: write strength, `[J, R, H]` fp32, of the gated delta rule.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None


def _sort_choices(memories: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices `j * R + r` by memory, those of none last; their places; where each memory ends. For few tokens: a plan
    takes more launches.
    """
    by_memory, order = memories.where(memories >= 0, num_slots).flatten().sort(stable=True)
    slots = torch.arange(num_slots, device=memories.device)
    return order.int(), order.argsort().int(), torch.searchsorted(by_memory, slots, right=True, out_int32=True)


class MixtureOfMemories(nn.Module):
    """Token mixer with several memories, of which every token reads and writes the `topk` that a router picks for it.

    With `x` the input, `m` one of the chosen memories and `C_m` the tokens that chose it, per head:

        w, (m_1 ... m_k) = softmax over the k largest of W_r x
        q^m, k^m, v^m    = silu(conv_m(W_q x)), silu(conv_m(W_k^m x)), silu(conv_m(W_v^m x))   q, k then L2-normalised
        beta^m           = sigmoid(W_b^m x)
        g^m              = -exp(A_log) softplus(W_a^m x + dt_bias)
        o                = sum_j w_j read(S^{m_j}, q^{m_j}) + read(S^shared, q^shared)
        y                = W_o (rms_norm(o) silu(W_g x))

    `conv_m` and the recurrence of `S^m` run over the tokens of `C_m` alone, as if they were the whole sequence: a token
    that does not choose a memory neither decays nor writes it. The memory is that of `GatedDeltaNet`, or with
    `mixer="simple_gla"` linear attention that decays alike, S_t = e^{g_t} S_{t-1} + k_t v_t^T, without `beta` and
    without normalising q and k. The shared memory is chosen by every token, with weight one.

    Source: Du, Sun, Lan, Hu, Cheng, "MoM: Linear Sequence Modeling with Mixture-of-Memories" (2025).

    After a call, `routing` holds what the router did in it; None after a decode step, which computes no losses.

    Args:
        hidden_size: `D`, the size of input and output.
        head_dim: `K`, the key size of a head.
        num_heads: `H`.
        expand_v: `V / K`.
        num_memories: `M`, the number of memories among which the router chooses.
        topk: `k`, how many a token chooses.
        shared_memory: whether there is a memory that every token reads and writes.
        single_kv_proj: use one set of key, value and gate projections for all memories instead of one for each.
        mixer: how a memory is written: "gated_delta_rule" or "simple_gla".
        capacity: the most tokens a memory takes from a sequence in one call, the shared one aside. Those dropped
            neither write nor read it, and their other choices keep their weights. None takes all.
        drop: which tokens a full memory drops: the "newest", or the "oldest" as the first released implementation did,
            for which later tokens change what earlier ones read.
        conv_size: `W`, the number of taps of the short convolutions.
        conv_bias: whether the short convolutions have a bias.
        conv_across_segments: in training mode, let the window of the convolutions run from the tokens of one memory and
            sequence into those of the next, as the released implementation trains. It leaks between sequences and
            future tokens into earlier ones; for reproducing that implementation only.
        use_gate: whether the output is gated.
        layer_idx: the layer's key in a `Cache`; needed only for calls with one.
        norm_eps: epsilon of the output normalisation.

    Raises:
        ValueError: a size is not positive, `topk` exceeds `num_memories`, `head_dim * expand_v` is not an integer, or
            `mixer` or `drop` is unknown.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        head_dim: int = 256,
        num_heads: int = 4,
        expand_v: float = 1.0,
        num_memories: int = 4,
        topk: int = 2,
        shared_memory: bool = True,
        single_kv_proj: bool = False,
        mixer: MemoryMixer = "gated_delta_rule",
        capacity: int | None = None,
        drop: Drop = "newest",
        conv_size: int = 4,
        conv_bias: bool = False,
        conv_across_segments: bool = False,
        use_gate: bool = True,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(hidden_size, head_dim, num_heads, num_memories) < 1:
            raise ValueError(
                "hidden_size, head_dim, num_heads and num_memories must be positive, "
                f"got {hidden_size}, {head_dim}, {num_heads} and {num_memories}"
            )
        if not 1 <= topk <= num_memories:
            raise ValueError(f"topk must be in 1 ... num_memories={num_memories}, got {topk}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be positive or None, got {capacity}")
        if drop not in get_args(Drop):
            raise ValueError(f"drop must be one of {get_args(Drop)}, got {drop!r}")
        head_v_dim = round(head_dim * expand_v)
        if head_v_dim < 1 or not math.isclose(head_v_dim, head_dim * expand_v, rel_tol=1e-6):
            raise ValueError(f"head_dim * expand_v must be a positive integer, got {head_dim} * {expand_v}")
        if mixer not in get_args(MemoryMixer):
            raise ValueError(f"mixer must be one of {get_args(MemoryMixer)}, got {mixer!r}")

        self.hidden_size = hidden_size
        self.head_k_dim = head_dim
        self.head_v_dim = head_v_dim
        self.num_heads = num_heads
        self.key_dim = num_heads * head_dim
        self.value_dim = num_heads * head_v_dim
        self.num_memories = num_memories
        self.topk = topk
        self.shared_memory = shared_memory
        self.single_kv_proj = single_kv_proj
        self.mixer = mixer
        self.capacity = capacity
        self.drop: Drop = drop
        self.conv_across_segments = conv_across_segments
        self.layer_idx = layer_idx
        self.routing: Routing | None = None

        # Key, value, decay gate and, if the memory has one, write strength; the shared memory's maps are the last ones.
        self.projected_sizes = [self.key_dim, self.value_dim, num_heads]
        if mixer == "gated_delta_rule":
            self.projected_sizes.append(num_heads)
        self.num_slots = num_memories + int(shared_memory)
        self.router = nn.Linear(hidden_size, num_memories, bias=False)
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.memory_proj = GroupedLinear(
            1 if single_kv_proj else self.num_slots, hidden_size, sum(self.projected_sizes)
        )
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
        self.k_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
        self.v_conv1d = ShortConvolution(self.value_dim, conv_size, conv_bias)
        self.o_norm: GatedRMSNorm | RMSNorm
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
            self.o_norm = GatedRMSNorm(head_v_dim, norm_eps)
        else:
            self.o_norm = RMSNorm(head_v_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the decay as `GatedDeltaNet` does."""
        reset_decay(self.A_log, self.dt_bias)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens along time.

        Args:
            hidden_states: `[B, T, D]`; `[1, T, D]` with `cu_seqlens`.
            cache: continue from, and update, this layer's states. With gradients disabled, a call with one token a
                sequence on a filled cache is a decode step: it works in place.
            cu_seqlens: `[N + 1]` integer, boundaries of the sequences packed in one row.
            attention_mask: `[B, T]`, nonzero for tokens; the others are padding, wherever they stand: they reach no
                memory and no convolution, and count in no loss.

        Returns:
            `[B, T, D]` like `hidden_states`.

        Raises:
            ValueError: a shape does not fit, or a cache is given to a layer without `layer_idx`.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(f"hidden_states must be [B, T, {self.hidden_size}], got {list(hidden_states.shape)}")
        batch, seqlen = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.shape != (batch, seqlen):
            raise ValueError(f"attention_mask must be {[batch, seqlen]}, got {list(attention_mask.shape)}")
        past: LayerCache | None = None
        if cache is not None:
            if self.layer_idx is None:
                raise ValueError("a MixtureOfMemories called with a cache needs a layer_idx, got None")
            past = cache.get(self.layer_idx)

        mask = None if attention_mask is None else attention_mask != 0
        is_decode_step = past is not None and cu_seqlens is None and seqlen == 1 and not torch.is_grad_enabled()
        weights, indices, balance_loss, z_loss, hits = mom_route(
            self.router(hidden_states), self.topk, mask=mask, with_losses=not is_decode_step
        )
        self.routing = None
        if balance_loss is not None and z_loss is not None and hits is not None:
            self.routing = Routing(balance_loss, z_loss, hits)

        memories = self._memories(indices, mask) if is_decode_step else None
        projected = self._project(hidden_states, indices, mask, memories)
        if past is not None and memories is not None:
            o = self._step(projected, weights, indices, memories, past)
        else:
            o = self._scan(projected, weights, indices, past, cache, cu_seqlens, mask)
        if isinstance(self.o_norm, GatedRMSNorm):
            o = self.o_norm(o, self.g_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_v_dim)))
        else:
            o = self.o_norm(o)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def _memories(self, indices: Tensor, mask: Tensor | None) -> Tensor:
        """The memory of each choice, `[J, R]` int32; negative for none, `M` for the shared one."""
        memories = indices.flatten(0, 1).mT.int()
        if not self.shared_memory:
            return memories
        shared = memories.new_full((1, memories.shape[1]), self.num_memories)
        return torch.cat([memories, shared if mask is None else shared.where(mask.view(1, -1), -1)])

    def _plan_all(self, indices: Tensor, mask: Tensor | None) -> RoutePlan:
        """The choices `j * R + r` by memory, over all sequences."""
        return route_plan(
            indices.reshape(1, -1, self.topk),
            self.num_memories,
            shared_memory=self.shared_memory,
            mask=None if mask is None else mask.reshape(1, -1),
        )

    def _project(
        self, hidden_states: Tensor, indices: Tensor, mask: Tensor | None, memories: Tensor | None
    ) -> _Projected:
        """Project every token for each of its memories; `memories` of a decode step."""
        x = hidden_states.flatten(0, 1)
        num_tokens = x.shape[0]
        num_choices = self.topk + int(self.shared_memory)
        q = self.q_proj(x)
        sizes = [self.key_dim, self.value_dim, sum(self.projected_sizes[2:])]
        if self.single_kv_proj:
            parts = F.linear(x, self.memory_proj.weight[0]).split(sizes, dim=-1)
            k, v, gates = (y.expand(num_choices, -1, -1) for y in parts)
        else:
            if memories is None:
                plan = self._plan_all(indices, mask)
                order, positions, ends = plan.rows, plan.positions, plan.cu_seqlens[1:]
            else:
                order, positions, ends = _sort_choices(memories, self.num_slots)
            parts = self.memory_proj(x.to(q.dtype), order, positions, ends, sizes)
            k, v, gates = (y.unflatten(0, (num_choices, num_tokens)) for y in parts)
        a, *b = gates.split(self.num_heads, dim=-1)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        beta = b[0].float().sigmoid() if b else None
        return _Projected(q.expand(num_choices, -1, -1), k, v, g, beta)

    def _scan(
        self,
        projected: _Projected,
        weights: Tensor,
        indices: Tensor,
        past: LayerCache | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Run convolutions and recurrence over whole sequences; return the mixed reads `[B, T, H, V]`."""
        segments: dict[str, Any] = {
            "num_memories": self.num_memories,
            "shared_memory": self.shared_memory,
            "cu_seqlens": cu_seqlens,
            "mask": mask,
            "capacity": self.capacity,
            "drop": self.drop,
        }
        plan = route_plan(indices, **segments)
        rows, bounds = plan.rows, plan.cu_seqlens
        if self.conv_across_segments and self.training and cache is None:
            rows, bounds = self._released_segments(indices, cu_seqlens, mask)
        num_sequences = indices.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        histories: Sequence[Tensor | None] = (None, None, None)
        if past is not None:
            histories = past.conv_states[0].flatten(0, 1).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        tokens, tails = [], []
        for x, convolution, history in zip(projected[:3], self._convolutions, histories, strict=True):
            y, tail = causal_conv1d(
                x,
                convolution.weight[:, 0].float(),
                None if convolution.bias is None else convolution.bias.float(),
                activation="silu",
                initial_state=history,
                output_final_state=cache is not None,
                cu_seqlens=bounds,
                rows=rows,
            )
            tokens.append(y)
            if tail is not None:
                tails.append(tail)
        q, k, v, g, beta = self._per_token(tokens, projected, indices.shape[:2])
        segments |= {
            "plan": plan,
            "initial_state": None if past is None else past.recurrent_state,
            "output_final_state": cache is not None,
        }
        if beta is None:
            o, state = mom_simple_gla(q, k, v, g, weights, indices, **segments)
        else:
            o, state = mom_gated_delta_rule(
                q, k, v, g, beta, weights, indices, use_qk_l2norm_in_kernel=True, **segments
            )
        if cache is not None and self.layer_idx is not None and state is not None:
            conv_state = torch.cat(tails, dim=-1).unflatten(0, (num_sequences, self.num_slots))
            cache.set(self.layer_idx, LayerCache((conv_state,), state))
        return o

    def _step(
        self, projected: _Projected, weights: Tensor, indices: Tensor, memories: Tensor, past: LayerCache
    ) -> Tensor:
        """Decode one token of each sequence, in place; return the mixed reads `[B, 1, H, V]`."""
        q, k, v = projected[:3]
        filters = torch.cat([convolution.weight[:, 0].float() for convolution in self._convolutions])
        biases = [convolution.bias.float() for convolution in self._convolutions if convolution.bias is not None]
        y = causal_conv1d_step(
            torch.cat([q, k, v], dim=-1),
            filters,
            torch.cat(biases) if biases else None,
            past.conv_states[0].flatten(0, 1),
            activation="silu",
            memories=memories,
            num_memories=self.num_slots,
        )
        tokens = y.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k, v, g, beta = self._per_token(tokens, projected, indices.shape[:2])
        pool: Tensor = past.recurrent_state
        if beta is None:
            return mom_simple_gla_step(q, k, v, g, weights, indices, pool, shared_memory=self.shared_memory)
        return mom_gated_delta_rule_step(
            q, k, v, g, beta, weights, indices, pool, shared_memory=self.shared_memory, use_qk_l2norm_in_kernel=True
        )

    @property
    def _convolutions(self) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def _per_token(
        self, tokens: Sequence[Tensor], projected: _Projected, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Give q, k, v, g and beta `[J, B * T, H * *]` the operators' shape `[B, T, J, H, *]`; nothing is copied."""

        def per_token(x: Tensor) -> Tensor:
            y: Tensor = x.unflatten(1, tuple(shape))
            return y.movedim(0, 2)

        q, k, v = (per_token(x.unflatten(-1, (self.num_heads, -1))) for x in tokens)
        beta = projected.beta
        return q, k, v, per_token(projected.g), None if beta is None else per_token(beta)

    def _released_segments(
        self, indices: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows and bounds of convolutions that run through all memories of all sequences, one memory after the other.

        The shared memory's run through each sequence, as they should.
        """
        plan = self._plan_all(indices, mask)
        num_routed = plan.cu_seqlens[self.num_memories :][:1]
        bounds = [torch.zeros_like(num_routed), num_routed]
        if self.shared_memory:
            if cu_seqlens is None:
                ends = torch.arange(1, indices.shape[0] + 1, device=indices.device) * indices.shape[1]
            else:
                ends = cu_seqlens[1:].long()
            if mask is not None:
                ends = F.pad(mask.flatten().cumsum(0), (1, 0))[ends]
            bounds.append(num_routed + ends)
        return plan.rows, torch.cat(bounds).int()
