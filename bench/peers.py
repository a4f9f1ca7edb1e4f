"""Implementations of the recurrences on the CPU: ours and what a user could pick instead.

Each takes tensors in the layout it wants, prepared outside of the timed call. One that cannot be imported is absent,
with the
reason; nothing is dropped without a word.
"""

import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs, Outputs

Run = Callable[[], Outputs]


class Absent(Exception):  # noqa: N818
    """A peer that this environment does not have, or that does not do a case."""


@dataclass(frozen=True)
class Peer:
    name: str
    package: str | None  # of which the version is reported
    prepare: Callable[[Inputs], Run]  # a function to be timed; raises Absent
    ours: bool = False

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package) if self.package else ""
        except importlib.metadata.PackageNotFoundError:
            return "not installed"


def backward(f: Callable[..., Tensor], x: Inputs) -> Run:
    """Forward, and backward too if the case wants it. f: differentiable, of the inputs in the operator's order."""
    inputs = [getattr(x, name) for name in x.case.inputs]
    if x.case.mode == "fwd":

        def forward() -> Outputs:
            with torch.no_grad():
                return {"o": f(*inputs)}

        return forward
    leaves = [t.detach().requires_grad_() for t in inputs]

    def both() -> Outputs:
        o = f(*leaves)
        grads = torch.autograd.grad(o, leaves, x.d_o)
        return {"o": o.detach(), **{f"d{name}": d for name, d in zip(x.case.inputs, grads, strict=True)}}

    return both


def rotating(x: Inputs, step: Callable[[int], Tensor], states: list[Tensor]) -> Run:
    """Decode steps on the state sets in turn."""
    turn = -1

    def run() -> Outputs:
        nonlocal turn
        turn = (turn + 1) % len(states)
        return {"o": step(turn), "state": states[turn]}

    return run


def remora(x: Inputs) -> Run:
    import remora.ops as ops

    whole, step = {
        "gated_delta_rule": (ops.chunk_gated_delta_rule, ops.gated_delta_rule_step),
        "simple_gla": (ops.chunk_simple_gla, ops.simple_gla_step),
    }[x.case.op]
    if x.case.mode == "decode":
        states, inputs = [s.clone() for s in x.states], [getattr(x, name) for name in x.case.inputs]
        return rotating(x, lambda n: step(*inputs, states[n]), states)
    return backward(lambda *t: whole(*t)[0], x)


def only_gated_delta_rule(x: Inputs) -> None:
    if x.case.op != "gated_delta_rule":
        raise Absent("the gated delta rule only")


def remora_gates(x: Inputs) -> Run:
    only_gated_delta_rule(x)
    import remora.ops as ops

    if x.case.mode != "decode":
        raise Absent("a variant of the decode step")
    states = [s.clone() for s in x.states]
    gates = {"use_gate_in_kernel": True, "A_log": x.a_log, "dt_bias": x.dt_bias, "use_beta_sigmoid_in_kernel": True}
    a, b = x.a.float(), x.b.float()
    return rotating(x, lambda n: ops.gated_delta_rule_step(x.q, x.k, x.v, a, b, states[n], **gates), states)


