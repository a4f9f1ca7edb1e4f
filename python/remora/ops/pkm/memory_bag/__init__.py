"""Weighted bags over huge tables."""

from remora.ops.pkm.memory_bag import registration as _registration  # noqa: F401
from remora.ops.pkm.memory_bag.functional import SlotPlan, memory_bag, peer_bag, slot_plan

__all__ = ["SlotPlan", "memory_bag", "peer_bag", "slot_plan"]
