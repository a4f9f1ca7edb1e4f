"""How a CUDA launch is laid out: a pure function of the shape and the device, tested without either."""

import pytest

from remora import _C

BASE = {
    "batch": 1, "seqlen": 4096, "num_heads": 8, "num_value_heads": 8, "head_dim": 128, "value_dim": 128,
    "num_seqs": 1, "dtype": "bfloat16", "num_sms": 132, "arch": 90,
}  # fmt: skip
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a thread block may have
DTYPES = ("float32", "bfloat16", "float16")


def plan(**changes):
    return _C.gated_delta_rule_fwd_plan(**{**BASE, **changes})


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_shared_memory_fits_the_device(arch, dtype, head_dim):
    chosen = plan(arch=arch, dtype=dtype, head_dim=head_dim)
    assert 0 < chosen["smem_size"] <= SHARED_MEMORY[arch] * 1024
    assert chosen["num_stages"] >= 1
    roomier = plan(arch=90, dtype=dtype, head_dim=head_dim)
    assert chosen["num_stages"] <= roomier["num_stages"]


@pytest.mark.parametrize(("head_dim", "served_by"), [(1, 64), (63, 64), (64, 64), (65, 128), (128, 128)])
def test_a_head_is_padded_to_the_next_instantiation(head_dim, served_by):
    assert plan(head_dim=head_dim)["head_dim"] == served_by


def test_nothing_serves_float64_or_wider_heads():
    assert plan(dtype="float64")["head_dim"] == 0
    assert plan(head_dim=129)["head_dim"] == 0


@pytest.mark.parametrize(("value_dim", "tiles"), [(1, 1), (64, 1), (65, 2), (128, 2), (200, 4), (256, 4)])
def test_values_are_split_over_thread_blocks(value_dim, tiles):
    chosen = plan(value_dim=value_dim, seqlen=64)
    assert chosen["num_v_tiles"] == tiles
    assert chosen["num_output_ctas"] == 8 * tiles


def test_nothing_is_cut_where_heads_fill_the_device():
    for heads, num_sms in ((32, 132), (64, 132), (8, 16), (1, 1)):
        whole = plan(seqlen=2**20, num_heads=heads, num_value_heads=heads, num_sms=num_sms)
        assert whole["span_tokens"] > 2**20
        assert whole["num_map_slots"] == whole["num_summary_ctas"] == 0
        assert whole["num_output_ctas"] == heads * whole["num_v_tiles"]


def test_a_long_sequence_with_few_heads_is_cut():
    few = plan(seqlen=32768)
    assert few["span_tokens"] < 32768
    assert few["span_tokens"] % 128 == 0
    assert few["num_map_slots"] == 32768 // few["span_tokens"] - 1
    assert few["num_output_ctas"] == (1 + few["num_map_slots"]) * 8 * few["num_v_tiles"]
    assert few["num_summary_ctas"] > 0
    short = plan(seqlen=few["span_tokens"])
    assert short["num_map_slots"] == short["num_summary_ctas"] == 0


@pytest.mark.parametrize(
    "beside", [{"batch": 64, "num_seqs": 64}, {"num_seqs": 7}, {"seqlen": 100}, {"seqlen": 2**30}, {"num_heads": 1}]
)
def test_spans_do_not_depend_on_what_else_is_in_the_call(beside):
    assert plan(**beside)["span_tokens"] == plan()["span_tokens"]


def test_more_heads_never_mean_shorter_spans():
    for value_dim in (64, 128):
        spans = [
            plan(value_dim=value_dim, num_heads=heads, num_value_heads=heads)["span_tokens"]
            for heads in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        ]
        assert spans == sorted(spans)


def test_equal_arguments_give_equal_plans():
    assert plan() == plan()


def test_a_plan_prints_itself():
    chosen = plan()
    assert chosen["text"].startswith("FwdConfig(")
    for name in (
        "head_dim",
        "num_stages",
        "span_tokens",
        "num_map_slots",
        "num_v_tiles",
        "num_summary_ctas",
        "num_output_ctas",
        "smem_size",
    ):
        assert f"{name}={chosen[name]}" in chosen["text"]


@pytest.mark.parametrize(
    "changes", [{"seqlen": 0}, {"batch": 0, "num_seqs": 0}, {"seqlen": 2**33}, {"batch": 2**20, "num_seqs": 2**20}]
)
def test_extreme_shapes_have_a_plan(changes):
    chosen = plan(**changes)
    assert chosen["span_tokens"] >= 128
    assert chosen["num_map_slots"] >= 0
    assert chosen["num_output_ctas"] >= 0


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(ValueError, match="int8"):
        plan(dtype="int8")
