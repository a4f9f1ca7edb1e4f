"""Product-key memory."""

from remora.ops.pkm.memory_bag import SlotPlan, memory_bag, peer_bag, slot_plan
from remora.ops.pkm.pk_topk import TuckerPair, pk_select, pk_topk, tucker_core_penalty, tucker_pair, tucker_topk
from remora.ops.pkm.sparse_optim import row_norm, rowwise_adagrad_, rowwise_adam_, sparse_adamw_

__all__ = [
    "SlotPlan",
    "TuckerPair",
    "memory_bag",
    "peer_bag",
    "pk_select",
    "pk_topk",
    "row_norm",
    "rowwise_adagrad_",
    "rowwise_adam_",
    "slot_plan",
    "sparse_adamw_",
    "tucker_core_penalty",
    "tucker_pair",
    "tucker_topk",
]
