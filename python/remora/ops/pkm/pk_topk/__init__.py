"""Product-key selection: scores of sub-keys, the best slots in exact order."""

from remora.ops.pkm.pk_topk import registration as _registration  # noqa: F401
from remora.ops.pkm.pk_topk.functional import pk_select, pk_topk
from remora.ops.pkm.pk_topk.tucker import TuckerPair, tucker_core_penalty, tucker_pair, tucker_topk

__all__ = ["TuckerPair", "pk_select", "pk_topk", "tucker_core_penalty", "tucker_pair", "tucker_topk"]