def onnx_session(case: Case, dtype: str = "fp32") -> object:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    B, T, H, D = case.B, case.T, case.H, case.D
    shapes = {
        "q": [B, T, H * D],
        "k": [B, T, H * D],
        "v": [B, T, H * D],
        "past": [B, H, D, D],
        "decay": [B, T, H],
        **({"beta": [B, T, H]} if case.op == "gated_delta_rule" else {}),
    }
    node = helper.make_node(
        "LinearAttention",
        list(shapes),
        ["o", "present"],
        domain="com.microsoft",
        q_num_heads=H,
        kv_num_heads=H,
        update_rule="gated_delta" if case.op == "gated_delta_rule" else "gated",
    )
    graph = helper.make_graph(
        [node],
        case.op,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[s]) for n, s in (("o", "v"), ("present", "past"))],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # its threads must not run into the next peer's time
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def onnxruntime(x: Inputs) -> Run:
    """Zero copies: the session reads and writes the tensors' memory; decode binds one buffer as old and new state."""
    import numpy

    if x.case.mode == "fwd+bwd":
        raise Absent("forward only")
    if x.case.dtype != "fp32":
        raise Absent("the operator is fp32 only on the CPU")
    case = x.case
    session = onnx_session(case)
    o = torch.empty(case.B, case.T, case.H * case.D)

    def bind(state: Tensor, new: Tensor) -> object:
        binding = session.io_binding()
        flat = {
            "q": x.q.flatten(2),
            "k": x.k.flatten(2),
            "v": x.v.flatten(2),
            "decay": x.g,
            **({"beta": x.beta} if "beta" in case.inputs else {}),
            "past": state,
        }
        for name, t in flat.items():
            binding.bind_input(name, "cpu", 0, numpy.float32, list(t.shape), t.data_ptr())
        for name, t in (("o", o), ("present", new)):
            binding.bind_output(name, "cpu", 0, numpy.float32, list(t.shape), t.data_ptr())
        return binding

    shape = (case.B, case.T, case.H, case.D)
    if case.mode == "decode":
        states = [s.clone() for s in x.states]
        bindings = [bind(s, s) for s in states]

        def step(n: int, keep: Inputs = x) -> Tensor:
            session.run_with_iobinding(bindings[n])
            return o.view(shape)

        return rotating(x, step, states)
    zero = torch.zeros(case.B, case.H, case.D, case.D)
    new = torch.empty_like(zero)
    binding = bind(zero, new)
    bound = (x, zero, new)  # the binding has their addresses only

    def run(keep: object = bound) -> Outputs:
        session.run_with_iobinding(binding)
        return {"o": o.view(shape)}

    return run


def onnxruntime_cast(x: Inputs) -> Run:
    """What a bf16 user can do: cast to fp32, the fp32 operator, cast back; the casts are timed."""
    if x.case.dtype != "bf16" or x.case.mode != "fwd":
        raise Absent("a way to do bf16 forward")
    wide = Inputs(
        **{
            **vars(x),
            "case": Case("fwd", "fp32", x.case.B, x.case.T, x.case.H, x.case.D, op=x.case.op),
            "q": x.q.float(),
            "k": x.k.float(),
            "v": x.v.float(),
        }
    )
    inner = onnxruntime(wide)

    def run() -> Outputs:
        for name in ("q", "k", "v"):
            getattr(wide, name).copy_(getattr(x, name))
        return {"o": inner()["o"].bfloat16()}

    return run


