"""The decode step, which updates a pool of states in place."""

from dataclasses import replace

import pytest
import torch
from gated_delta_rule_cases import CUDA_PATH, HALF, Case, arrange, chunked_in_plain_torch, make_inputs

from remora.ops import gated_delta_rule_step
from remora.ops.recurrence.gated_delta_rule.naive import naive_gated_delta_rule
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")

BASE = {
    "one token": Case(B=3, T=1, H=1, HV=2),
    "groups": Case(B=2, T=1, H=2, HV=6),
    "four tokens": Case(B=2, T=4),
    "17 tokens": Case(B=2, T=17),
    "K=128": Case(B=2, T=1, K=128, V=128),
    "K=40, V=100": Case(B=2, T=1, K=40, V=100),
    "K=1, V=1": Case(B=2, T=1, K=1, V=1),
    "l2norm": Case(B=2, T=2, l2norm=True),
    "v first": Case(B=2, T=2, V=40, v_first=True),
    "scale": Case(B=2, T=2, scale=2.0),
    "no gate": Case(B=2, T=2, gate="none"),
    "strong": Case(B=2, T=2, gate="strong"),
    "reset": Case(B=2, T=2, gate="-inf"),
    "beta mixed": Case(B=2, T=4, beta="mixed"),
    "padded": Case(B=2, T=2, K=72, layout="padded"),
    "packed": Case(B=2, T=2, H=2, HV=4, layout="packed"),
    "strided rows": Case(B=2, T=2, layout="strided rows"),
    "B=0": Case(B=0, T=1),
    "T=0": Case(B=2, T=0),
    **({} if CUDA_PATH else {"K=V=256": Case(B=2, T=1, K=256, V=256), "B=64": Case(B=64, T=1, H=2, HV=4)}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if CUDA_PATH else [torch.float64])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def step_inputs(case, dtype, scale=1.0):
    inputs = make_inputs(replace(case, dtype=dtype, state=scale), requires_grad=False)
    options = {name: inputs.options[name] for name in ("scale", "use_qk_l2norm_in_kernel", "state_v_first")}
    return inputs, {name: x for name, x in inputs.tensors.items() if name != "initial_state"}, options


def expected(inputs):
    oracle = inputs.double().call(naive_gated_delta_rule, output_final_state=True)
    if inputs.d_o.dtype == torch.float64:
        return oracle, (None, None)
    return oracle, inputs.call(chunked_in_plain_torch, output_final_state=True)


def assert_step(o, state, inputs, dtype):
    bound = HALF[dtype][0] if dtype in HALF else None
    oracle, yardstick = expected(inputs)
    for name, have, want, rule in zip(("o", "state"), (o, state), oracle, yardstick, strict=True):
        assert_accurate(have, want, rule, name, dtype=dtype, relative_rms=bound)


@dtypes
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["state 1", "state 30"])
@pytest.mark.parametrize("case", BASE.values(), ids=BASE.keys())
def test_step(case, dtype, scale):
    inputs, tensors, options = step_inputs(case, dtype, scale)
    state = inputs.tensors["initial_state"].clone()
    o = gated_delta_rule_step(**tensors, state=state, **options)
    assert_step(o, state, inputs, dtype)


@dtypes
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_slots_of_a_pool(dtype, index_dtype):
    """Sequences live in any slot; those outside the pool are skipped; other slots keep their bits, even NaN."""
    slots = torch.tensor([5, -1, 0, 7, -(2**31), 2**31 - 1, 3], dtype=index_dtype)
    inside = [n for n, slot in enumerate(slots.tolist()) if 0 <= slot < 7]
    inputs, tensors, options = step_inputs(Case(B=7, T=2, H=1, HV=2), dtype)
    pool = torch.full((7, *inputs.tensors["initial_state"].shape[1:]), torch.nan, dtype=inputs.d_final.dtype)
    for n in inside:
        pool[slots[n]] = inputs.tensors["initial_state"][n]
    outside = [n for n in range(7) if n not in inside]
    for n in outside:
        tensors["q"][n] = tensors["v"][n] = torch.nan
    o = gated_delta_rule_step(**tensors, state=pool, state_indices=slots, **options)

    assert inside == [0, 2, 6]
    assert not o[outside].any()
    untouched = [slot for slot in range(7) if slot not in (5, 0, 3)]
    assert pool[untouched].isnan().all()
    kept = make_inputs(Case(B=7, T=2, H=1, HV=2, dtype=dtype, state=1.0), requires_grad=False)
    for name, x in kept.tensors.items():
        kept.tensors[name] = x[inside]
    assert_step(o[inside], pool[[5, 0, 3]], kept, dtype)


