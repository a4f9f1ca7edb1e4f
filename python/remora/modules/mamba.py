"""The Mamba layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remora.modules.cache import Cache, LayerCache
from remora.modules.convolution import ShortConvolution
from remora.modules.gated_delta_net import DT_MAX, DT_MIN
from remora.ops import selective_scan, selective_state_update


class Mamba(nn.Module):
    """Token mixer around a selective state space model.

        u, z     = W_in x                              u, z of E = expand D channels
        u        = silu(conv(u))
        r, B, C  = W_x u
        dt       = softplus(W_dt r + b_dt)
        h_t      = exp(dt_t A) h_{t-1} + dt_t u_t B_t       A = -exp(A_log)
        y        = W_out ((h_t C_t + D u_t) silu(z_t))

    Source: Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023). Parameter names are
    those of its layer, so its weights load as they are.

    Args:
        hidden_size: `D`, the size of input and output.
        expand: `E / D`.
        state_size: `N`, the states of a channel.
        dt_rank: size of `r`; None means `D / 16`, rounded up.
        conv_size: `W`, the number of taps of the short convolution.
        layer_idx: the layer's key in a `Cache`; needed only for calls with one.
        norm_eps: not used; every mixer takes it.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand: int = 2,
        state_size: int = 16,
        dt_rank: int | None = None,
        conv_size: int = 4,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        dt_rank = -(-hidden_size // 16) if dt_rank is None else dt_rank
        if min(hidden_size, expand, state_size, dt_rank) < 1:
            raise ValueError(
                "hidden_size, expand, state_size and dt_rank must be positive, "
                f"got {hidden_size}, {expand}, {state_size} and {dt_rank}"
            )
        self.hidden_size = hidden_size
        self.inner_size = expand * hidden_size
        self.state_size = state_size
        self.dt_rank = dt_rank
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner_size, bias=False)
        self.conv1d = ShortConvolution(self.inner_size, conv_size, bias=True)
        self.x_proj = nn.Linear(self.inner_size, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, self.inner_size)
        self.A_log = nn.Parameter(torch.empty(self.inner_size, state_size))
        self.D = nn.Parameter(torch.empty(self.inner_size))
        self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the scan: `exp(A_log)` is 1 ... N, `D` 1, the step about log-uniform in [0.001, 0.1]."""
        self.A_log.copy_(torch.arange(1, self.state_size + 1, device=self.A_log.device).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step = nn.init.uniform_(self.dt_proj.bias, math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

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
                raise ValueError("a Mamba called with a cache needs a layer_idx, got None")
            past = cache.get(self.layer_idx)

        u, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        conv_state = None if past is None else past.conv_states[0]
        u, tail = self.conv1d(u, conv_state, cache is not None, cu_seqlens)
        step, B, C = self.x_proj(u).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        delta = F.linear(step, self.dt_proj.weight)
        A = -self.A_log.float().exp() if self.A_log.dtype != torch.float64 else -self.A_log.exp()

        is_decode_step = cu_seqlens is None and hidden_states.shape[1] == 1 and not torch.is_grad_enabled()
        if past is not None and is_decode_step:
            u, delta, z, B, C = (x[:, 0] for x in (u, delta, z, B, C))
            y = selective_state_update(
                past.recurrent_state, u, delta, A, B, C, self.D, z, self.dt_proj.bias, dt_softplus=True
            )[:, None]
            past.conv_states[0].copy_(tail)
        else:
            out, state = selective_scan(
                u.mT, delta.mT, A, B.mT[:, None], C.mT[:, None], self.D, z.mT, self.dt_proj.bias, True, True,
                initial_state=None if past is None else past.recurrent_state, cu_seqlens=cu_seqlens,
            )  # fmt: skip
            y = out.mT
            if cache is not None and self.layer_idx is not None and tail is not None:
                cache.set(self.layer_idx, LayerCache((tail,), state))
        result: Tensor = self.out_proj(y)
        return result
