"""Depthwise causal short convolution."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["silu"]


def position_in_sequence(cu_seqlens: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
    """Return for every token of a packed row the index of its sequence and its position there.

    Nothing is read back to the host. Empty sequences and repeated tail entries own no token.

    Args:
        cu_seqlens: `[N + 1]` integer, the sequences' boundaries: sequence `n` owns tokens
            `cu_seqlens[n] ... cu_seqlens[n + 1] - 1`.
        seqlen: `T`, the number of tokens in the row.

    Returns:
        `(sequence_idx, position)`, both `[T]` int64.
    """
    cu_seqlens = cu_seqlens.long()
    token_idx = torch.arange(seqlen, device=cu_seqlens.device)
    sequence_idx = torch.searchsorted(cu_seqlens, token_idx, right=True) - 1
    return sequence_idx, token_idx - cu_seqlens[sequence_idx]


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time, followed by SiLU.

        y[t, d] = silu(bias[d] + sum_{j=0}^{W-1} weight[d, 0, W-1-j] * x[t-j, d])

    with `x[t - j] = 0` before the start of a sequence (or the cached tail, when continuing one). The window never
    crosses a sequence boundary. The sum runs in fp32 (fp64 for fp64 inputs) in a fixed order for every token, so a
    token's result is bitwise the same alone, in a batch, in a packed row and in a decode step.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (ICLR 2025), which
    takes the convolution over from Mamba (Gu, Dao, 2023).

    Args:
        hidden_size: `D`, the number of channels.
        kernel_size: `W`, the number of taps.
        bias: whether to add a bias.
        activation: "silu", or None for the bare convolution.

    Parameters `weight` `[D, 1, W]` and `bias` `[D]` are those of a depthwise `nn.Conv1d`.

    Raises:
        ValueError: a size is not positive, or the activation is unknown.
    """

    def __init__(
        self, hidden_size: int, kernel_size: int = 4, bias: bool = False, activation: Activation | None = "silu"
    ) -> None:
        super().__init__()
        if hidden_size < 1 or kernel_size < 1:
            raise ValueError(f"hidden_size and kernel_size must be positive, got {hidden_size} and {kernel_size}")
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
        history = x.new_zeros(state_shape) if conv_state is None else conv_state.to(x.dtype)

        if cu_seqlens is None:
            taps, final_state = self._dense_taps(x, history)
        else:
            taps, final_state = self._packed_taps(x, history, cu_seqlens)

        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight[:, 0].to(compute_dtype)
        y = taps[0].to(compute_dtype) * weight[:, 0]
        for tap_idx in range(1, self.kernel_size):
            y = torch.addcmul(y, taps[tap_idx].to(compute_dtype), weight[:, tap_idx])
        if self.bias is not None:
            y = y + self.bias.to(compute_dtype)
        if self.activation == "silu":
            y = F.silu(y)
        # A copy: the slice would keep the whole input alive.
        return y.to(x.dtype), final_state.clone() if output_final_state else None

    def _dense_taps(self, x: Tensor, history: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return `x` delayed by `W-1, ..., 1, 0` tokens, and the new history."""
        seqlen = x.shape[1]
        padded = torch.cat([history, x], dim=1)
        taps = [padded[:, tap_idx : tap_idx + seqlen] for tap_idx in range(self.kernel_size)]
        return taps, padded[:, seqlen:]

    def _packed_taps(self, x: Tensor, history: Tensor, cu_seqlens: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same for a packed row: a tap that would leave its sequence reads that sequence's history instead."""
        seqlen, tail = x.shape[1], self.kernel_size - 1
        sequence_idx, position = position_in_sequence(cu_seqlens, seqlen)
        taps = []
        for delay in range(tail, 0, -1):
            delayed = F.pad(x, (0, 0, delay, 0))[:, :seqlen]
            before = history[sequence_idx, (tail + position - delay).clamp(max=tail - 1)]
            taps.append(torch.where((position >= delay)[:, None], delayed, before))
        taps.append(x)

        bounds = cu_seqlens.long()
        token_idx = bounds[1:, None] + torch.arange(-tail, 0, device=x.device)  # [N, W-1]
        relative = token_idx - bounds[:-1, None]
        rows = torch.arange(history.shape[0], device=x.device)[:, None]
        before = history[rows, (relative + tail).clamp(0, max(tail - 1, 0))]
        inside = F.pad(x[0], (0, 0, 1, 0))[token_idx.clamp(min=-1) + 1]  # the row in front keeps T = 0 in range
        return taps, torch.where((relative >= 0)[..., None], inside, before)