@dtypes
def test_a_sequence_does_not_depend_on_its_slot_or_neighbours(dtype):
    inputs, tensors, options = step_inputs(Case(B=5, T=1, H=1, HV=2), dtype)
    pool = inputs.tensors["initial_state"].clone()
    o = gated_delta_rule_step(**tensors, state=pool, **options)
    for n in range(5):
        alone = inputs.tensors["initial_state"][n : n + 1].clone()
        single = gated_delta_rule_step(**{k: x[n : n + 1] for k, x in tensors.items()}, state=alone, **options)
        assert torch.equal(single[0], o[n])
        assert torch.equal(alone[0], pool[n])
    again = inputs.tensors["initial_state"].flip(0).clone()
    back = torch.arange(4, -1, -1)
    assert torch.equal(gated_delta_rule_step(**tensors, state=again, state_indices=back, **options), o)
    assert torch.equal(again.flip(0), pool)


@pytest.mark.sim_only
@pytest.mark.parametrize("v_first", [False, True], ids=["key-first", "value-first"])
def test_states_move_in_whole_sectors(v_first):
    """Sectors that warps ask for, of which q, k, v and o, a few bytes a lane, are the rest."""
    from remora.testing import sim

    inputs, tensors, options = step_inputs(Case(B=2, T=1, K=128, V=128, v_first=v_first), torch.bfloat16)
    state = inputs.tensors["initial_state"].clone()
    with sim.options(memory_stats=1):
        sim.reset_stats()
        gated_delta_rule_step(**tensors, state=state, **options)
        (counters,) = sim.stats().values()
    for direction in ("load", "store"):
        assert counters[f"global_{direction}"]["bytes"] >= state.nbytes
        assert counters[f"global_{direction}"]["sectors"] * 32 <= 1.15 * state.nbytes, direction


@dtypes
def test_tokens_in_one_call_or_one_by_one(dtype):
    inputs, tensors, options = step_inputs(Case(B=2, T=5, H=1, HV=2), dtype)
    together, apart = inputs.tensors["initial_state"].clone(), inputs.tensors["initial_state"].clone()
    o = gated_delta_rule_step(**tensors, state=together, **options)
    for t in range(5):
        token = {name: x[:, t : t + 1] for name, x in tensors.items()}
        assert torch.equal(gated_delta_rule_step(**token, state=apart, **options), o[:, t : t + 1])
    assert torch.equal(apart, together)


@dtypes
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("neg_eigval", [False, True], ids=["sigmoid", "twice sigmoid"])
def test_gate_and_beta_from_logits(dtype, with_bias, neg_eigval):
    inputs, tensors, options = step_inputs(Case(B=3, T=2, H=1, HV=4), dtype)
    wide = tensors["beta"].dtype
    A_log = torch.tensor([16.0, 1.0, 4.0, 0.01], dtype=wide).log()
    dt_bias = torch.tensor([-4.0, -1.0, 0.0, 25.0], dtype=wide) if with_bias else None
    tensors["g"] = 2 * tensors["g"] + 1
    tensors["beta"] = 4 * tensors["beta"] - 2
    state = inputs.tensors["initial_state"].clone()
    o = gated_delta_rule_step(
        **tensors, state=state, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True, allow_neg_eigval=neg_eigval, **options,
    )  # fmt: skip
    logits = tensors["g"].double() + (0 if dt_bias is None else dt_bias.double())
    inputs.tensors["g"] = -A_log.double().exp() * torch.nn.functional.softplus(logits)
    inputs.tensors["beta"] = tensors["beta"].double().sigmoid() * (2 if neg_eigval else 1)
    oracle = inputs.double().call(naive_gated_delta_rule, output_final_state=True)
    for name in ("g", "beta"):
        inputs.tensors[name] = inputs.tensors[name].to(wide)
    yardstick = inputs.call(chunked_in_plain_torch, output_final_state=True)
    if dtype == torch.float64:
        yardstick = (None, None)
    bound = HALF[dtype][0] if dtype in HALF else None
    for name, have, want, rule in zip(("o", "state"), (o, state), oracle, yardstick, strict=True):
        assert_accurate(have, want, rule, name, dtype=dtype, relative_rms=bound)


