"""The Gated DeltaNet layer."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remora.modules.cache import Cache, LayerCache
from remora.modules.convolution import ShortConvolution
from remora.modules.normalization import GatedRMSNorm, RMSNorm
from remora.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, gated_delta_rule_step

Mode = Literal["chunk", "fused_recurrent"]

# The step size softplus(dt_bias) starts log-uniform between these, as in Mamba-2 and Gated DeltaNet.
DT_MIN, DT_MAX = 1e-3, 1e-1
# The decay rate exp(A_log) starts uniform between these; the lower bound keeps A_log finite.
A_MIN, A_MAX = 1e-4, 16.0


@torch.no_grad()
def reset_decay(A_log: Tensor, dt_bias: Tensor) -> None:
    """Draw `exp(A_log)` uniform in (0, 16) and `softplus(dt_bias)` log-uniform in [0.001, 0.1]."""
    nn.init.uniform_(A_log, A_MIN, A_MAX)
    A_log.log_()
    nn.init.uniform_(dt_bias, math.log(DT_MIN), math.log(DT_MAX))
    step = dt_bias.exp()
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


class GatedDeltaNet(nn.Module):
    """Token mixer whose memory is a matrix, decayed by a gate and written by the delta rule.

    With `x` the input, per value head (its query and key head is shared by `num_v_heads / num_heads` value heads):

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))       q, k then L2-normalised
        beta    = sigmoid(W_b x)                    (twice that with allow_neg_eigval)
        g       = -exp(A_log) softplus(W_a x + dt_bias)
        S_t     = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T
        o_t     = K^{-1/2} S_t^T q_t
        y_t     = W_o (rms_norm(o_t) silu(W_g x))

    Sources: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (ICLR 2025); negative
    eigenvalues: Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (ICLR 2025).
    Parameter names are those of flash-linear-attention's layer, so its weights load as they are.

    Args:
        hidden_size: `D`, the size of input and output.
        expand_v: `V / K`.
        head_dim: `K`, the key size of a head. The defaults of `head_dim` and `num_heads` give the widths of the paper
            (`0.75 D` for keys) in heads of 128, the size the CUDA kernels are tuned for.
        num_heads: `H`, the number of query and key heads.
        num_v_heads: `HV`, the number of value heads, a multiple of `num_heads`; None means `num_heads`.
        mode: "chunk" (parallel within chunks of tokens) or "fused_recurrent" (token by token).
        use_gate: whether the output is gated.
        use_short_conv: whether q, k, v pass a short convolution; without it they only pass SiLU.
        allow_neg_eigval: let beta reach 2, so that a state transition may have eigenvalues down to -1.
        conv_size: `W`, the number of taps of the short convolutions.
        conv_bias: whether the short convolutions have a bias.
        layer_idx: the layer's key in a `Cache`; needed only for calls with one.
        norm_eps: epsilon of the output normalisation.

    Raises:
        ValueError: a size is not positive, `head_dim * expand_v` is not an integer, `num_v_heads` is not a multiple of
            `num_heads`, or `mode` is unknown.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2.0,
        head_dim: int = 128,
        num_heads: int = 12,
        num_v_heads: int | None = None,
        mode: Mode = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        if min(hidden_size, head_dim, num_heads, num_v_heads) < 1:
            raise ValueError(
                "hidden_size, head_dim, num_heads and num_v_heads must be positive, "
                f"got {hidden_size}, {head_dim}, {num_heads} and {num_v_heads}"
            )
        if num_v_heads % num_heads != 0:
            raise ValueError(f"num_v_heads must be a multiple of num_heads={num_heads}, got {num_v_heads}")
        head_v_dim = round(head_dim * expand_v)
        if head_v_dim < 1 or not math.isclose(head_v_dim, head_dim * expand_v, rel_tol=1e-6):
            raise ValueError(f"head_dim * expand_v must be a positive integer, got {head_dim} * {expand_v}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")

        self.hidden_size = hidden_size
        self.head_k_dim = head_dim
        self.head_v_dim = head_v_dim
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.key_dim = num_heads * head_dim
        self.value_dim = num_v_heads * head_v_dim
        self.mode = mode
        self.use_gate = use_gate
        self.use_short_conv = use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        self.layer_idx = layer_idx

        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads))
        if use_short_conv:
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
        """Initialise the gate: `exp(A_log)` uniform in (0, 16), `softplus(dt_bias)` log-uniform in [0.001, 0.1]."""
        reset_decay(self.A_log, self.dt_bias)

    def forward(self, hidden_states: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix tokens along time.

        Args:
            hidden_states: `[B, T, D]`; `[1, T, D]` with `cu_seqlens`.
            cache: continue from, and update, this layer's state. With gradients disabled, a call with one token a
                sequence on a filled cache is a decode step: it works in place.
            cu_seqlens: `[N + 1]` integer, boundaries of the sequences packed in one row.

        Returns:
            `[B, T, D]` like `hidden_states`.

        Raises:
            ValueError: a shape does not fit, or a cache is given to a layer without `layer_idx`.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(f"hidden_states must be [B, T, {self.hidden_size}], got {list(hidden_states.shape)}")
        past: LayerCache | None = None
        if cache is not None:
            if self.layer_idx is None:
                raise ValueError("a GatedDeltaNet called with a cache needs a layer_idx, got None")
            past = cache.get(self.layer_idx)

        q, k, v, conv_states = self._project(hidden_states, past, cache is not None, cu_seqlens)
        a, b = self.a_proj(hidden_states), self.b_proj(hidden_states)

        is_decode_step = cu_seqlens is None and hidden_states.shape[1] == 1 and not torch.is_grad_enabled()
        if past is not None and is_decode_step:
            o = gated_delta_rule_step(
                q,
                k,
                v,
                a,
                b,
                past.recurrent_state,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                A_log=self.A_log,
                dt_bias=self.dt_bias,
                use_beta_sigmoid_in_kernel=True,
                allow_neg_eigval=self.allow_neg_eigval,
            )
            for old, new in zip(past.conv_states, conv_states, strict=True):
                old.copy_(new)
        else:
            op = chunk_gated_delta_rule if self.mode == "chunk" else fused_recurrent_gated_delta_rule
            o, recurrent_state = op(
                q,
                k,
                v,
                g=a,
                beta=b,
                initial_state=None if past is None else past.recurrent_state,
                output_final_state=cache is not None,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                A_log=self.A_log,
                dt_bias=self.dt_bias,
                use_beta_sigmoid_in_kernel=True,
                allow_neg_eigval=self.allow_neg_eigval,
                cu_seqlens=cu_seqlens,
            )
            if cache is not None and self.layer_idx is not None and recurrent_state is not None:
                cache.set(self.layer_idx, LayerCache(conv_states, recurrent_state))

        if isinstance(self.o_norm, GatedRMSNorm):
            o = self.o_norm(o, self.g_proj(hidden_states).unflatten(-1, (self.num_v_heads, self.head_v_dim)))
        else:
            o = self.o_norm(o)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def _project(
        self, hidden_states: Tensor, past: LayerCache | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return q, k `[B, T, H, K]`, v `[B, T, HV, V]`, and the tails of the three convolutions."""
        projected = [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)]
        conv_states: list[Tensor] = []
        if self.use_short_conv:
            convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            for idx, convolution in enumerate(convolutions):
                conv_state = None if past is None else past.conv_states[idx]
                projected[idx], tail = convolution(projected[idx], conv_state, output_final_state, cu_seqlens)
                if tail is not None:
                    conv_states.append(tail)
        else:
            projected = [F.silu(x) for x in projected]
        q = projected[0].unflatten(-1, (self.num_heads, self.head_k_dim))
        k = projected[1].unflatten(-1, (self.num_heads, self.head_k_dim))
        v = projected[2].unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return q, k, v, tuple(conv_states)
