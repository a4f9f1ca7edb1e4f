"""The one rule by which a result of a kernel is accepted.

Three tensors meet: `actual`, from the kernel; `oracle`, the same function of the same (already rounded) inputs in
float64; `yardstick`, the same mathematics done by plain PyTorch in the operator's dtype. `actual` passes if

1. it is NaN where the oracle is NaN and infinite where the oracle is, with the same sign, and nowhere else;
2. `max |actual - oracle| <= 2 max |yardstick - oracle| + slack`, where the slack is twice the largest rounding error of
   `oracle + 0.3 - 0.3` done in the dtype, because a yardstick may be exact by luck; for float32 also 2^-20 of the
   largest value, because tensor cores make a float32 product out of three TF32 products, of 22 bits together;
3. `rms(actual - oracle) <= bound * rms(oracle)`, with a bound per dtype;
4. for gradients, the cosine of the angle to the oracle is at least `1 - 1e-5`, or what the RMS bound implies for errors
   at right angles to the oracle, `1 - bound^2 / 2`, where that is less.

The bounds are not options of a test run: a test passes tighter ones or none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RELATIVE_RMS", "Comparison", "assert_accurate", "compare"]

RELATIVE_RMS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
COSINE_GAP = 1e-5
PRODUCT_ERROR = {torch.float32: 2**-20}  # of the largest value
UNDERFLOW = 1e-35  # what float32 intermediates may lose when a decay of e^-88 meets a product


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured, what was allowed, and the sentences that say which of it failed."""

    max_error: float
    max_allowed: float
    relative_rms: float
    relative_rms_allowed: float
    cosine_gap: float
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures


def compare(
    actual: Tensor,
    oracle: Tensor,
    yardstick: Tensor | None,
    *,
    dtype: torch.dtype,
    relative_rms: float | None = None,
    gradient: bool = False,
) -> Comparison:
    """Measures `actual` against the rule of this module.

    Args:
        actual: what the kernel returned; any floating dtype, any shape.
        oracle: float64, same shape, computed from the inputs the kernel was given.
        yardstick: same shape; None only for float64, where plain PyTorch is no less exact than the oracle.
        dtype: the dtype of the operator: an output may be wider (a float32 state of a bfloat16 operator).
        relative_rms: a bound tighter than `RELATIVE_RMS[dtype]`.
        gradient: whether rule 4 applies.
    """
    bound = RELATIVE_RMS[dtype] if relative_rms is None else relative_rms
    _check_arguments(actual, oracle, yardstick, dtype)

    in_range = oracle.to(actual.dtype)
    failures = _anomalies(actual, in_range)
    finite = torch.isfinite(in_range) & torch.isfinite(actual)
    want = oracle[finite]
    error = actual.double()[finite] - want

    max_error = _max_abs(error)
    max_allowed = math.inf
    if yardstick is not None:
        rounded = want.to(dtype)
        slack = 2 * _max_abs(rounded + 0.3 - 0.3 - rounded) + PRODUCT_ERROR.get(dtype, 0.0) * _max_abs(want)
        max_allowed = 2 * _max_abs((yardstick.double()[finite] - want).nan_to_num(posinf=0, neginf=0)) + slack
        if max_error > max_allowed:
            failures.append(f"largest error {max_error:.3g} exceeds {max_allowed:.3g} (twice plain PyTorch, and slack)")

    info = torch.finfo(actual.dtype)
    floor = max(UNDERFLOW, info.tiny * info.eps)
    rms_error, rms_want = _rms(error), _rms(want)
    measured = rms_error / rms_want if rms_want > 0 else (0.0 if rms_error <= floor else math.inf)
    if rms_error > bound * rms_want + floor:
        failures.append(f"relative RMS error {measured:.3g} exceeds {bound:.3g}")

    gap = _cosine_gap(actual.double()[finite], want) if rms_want > floor / COSINE_GAP else 0.0
    gap_allowed = max(COSINE_GAP, bound**2 / 2)
    if gradient and gap > gap_allowed:
        failures.append(f"1 - cosine {gap:.3g} exceeds {gap_allowed:.3g}")
    return Comparison(max_error, max_allowed, measured, bound, gap, tuple(failures))


def assert_accurate(
    actual: Tensor,
    oracle: Tensor,
    yardstick: Tensor | None,
    name: str,
    *,
    dtype: torch.dtype,
    relative_rms: float | None = None,
    gradient: bool = False,
) -> Comparison:
    """Raises AssertionError, naming `name` and every part of the rule that failed; arguments as in `compare`."""
    result = compare(actual, oracle, yardstick, dtype=dtype, relative_rms=relative_rms, gradient=gradient)
    if not result.ok:
        raise AssertionError(f"{name} {list(actual.shape)}: " + "; ".join(result.failures))
    return result


def _check_arguments(actual: Tensor, oracle: Tensor, yardstick: Tensor | None, dtype: torch.dtype) -> None:
    if oracle.dtype != torch.float64:
        raise TypeError(f"oracle must be float64, got {oracle.dtype}")
    if yardstick is None and dtype != torch.float64:
        raise TypeError(f"yardstick must be given for {dtype}, got None")
    for name, tensor in (("actual", actual), ("yardstick", yardstick)):
        if tensor is not None and tensor.shape != oracle.shape:
            raise AssertionError(f"{name} has shape {list(tensor.shape)}, the oracle {list(oracle.shape)}")


def _anomalies(actual: Tensor, oracle: Tensor) -> list[str]:
    failures = []
    for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        have, want = test(actual), test(oracle)
        if not torch.equal(have, want):
            index = torch.nonzero(have != want)[0].tolist()
            failures.append(f"{int(have.sum())} {name} where {int(want.sum())} are right, first at {index}")
    return failures


def _max_abs(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    """Scaled by the largest entry, so that squares of tiny entries do not underflow."""
    largest = _max_abs(x)
    return largest * float((x / largest).square().mean().sqrt()) if largest > 0 else 0.0


def _cosine_gap(x: Tensor, y: Tensor) -> float:
    largest_x, largest_y = _max_abs(x), _max_abs(y)
    if largest_x == 0 or largest_y == 0:
        return 1.0
    x, y = x / largest_x, y / largest_y
    return float(1 - (x @ y) / (x.norm() * y.norm()))
