"""Product-key memory."""

from remora.ops.pkm.sparse_optim import row_norm, rowwise_adagrad_, rowwise_adam_, sparse_adamw_

__all__ = ["row_norm", "rowwise_adagrad_", "rowwise_adam_", "sparse_adamw_"]
