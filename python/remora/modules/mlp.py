"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """`y = down_proj(silu(gate_proj(x)) * up_proj(x))`.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Args:
        hidden_size: `D`, the size of input and output.
        intermediate_size: the inner size; None means `8/3 * D` (the parameter count of a plain MLP with four times the
            width), rounded up to a multiple of 256.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, hidden_size: int, intermediate_size: int | None = None) -> None:
        super().__init__()
        if intermediate_size is None:
            intermediate_size = -(-(8 * hidden_size // 3) // 256) * 256
        if hidden_size < 1 or intermediate_size < 1:
            raise ValueError(
                f"hidden_size and intermediate_size must be positive, got {hidden_size} and {intermediate_size}"
            )
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` `[..., D]`."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y
