"""Memory tables over the ranks of torch.distributed."""

from remora.distributed.sharded_table import ShardedMemoryTable, gather_table, shard_columns, shard_table

__all__ = ["ShardedMemoryTable", "gather_table", "shard_columns", "shard_table"]
