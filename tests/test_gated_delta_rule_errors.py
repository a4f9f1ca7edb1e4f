"""Bad input: an error that names the argument, what was given and what is allowed."""
# ruff: noqa: E501 (a row of a table is one line)

import pytest
import torch
from gated_delta_rule_cases import Case, make_inputs

from remora import ops


def whole(**changes):
    """Valid arguments of `chunk_gated_delta_rule` with B=2, T=5, H=2, HV=4, K=16, V=24, and changes."""
    inputs = make_inputs(Case(B=2, T=5, H=2, HV=4, K=16, V=24, state=1.0), requires_grad=False)
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    return {**inputs.tensors, **options, **changes}


def packed(offsets, dtype=torch.int32, **changes):
    arguments = whole()
    for name in ("q", "k", "v", "g", "beta"):
        arguments[name] = arguments[name][:1]
    arguments["initial_state"] = None
    offsets = torch.tensor(offsets, dtype=dtype) if isinstance(offsets, list) else offsets
    return {**arguments, "cu_seqlens": offsets, **changes}


def step(**changes):
    arguments = whole()
    del arguments["output_final_state"]
    arguments["state"] = arguments.pop("initial_state")
    return {**arguments, **changes}


X = torch.zeros
META = torch.device("meta")
WRONG = {
    "q not a tensor": (whole, {"q": [1.0]}, TypeError, r"q must be a tensor, got list"),
    "k not a tensor": (whole, {"k": None}, TypeError, r"k must be a tensor, got NoneType"),
    "v not a tensor": (whole, {"v": 3}, TypeError, r"v must be a tensor, got int"),
    "g not a tensor": (whole, {"g": None}, TypeError, r"g must be a tensor, got NoneType"),
    "beta not a tensor": (whole, {"beta": 0.5}, TypeError, r"beta must be a tensor, got float"),
    "state not a tensor": (whole, {"initial_state": 1}, TypeError, r"initial_state must be a tensor, got int"),
    "q of integers": (whole, {"q": X(2, 5, 2, 16, dtype=torch.int64)}, TypeError, r"q must have dtype .*float32.*got torch.int64"),
    "k of another dtype": (whole, {"k": X(2, 5, 2, 16).half()}, TypeError, r"k must have dtype torch.float32, got torch.float16"),
    "v of another dtype": (whole, {"v": X(2, 5, 4, 24).bfloat16()}, TypeError, r"v must have dtype torch.float32, got torch.bfloat16"),
    "g of integers": (whole, {"g": X(2, 5, 4, dtype=torch.int32)}, TypeError, r"g must have dtype .*got torch.int32"),
    "beta of booleans": (whole, {"beta": X(2, 5, 4, dtype=torch.bool)}, TypeError, r"beta must have dtype .*got torch.bool"),
    "state of bfloat16": (whole, {"initial_state": X(2, 4, 16, 24).bfloat16()}, TypeError, r"initial_state must have dtype torch.float32, got torch.bfloat16"),
    "state of float64": (whole, {"initial_state": X(2, 4, 16, 24).double()}, TypeError, r"initial_state must have dtype torch.float32, got torch.float64"),
    "q of rank 3": (whole, {"q": X(2, 5, 16)}, ValueError, r"q must have shape \[B, T, H, K\], got \[2, 5, 16\]"),
    "k of rank 3": (whole, {"k": X(2, 5, 16)}, ValueError, r"k must have shape .*\[2, 5, 2, 16\], got \[2, 5, 16\]"),
    "v of rank 3": (whole, {"v": X(2, 5, 24)}, ValueError, r"v must have shape .*\[2, 5, \*, \*\], got \[2, 5, 24\]"),
    "k of other T": (whole, {"k": X(2, 6, 2, 16)}, ValueError, r"k must have shape .*got \[2, 6, 2, 16\]"),
    "k of other heads": (whole, {"k": X(2, 5, 4, 16)}, ValueError, r"k must have shape .*got \[2, 5, 4, 16\]"),
    "k of other K": (whole, {"k": X(2, 5, 2, 8)}, ValueError, r"k must have shape .*got \[2, 5, 2, 8\]"),
    "v of other B": (whole, {"v": X(1, 5, 4, 24)}, ValueError, r"v must have shape .*got \[1, 5, 4, 24\]"),
    "v of other T": (whole, {"v": X(2, 4, 4, 24)}, ValueError, r"v must have shape .*got \[2, 4, 4, 24\]"),
    "HV no multiple": (whole, {"v": X(2, 5, 3, 24)}, ValueError, r"heads of v \(HV\) must be a multiple of the heads of q \(H = 2\), got 3"),
    "HV below H": (whole, {"v": X(2, 5, 1, 24)}, ValueError, r"must be a multiple of the heads of q \(H = 2\), got 1"),
    "HV zero": (whole, {"v": X(2, 5, 0, 24)}, ValueError, r"must be a multiple of the heads of q \(H = 2\), got 0"),
    "H zero": (whole, {"q": X(2, 5, 0, 16), "k": X(2, 5, 0, 16)}, ValueError, r"heads H of q must be in 1.*got 0"),
    "K zero": (whole, {"q": X(2, 5, 2, 0), "k": X(2, 5, 2, 0)}, ValueError, r"head size K .*1\.\.\.256, got 0"),
    "K too large": (whole, {"q": X(2, 5, 2, 257), "k": X(2, 5, 2, 257)}, ValueError, r"head size K .*1\.\.\.256, got 257"),
    "V zero": (whole, {"v": X(2, 5, 4, 0)}, ValueError, r"head size V of v must be in 1\.\.\.256, got 0"),
    "V too large": (whole, {"v": X(2, 5, 4, 300)}, ValueError, r"head size V of v must be in 1\.\.\.256, got 300"),
    "g of q's heads": (whole, {"g": X(2, 5, 2)}, ValueError, r"g must have shape \[B, T, HV\] = \[2, 5, 4\], got \[2, 5, 2\]"),
    "g per channel": (whole, {"g": X(2, 5, 4, 16)}, ValueError, r"g must have shape .*got \[2, 5, 4, 16\]"),
    "beta of other T": (whole, {"beta": X(2, 1, 4)}, ValueError, r"beta must have shape \[B, T, HV\] = \[2, 5, 4\], got \[2, 1, 4\]"),
    "state of other N": (whole, {"initial_state": X(1, 4, 16, 24)}, ValueError, r"initial_state must have shape \[N, HV, K, V\] = \[2, 4, 16, 24\], got \[1, 4, 16, 24\]"),
    "state transposed": (whole, {"initial_state": X(2, 4, 24, 16)}, ValueError, r"initial_state must have shape \[N, HV, K, V\].*got \[2, 4, 24, 16\]"),
    "state not transposed": (whole, {"state_v_first": True}, ValueError, r"initial_state must have shape \[N, HV, V, K\] = \[2, 4, 24, 16\], got \[2, 4, 16, 24\]"),
    "state of q's heads": (whole, {"initial_state": X(2, 2, 16, 24)}, ValueError, r"initial_state must have shape .*got \[2, 2, 16, 24\]"),
    "k elsewhere": (whole, {"k": X(2, 5, 2, 16, device=META)}, ValueError, r"k must be on the device of q \(cpu\), got meta"),
    "v elsewhere": (whole, {"v": X(2, 5, 4, 24, device=META)}, ValueError, r"v must be on the device of q \(cpu\), got meta"),
    "g elsewhere": (whole, {"g": X(2, 5, 4, device=META)}, ValueError, r"g must be on the device of q \(cpu\), got meta"),
    "beta elsewhere": (whole, {"beta": X(2, 5, 4, device=META)}, ValueError, r"beta must be on the device of q \(cpu\), got meta"),
    "state elsewhere": (whole, {"initial_state": X(2, 4, 16, 24, device=META)}, ValueError, r"initial_state must be on the device of q \(cpu\), got meta"),
    "offsets not a tensor": (packed, {"offsets": (0, 5)}, TypeError, r"cu_seqlens must be a tensor, got tuple"),
    "offsets of floats": (packed, {"offsets": [0, 5], "dtype": torch.float32}, TypeError, r"cu_seqlens must have dtype torch.int32 or torch.int64, got torch.float32"),
    "offsets of rank 2": (packed, {"offsets": [[0, 5]]}, ValueError, r"cu_seqlens must have shape \[N \+ 1\] with N >= 1, got \[1, 2\]"),
    "one offset": (packed, {"offsets": [5]}, ValueError, r"cu_seqlens must have shape \[N \+ 1\] with N >= 1, got \[1\]"),
    "offsets not from zero": (packed, {"offsets": [1, 5]}, ValueError, r"cu_seqlens must start with 0 and end with T = 5, got 1 \.\.\. 5"),
    "offsets not to T": (packed, {"offsets": [0, 4]}, ValueError, r"cu_seqlens must start with 0 and end with T = 5, got 0 \.\.\. 4"),
    "offsets beyond T": (packed, {"offsets": [0, 6]}, ValueError, r"cu_seqlens must start with 0 and end with T = 5, got 0 \.\.\. 6"),
    "offsets decrease": (packed, {"offsets": [0, 4, 3, 5]}, ValueError, r"cu_seqlens must not decrease, got \[0, 4, 3, 5\]"),
    "offsets negative": (packed, {"offsets": [0, -1, 5]}, ValueError, r"cu_seqlens must not decrease, got \[0, -1, 5\]"),
    "offsets of a batch": (whole, {"cu_seqlens": torch.tensor([0, 5]), "initial_state": None}, ValueError, r"cu_seqlens needs inputs with B = 1 .*got B = 2"),
    "state of the batch, packed": (packed, {"offsets": [0, 2, 5], "initial_state": X(1, 4, 16, 24)}, ValueError, r"initial_state must have shape .*\[2, 4, 16, 24\], got \[1, 4, 16, 24\]"),
    "gate without A_log": (whole, {"use_gate_in_kernel": True}, ValueError, r"use_gate_in_kernel=True needs A_log of shape \[HV\], got None"),
    "A_log without gate": (whole, {"A_log": X(4)}, ValueError, r"A_log needs use_gate_in_kernel=True"),
    "dt_bias without gate": (whole, {"dt_bias": X(4)}, ValueError, r"dt_bias needs use_gate_in_kernel=True"),
    "A_log not a tensor": (whole, {"use_gate_in_kernel": True, "A_log": 1.0}, TypeError, r"A_log must be a tensor, got float"),
    "A_log of H": (whole, {"use_gate_in_kernel": True, "A_log": X(2)}, ValueError, r"A_log must have shape \[HV\] = \[4\], got \[2\]"),
    "A_log of integers": (whole, {"use_gate_in_kernel": True, "A_log": X(4, dtype=torch.int64)}, TypeError, r"A_log must have dtype .*got torch.int64"),
    "A_log elsewhere": (whole, {"use_gate_in_kernel": True, "A_log": X(4, device=META)}, ValueError, r"A_log must be on the device of q"),
    "dt_bias of H": (whole, {"use_gate_in_kernel": True, "A_log": X(4), "dt_bias": X(2)}, ValueError, r"dt_bias must have shape \[HV\] = \[4\], got \[2\]"),
    "twice without sigmoid": (whole, {"allow_neg_eigval": True}, ValueError, r"allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True"),
}  # fmt: skip