def openvino(x: Inputs) -> Run:
    """An operator internal to OpenVINO: Python has no constructor for it, but a model read from text may name it."""
    only_gated_delta_rule(x)
    import openvino as ov

    case = x.case
    if case.mode == "fwd+bwd":
        raise Absent("forward only")
    if case.mode == "decode" and case.dtype != "fp32":
        raise Absent("its state has the dtype of the inputs")
    B, T, H, D = case.B, case.T, case.H, case.D
    fp32 = case.dtype == "fp32"
    kind, precision, dtype = ("f32", "FP32", torch.float32) if fp32 else ("bf16", "BF16", torch.bfloat16)
    shapes = [(B, T, H, D)] * 3 + [(B, H, D, D)] + [(B, T, H)] * 2

    def layer(n: int, name: str, version: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> str:
        dims = ("".join(f"<dim>{d}</dim>" for d in s) for s in inputs + outputs)
        ports = [f'<port id="{i}" precision="{precision}">{d}</port>' for i, d in enumerate(dims)]
        data = f'<data shape="{",".join(map(str, outputs[0]))}" element_type="{kind}"/>' if name == "Parameter" else ""
        sides = f"<input>{''.join(ports[: len(inputs)])}</input><output>{''.join(ports[len(inputs) :])}</output>"
        return f'<layer id="{n}" name="{name}{n}" type="{name}" version="{version}">{data}{sides}</layer>'

    layers = [layer(n, "Parameter", "opset1", [], [s]) for n, s in enumerate(shapes)]
    layers += [layer(6, "GatedDeltaNet", "extension", shapes, [shapes[2], shapes[3]])]
    layers += [layer(7 + n, "Result", "opset1", [shapes[2 + n]], []) for n in range(2)]
    links = [(n, 0, 6, n) for n in range(6)] + [(6, 6, 7, 0), (6, 7, 8, 0)]
    edges = [f'<edge from-layer="{a}" from-port="{b}" to-layer="{c}" to-port="{d}"/>' for a, b, c, d in links]
    text = f'<net name="rule" version="11"><layers>{"".join(layers)}</layers><edges>{"".join(edges)}</edges></net>'
    core = ov.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, which brings the operator
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(text.encode(), b""), "CPU", options)
    o = torch.empty(B, T, H, D, dtype=dtype)
    states = [s.clone() for s in x.states] or [torch.zeros(B, H, D, D, dtype=dtype)]
    gates = [t.to(dtype) for t in (x.g, x.beta)]

    def request(state: Tensor) -> Any:
        bound = compiled.create_infer_request()
        new = state if x.states else torch.empty_like(state)
        tensors = [x.q, x.k, x.v, state, *gates, o, new]
        shared = [
            ov.Tensor(t.view(-1).view(torch.uint8).numpy(), ov.Shape(list(t.shape)), getattr(ov.Type, kind))
            for t in tensors
        ]
        for n in range(6):
            bound.set_input_tensor(n, shared[n])
        for n in range(2):
            bound.set_output_tensor(n, shared[6 + n])
        return bound, tensors, shared  # which the request does not keep alive

    requests = [request(s) for s in states]

    def step(n: int) -> Tensor:
        requests[n][0].infer()
        return o

    run = rotating(x, step, states)
    return run if x.states else lambda: {"o": run()["o"]}


