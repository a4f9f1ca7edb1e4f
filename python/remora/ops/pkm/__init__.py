"""Product-key memory."""

from remora.ops.pkm.memory_bag import SlotPlan, memory_bag, peer_bag, slot_plan
from remora.ops.pkm.sparse_optim import row_norm, rowwise_adagrad_, rowwise_adam_, sparse_adamw_

__all__ = [
    "SlotPlan",
    "memory_bag",
    "peer_bag",
    "row_norm",
    "rowwise_adagrad_",
    "rowwise_adam_",
    "slot_plan",
    "sparse_adamw_",
]