def over(table):
    return pytest.mark.parametrize(("make", "changes", "kind", "message"), table.values(), ids=table.keys())


@over(WRONG)
def test_chunk_gated_delta_rule(make, changes, kind, message):
    with pytest.raises(kind, match=message):
        ops.chunk_gated_delta_rule(**make(**changes))


@over({name: row for name, row in WRONG.items() if name != "g not a tensor"})
def test_fused_recurrent_gated_delta_rule(make, changes, kind, message):
    with pytest.raises(kind, match=message):
        ops.fused_recurrent_gated_delta_rule(**make(**changes))


NO_GATE = ("g ", "A_log", "dt_bias", "gate", "twice")


@over({name: row for name, row in WRONG.items() if not name.startswith(NO_GATE)})
@pytest.mark.parametrize("function", [ops.chunk_delta_rule, ops.fused_recurrent_delta_rule])
def test_delta_rule(function, make, changes, kind, message):
    arguments = make(**changes)
    del arguments["g"]
    with pytest.raises(kind, match=message):
        function(**arguments)


def test_recurrent_has_no_gates_per_channel():
    for name in ("gk", "gv"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            ops.fused_recurrent_gated_delta_rule(**whole(), **{name: X(2, 5, 4, 16)})
    arguments = {**whole(), "beta": None}
    with pytest.raises(ValueError, match="use_beta_sigmoid_in_kernel=True needs beta, got None"):
        ops.fused_recurrent_gated_delta_rule(**arguments, use_beta_sigmoid_in_kernel=True)


NOT_OF_STEP = ("state", "one offset", "offsets", "g not")
WRONG_STEP = {
    **{name: (step, *row[1:]) for name, row in WRONG.items() if not name.startswith(NOT_OF_STEP)},
    "state not a tensor": (step, {"state": None}, TypeError, r"state must be a tensor, got NoneType"),
    "state of bfloat16": (step, {"state": X(2, 4, 16, 24).bfloat16()}, TypeError, r"state must have dtype torch.float32, got torch.bfloat16"),
    "state of other N": (step, {"state": X(3, 4, 16, 24)}, ValueError, r"state must have shape \[N, HV, K, V\] = \[2, 4, 16, 24\], got \[3, 4, 16, 24\]"),
    "state transposed": (step, {"state": X(2, 4, 24, 16)}, ValueError, r"state must have shape .*got \[2, 4, 24, 16\]"),
    "state of rank 3": (step, {"state": X(2, 16, 24)}, ValueError, r"state must have shape .*got \[2, 16, 24\]"),
    "state not contiguous": (step, {"state": X(2, 4, 24, 16).transpose(2, 3)}, ValueError, r"state must be contiguous, got strides"),
    "state elsewhere": (step, {"state": X(2, 4, 16, 24, device=META)}, ValueError, r"state must be on the device of q"),
    "slots not a tensor": (step, {"state_indices": [0, 1]}, TypeError, r"state_indices must be a tensor, got list"),
    "slots of floats": (step, {"state_indices": X(2)}, TypeError, r"state_indices must have dtype torch.int32 or torch.int64, got torch.float32"),
    "slots of other N": (step, {"state_indices": X(3, dtype=torch.int32)}, ValueError, r"state_indices must have shape \[N\] = \[2\], got \[3\]"),
    "slots elsewhere": (step, {"state_indices": X(2, dtype=torch.int32, device=META)}, ValueError, r"state_indices must be on the device of q"),
}  # fmt: skip


@over(WRONG_STEP)
def test_gated_delta_rule_step(make, changes, kind, message):
    with pytest.raises(kind, match=message):
        ops.gated_delta_rule_step(**make(**changes))


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "state"])
def test_step_has_no_gradient(name):
    arguments = step()
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match="gated_delta_rule_step has no gradient"):
        ops.gated_delta_rule_step(**arguments)