def zentorch(x: Inputs) -> Run:
    only_gated_delta_rule(x)
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        raise ImportError("its kernels are AVX-512 instructions, which end the process on this machine")
    importlib.import_module("zentorch")
    ops, case = torch.ops.zentorch, x.case
    if case.mode == "fwd+bwd":
        raise Absent("forward only")
    B, T, H, D = case.B, case.T, case.H, case.D
    if case.mode == "decode":
        # slot 0 is its null block: a sequence that points there is skipped
        states = [torch.cat([torch.zeros(1, H, D, D), s.transpose(-1, -2)]) for s in x.states]
        mixed = torch.cat([t.flatten(1) for t in (x.q, x.k, x.v)], -1)
        a, b = x.a.view(B, H), x.b.view(B, H)
        index, o = torch.arange(1, B + 1, dtype=torch.int32), torch.empty(B, 1, H, D, dtype=x.q.dtype)
        turn = -1

        def run() -> Outputs:
            nonlocal turn
            turn = (turn + 1) % len(states)
            ops.gdn_fused_recurrent_gated_delta_rule_packed_decode(
                mixed, a, b, x.a_log, x.dt_bias, x.scale, states[turn], o, index, False
            )
            return {"o": o, "state": states[turn][1:].transpose(-1, -2)}

        return run
    if B != 1:
        q, k, v, g, beta = (t.flatten(0, 1).unsqueeze(0) for t in (x.q, x.k, x.v, x.g, x.beta))
    else:
        q, k, v, g, beta = x.q, x.k, x.v, x.g, x.beta
    chunk = 32
    each = -(-T // chunk)
    cu = torch.arange(B + 1, dtype=torch.int32) * T
    indices = torch.tensor([(s, n) for s in range(B) for n in range(each)], dtype=torch.int32)
    offsets = torch.arange(B + 1, dtype=torch.int32) * each

    def forward() -> Outputs:
        o, _ = ops.gdn_chunk_gated_delta_rule_fwd(q, k, v, g, beta, x.scale, None, True, chunk, cu, indices, offsets)
        return {"o": o.view(B, T, H, D)}

    return forward


def transformers(x: Inputs) -> Run:
    only_gated_delta_rule(x)
    if x.case.mode == "decode":
        raise Absent("its recurrent path was 20x slower than the others at decoding")
    missing = object()
    before = sys.modules.get("fla", missing)
    sys.modules["fla"] = None  # type: ignore[assignment]  # it would be called in place of the torch path
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    finally:
        if before is missing:
            del sys.modules["fla"]
        else:
            sys.modules["fla"] = before  # type: ignore[assignment]
    plain = inspect.unwrap(torch_chunk_gated_delta_rule)
    return backward(lambda *t: plain(*t)[0], x)


def bitsandbytes_function() -> Callable[..., tuple[Tensor, Tensor]]:
    """The fork's gated delta rule, of q, k, v, beta, g; differentiable."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.origin:
        raise ImportError("No module named 'bitsandbytes'")
    folder = pathlib.Path(spec.origin).parent
    os.environ["GDN_CPU_CHUNK"] = "64"
    fast = folder / "libbitsandbytes_cpu_avx512.so"
    if fast.exists() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ["GDN_CPU_LIB"] = str(fast)
    name = "bench_bnb_gdn_cpu"
    if name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(name, folder / "gdn_cpu.py")
        if module_spec is None or module_spec.loader is None or not (folder / "gdn_cpu.py").exists():
            raise Absent("this bitsandbytes is not the CPU fork")
        sys.modules[name] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(sys.modules[name])
    function: Callable[..., tuple[Tensor, Tensor]] = sys.modules[name].fused_recurrent_gated_delta_rule
    return function


def bitsandbytes_fork(x: Inputs) -> Run:
    only_gated_delta_rule(x)
    if x.case.mode == "decode":
        raise Absent("no decode step in place")
    f = bitsandbytes_function()
    return backward(lambda q, k, v, g, beta: f(q, k, v, beta, g, scale=x.scale)[0], x)


def chunked_torch(x: Inputs) -> Run:
    from . import chunked_torch as m

    whole, step = {
        "gated_delta_rule": (m.chunked_gated_delta_rule, m.step_),
        "simple_gla": (m.chunked_simple_gla, m.simple_gla_step_),
    }[x.case.op]
    if x.case.mode == "decode":
        states, inputs = [s.clone() for s in x.states], [getattr(x, name) for name in x.case.inputs]
        return rotating(x, lambda n: step(*inputs, states[n], x.scale).to(x.q.dtype), states)
    return backward(lambda *t: whole(*t, x.scale), x)


def compiled_torch(x: Inputs) -> Run:
    from .chunked_torch import chunked_simple_gla

    if x.case.op != "simple_gla" or x.case.mode == "decode":
        raise Absent("whole sequences of simple_gla only")
    compiled = torch.compile(chunked_simple_gla, dynamic=False)
    return backward(lambda *t: compiled(*t, x.scale), x)


PEERS = [
    Peer("remora", "remora", remora, ours=True),
    Peer("remora, gates in kernel", "remora", remora_gates, ours=True),
    Peer("onnxruntime LinearAttention", "onnxruntime", onnxruntime),
    Peer("onnxruntime between casts", "onnxruntime", onnxruntime_cast),
    Peer("OpenVINO GatedDeltaNet", "openvino", openvino),
    Peer("zentorch", "zentorch", zentorch),
    Peer("bitsandbytes-cpu-fork", "bitsandbytes-cpu-fork", bitsandbytes_fork),
    Peer("transformers", "transformers", transformers),
    Peer("hand-chunked torch", "torch", chunked_torch),
    Peer("hand-chunked torch, compiled", "torch", compiled_torch),
]
