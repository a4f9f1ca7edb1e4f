"""Causal depthwise convolution over sequences and routed rows."""

from remora.ops.recurrence.causal_conv1d import registration as _registration  # noqa: F401
from remora.ops.recurrence.causal_conv1d.functional import causal_conv1d, causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]