@pytest.mark.parametrize("make", [whole, step], ids=["whole", "step"])
def test_the_valid_arguments_are_valid(make):
    """The tables above change one argument of calls that would otherwise succeed."""
    if make is step:
        ops.gated_delta_rule_step(**step())
        return
    ops.chunk_gated_delta_rule(**whole())
    ops.fused_recurrent_gated_delta_rule(**whole())
    ops.chunk_gated_delta_rule(**packed([0, 2, 5]))


DIRECT = {
    "rank": ({"q": X(5, 2, 16)}, "q, k and v must be"),
    "k": ({"k": X(2, 5, 2, 8)}, "k has the wrong shape"),
    "dtypes": ({"k": X(2, 5, 2, 16).half()}, "one dtype"),
    "integers": ({"q": X(2, 5, 2, 16).int()}, "q must be float"),
    "heads": ({"v": X(2, 5, 3, 24)}, "multiple"),
    "sizes": ({"q": X(2, 5, 2, 257), "k": X(2, 5, 2, 257)}, r"must be in 1\.\.\.256"),
    "beta": ({"beta": X(2, 5, 2)}, "beta has the wrong shape"),
    "g": ({"g": X(2, 5, 4).double()}, "g has the wrong dtype"),
    "strides": ({"beta": X(2, 4, 5).transpose(1, 2)}, "beta must be contiguous"),
    "state": ({"initial_state": X(3, 4, 16, 24)}, "initial_state has the wrong shape"),
    "offsets": ({"cu_seqlens": X(3, dtype=torch.int32)}, "cu_seqlens needs B == 1"),
}