@dtypes
def test_three_runs_agree(dtype):
    inputs, tensors, options = step_inputs(Case(B=3, T=2, H=1, HV=2, gate="model"), dtype)
    runs = []
    for _ in range(3):
        state = inputs.tensors["initial_state"].clone()
        runs.append((gated_delta_rule_step(**tensors, state=state, **options), state))
    for o, state in runs[1:]:
        assert torch.equal(o, runs[0][0])
        assert torch.equal(state, runs[0][1])


@pytest.mark.cpu_only
@dtypes
def test_the_number_of_threads_does_not_matter(dtype):
    inputs, tensors, options = step_inputs(Case(B=9, T=1, H=2, HV=4), dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            state = inputs.tensors["initial_state"].clone()
            runs.append((gated_delta_rule_step(**tensors, state=state, **options), state))
    finally:
        torch.set_num_threads(threads)
    for o, state in runs[1:]:
        assert torch.equal(o, runs[0][0])
        assert torch.equal(state, runs[0][1])


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_outputs_do_not_see_later_tokens(dtype, bad):
    inputs, tensors, options = step_inputs(Case(B=2, T=4), dtype)
    clean = gated_delta_rule_step(**tensors, state=inputs.tensors["initial_state"].clone(), **options)
    for x in tensors.values():
        x[:, 2:] = bad
    dirty = gated_delta_rule_step(**tensors, state=inputs.tensors["initial_state"].clone(), **options)
    assert torch.equal(dirty[:, :2], clean[:, :2])


def test_inputs_are_left_alone():
    inputs, tensors, options = step_inputs(Case(B=2, T=2), torch.float32)
    before = {name: x.clone() for name, x in tensors.items()}
    gated_delta_rule_step(**tensors, state=inputs.tensors["initial_state"].clone(), **options)
    for name, x in tensors.items():
        assert torch.equal(x, before[name])


def test_a_slice_of_a_pool_is_updated_in_place():
    inputs, tensors, options = step_inputs(Case(B=2, T=1), torch.float32)
    pool = torch.full((6, *inputs.tensors["initial_state"].shape[1:]), torch.nan)
    pool[2:4] = inputs.tensors["initial_state"]
    own = inputs.tensors["initial_state"].clone()
    o = gated_delta_rule_step(**tensors, state=pool[2:4], **options)
    assert torch.equal(o, gated_delta_rule_step(**tensors, state=own, **options))
    assert torch.equal(pool[2:4], own)
    assert pool[[0, 1, 4, 5]].isnan().all()


def test_strided_views_of_one_projection():
    """q, k, v as slices of what one linear layer returned, as a decoder has them."""
    case = Case(B=3, T=1, H=2, HV=4)
    inputs, tensors, options = step_inputs(case, torch.bfloat16)
    dense = gated_delta_rule_step(**tensors, state=inputs.tensors["initial_state"].clone(), **options)
    for layout in ("padded", "head first"):
        views = {n: arrange(x, layout) if x.dim() == 4 else x for n, x in tensors.items()}
        o = gated_delta_rule_step(**views, state=inputs.tensors["initial_state"].clone(), **options)
        assert torch.equal(o, dense)
