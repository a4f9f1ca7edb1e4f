from typing import Any

def build_info() -> dict[str, Any]: ...
def kernel_table() -> list[dict[str, Any]]: ...
def gated_delta_rule_fwd_plan(
    *,
    batch: int,
    seqlen: int,
    num_heads: int,
    num_value_heads: int,
    head_dim: int,
    value_dim: int,
    num_seqs: int,
    dtype: str,
    num_sms: int,
    arch: int,
) -> dict[str, Any]: ...