@pytest.mark.parametrize(("changes", "message"), DIRECT.values(), ids=DIRECT.keys())
@pytest.mark.parametrize("operator", ["gated_delta_rule_fwd", "gated_delta_rule_recurrent_fwd"])
def test_direct_callers_of_the_operators_are_stopped_too(operator, changes, message):
    x = {**whole(), **changes}
    whole_form = operator == "gated_delta_rule_fwd"
    rest = [None, 1.0, False, True, False, False] if whole_form else [1.0, False, True, False]
    call = getattr(torch.ops.remora, operator)
    with pytest.raises(RuntimeError, match=message):
        call(x["q"], x["k"], x["v"], x["g"], x["beta"], x["initial_state"], x.get("cu_seqlens"), *rest)


def test_a_gradient_needs_the_saved_states():
    x = whole()
    x["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="needs save_states=True for a gradient"):
        torch.ops.remora.gated_delta_rule_fwd(
            x["q"], x["k"], x["v"], x["g"], x["beta"], None, None, None, 1.0, False, True, False, False
        )


@pytest.mark.parametrize(
    ("offsets", "spans"),
    [
        pytest.param(
            [-7, 10, 10, 30, 2**31 - 1, 50, -(2**31)],
            [(0, 10), (10, 10), (10, 30), (30, 40), *[(40, 40)] * 2],
            id="out of range",
        ),
        pytest.param([3, 10, 10, 30], [(3, 10), (10, 10), (10, 30)], id="tokens outside"),
        pytest.param([20, 40, 0], [(20, 40), (40, 40)], id="decreasing"),
        pytest.param([5, 30, 10, 20, 35], [(5, 30), (30, 30), (30, 30), (30, 35)], id="overlapping"),
    ],
)
def test_offsets_are_clamped_below_the_python_layer(kernels, offsets, spans):
    """The operators read nothing out of bounds, whatever the offsets say; tokens outside every sequence give zero."""
    inputs = make_inputs(Case(T=40, HV=1, K=16, V=16), requires_grad=False)
    x = [inputs.tensors[name] for name in ("q", "k", "v", "g", "beta")]
    state = torch.randn(len(spans), 1, 16, 16)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    o, final_state, saved = torch.ops.remora.gated_delta_rule_fwd(
        *x, state, offsets, None, 1.0, False, True, False, True
    )
    d_final = torch.randn_like(state)
    grads = torch.ops.remora.gated_delta_rule_bwd(
        *x, state, offsets, None, saved, inputs.d_o, d_final, 1.0, False, False
    )
    o2, state2 = torch.ops.remora.gated_delta_rule_recurrent_fwd(*x, state, offsets, 1.0, False, True, False)
    covered = torch.zeros(40, dtype=torch.bool)
    for n, (begin, end) in enumerate(spans):
        leaves = [*(t[:, begin:end].detach().requires_grad_() for t in x), state[n : n + 1].detach().requires_grad_()]
        part, last = ops.chunk_gated_delta_rule(*leaves[:5], 1.0, leaves[5], True)
        want = torch.autograd.grad([part, last], leaves, [inputs.d_o[:, begin:end], d_final[n : n + 1]])
        assert torch.equal(final_state[n], last[0])
        assert torch.equal(o[:, begin:end], part)
        part, last = ops.fused_recurrent_gated_delta_rule(
            *leaves[:4], beta=leaves[4], scale=1.0, initial_state=leaves[5], output_final_state=True
        )
        assert torch.equal(state2[n], last[0])
        assert torch.equal(o2[:, begin:end], part)
        for have, piece in zip(grads[:5], want[:5], strict=True):
            assert torch.equal(have[:, begin:end], piece)
        assert torch.equal(grads[5][n], want[5][0])
        covered[begin:end] = True
    for output in (o, o2, *grads[:5]):
        assert not output[:, ~covered].any()
