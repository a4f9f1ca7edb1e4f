"""Selective scan: a diagonal state space model whose step, input and output maps depend on the token."""

from remora.ops.recurrence.selective_scan import registration as _registration  # noqa: F401
from remora.ops.recurrence.selective_scan.functional import selective_scan, selective_state_update

__all__ = ["selective_scan", "selective_state_update"]
