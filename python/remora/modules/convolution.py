"""Depthwise causal short convolution."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from remora.ops import causal_conv1d
from remora.ops.recurrence.causal_conv1d.functional import MAX_WIDTH

Activation = Literal["silu"]


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time, followed by SiLU.

        y[t, d] = silu(bias[d] + sum_{j=0}^{W-1} weight[d, 0, W-1-j] * x[t-j, d])

    with `x[t - j] = 0` before the start of a sequence (or the cached tail, when continuing one): the module of
    `remora.ops.causal_conv1d`, whose promises hold.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (ICLR 2025), which
    takes the convolution over from Mamba (Gu, Dao, 2023).

    Args:
        hidden_size: `D`, the number of channels.
        kernel_size: `W`, the number of taps, at most 8.
        bias: whether to add a bias.
        activation: "silu", or None for the bare convolution.

    Parameters `weight` `[D, 1, W]` and `bias` `[D]` are those of a depthwise `nn.Conv1d`.

    Raises:
        ValueError: a size is out of range, or the activation is unknown.
    """

    def __init__(
        self, hidden_size: int, kernel_size: int = 4, bias: bool = False, activation: Activation | None = "silu"
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be positive, got {hidden_size}")
        if not 1 <= kernel_size <= MAX_WIDTH:
            raise ValueError(f"kernel_size must be in 1...{MAX_WIDTH}, got {kernel_size}")
        if activation is not None and activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {get_args(Activation)} or None, got {activation!r}")
        self.hidden_size = hidden_size
        self.kernel_size = kernel_size
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(hidden_size, 1, kernel_size))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(hidden_size))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Conv1d` does: uniform with bound `1 / sqrt(W)`."""
        bound = 1 / math.sqrt(self.kernel_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, kernel_size={self.kernel_size}, activation={self.activation!r}"

    def forward(
        self,
        x: Tensor,
        conv_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve `x` along time.

        Args:
            x: `[B, T, D]`; `[1, T, D]` with `cu_seqlens`.
            conv_state: `[N, W - 1, D]`, the inputs that came before each sequence, oldest first.
            output_final_state: whether to return the tail with which to continue.
            cu_seqlens: `[N + 1]` integer, boundaries of the sequences packed in one row.

        Returns:
            `(y, final_state)`: `y` like `x`; `final_state` `[N, W - 1, D]` like `x`, or None.

        Raises:
            ValueError: a shape does not fit.
        """
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x must be [B, T, {self.hidden_size}], got {list(x.shape)}")
        if cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(f"with cu_seqlens the batch size of x must be 1, got {x.shape[0]}")
        num_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state_shape = (num_sequences, self.kernel_size - 1, self.hidden_size)
        if conv_state is not None and conv_state.shape != state_shape:
            raise ValueError(f"conv_state must be {list(state_shape)}, got {list(conv_state.shape)}")
        return causal_conv1d(
            x,
            self.weight[:, 0],
            self.bias,
            self.activation,
            None if conv_state is None else conv_state.to(x.dtype),
            output_final_state,
            cu_seqlens,
        )
