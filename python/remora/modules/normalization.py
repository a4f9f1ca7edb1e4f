"""Root-mean-square normalisation, plain and gated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Norm(nn.Module):
    """The weight of a root-mean-square normalisation over the last dimension."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"

    def normalize(self, x: Tensor) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight`, in at least fp32."""
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        # The weight apart: torch's own gradient of it takes long where there are many short rows.
        return F.rms_norm(x.to(compute_dtype), (self.hidden_size,), None, self.eps) * self.weight.to(compute_dtype)


class RMSNorm(_Norm):
    """`y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in fp32 (fp64 for fp64 inputs).

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019).

    Args:
        hidden_size: `D`, the size of the last dimension.
        eps: added to the mean square.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., D]`; the result has its shape and dtype."""
        return self.normalize(x).to(x.dtype)


class GatedRMSNorm(_Norm):
    """`y = rms_norm(x) * weight * silu(gate)` over the last dimension, computed in fp32 (fp64 for fp64 inputs).

    The gate acts after the normalisation, as in the output of Gated DeltaNet (Yang, Kautz, Hatamizadeh, ICLR 2025).

    Args:
        hidden_size: `D`, the size of the last dimension.
        eps: added to the mean square.
    """

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise `x` `[..., D]` and gate it with `gate` `[..., D]`; the result has the shape and dtype of `x`."""
        y = self.normalize(x)
        return (y * F.silu(gate.to(y.dtype))).to(x.dtype)
