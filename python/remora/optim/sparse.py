"""AdamW, row-wise AdamW and row-wise Adagrad as optimizers of torch, for row gradients and dense ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from remora.ops import rowwise_adagrad_, rowwise_adam_, sparse_adamw_
from remora.ops.pkm.sparse_optim import SparseMode
from remora.optim.row_gradients import RowGradient, forget_rows, row_gradient

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class _RowOptimizer(torch.optim.Optimizer):
    """What the optimizers share: where gradients come from, and states that keep their dtype when they are loaded."""

    def _update(self, table: Tensor, gradient: RowGradient, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient: a row gradient, a dense or a sparse one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        for index, (group, p) in enumerate(pairs):
            gradient = self._gradient(p)
            if gradient is None:
                continue
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            # Tables of one optimizer round with different bits.
            seed = (group["seed"] + index * 0x9E3779B97F4A7C15) % 2**63
            self._update(_as_table(p), gradient, group | {"seed": seed, "column_offset": _column_offset(p)}, state)
        return loss

    def _gradient(self, p: Tensor) -> RowGradient | None:
        rows = row_gradient(p)
        if rows is not None and p.grad is not None:
            raise ValueError("a table must have a row gradient or a dense one, got both")
        if rows is not None or p.grad is None:
            return rows
        if p.grad.is_sparse:
            grad = p.grad.coalesce()
            index = grad.indices()[0]
            count = torch.full((1,), index.numel(), dtype=torch.int32, device=p.device)
            return RowGradient(index.contiguous(), grad.values().flatten(1).contiguous(), count)
        values = _as_table(p.grad.contiguous())
        index = torch.arange(values.shape[0], device=p.device)
        return RowGradient(index, values, torch.full((1,), values.shape[0], dtype=torch.int32, device=p.device))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, row gradients included."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                forget_rows(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; states keep their dtype, whatever that of the parameters."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[p][name] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value


def _as_table(p: Tensor) -> Tensor:
    """A parameter of any shape as [N, d]; vectors are one row."""
    if not p.is_contiguous():
        raise ValueError(f"parameters must be contiguous, got strides {p.stride()}")
    return p.detach().view(p.shape[0], -1) if p.dim() >= 2 else p.detach().view(1, -1)


def _column_offset(p: Tensor) -> int:
    return int(getattr(p, "column_offset", 0))


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _rounding(group: dict[str, Any], table: Tensor) -> dict[str, Any]:
    return {
        "stochastic_rounding": group["stochastic_rounding"] and table.dtype == torch.bfloat16,
        "seed": group["seed"],
        "column_offset": group["column_offset"],
    }


class SparseAdamW(_RowOptimizer):
    """AdamW whose work and memory traffic are those of the rows that have a gradient.

    Parameters may be tables with row gradients (`memory_bag(..., row_grad=...)`, the modules' `sparse_grad=True`,
    `nn.Embedding(sparse=True)`) and any others with dense ones, which get dense AdamW. Moments are float32 (float64 for
    float64), whatever the dtype of the parameters. Nothing waits for the device.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        mode: what becomes of rows without a gradient: "lazy" (nothing), "catchup" (the decay they missed, at their next
            gradient) or "dense" (the step with a gradient of zero); see `remora.ops.sparse_adamw_`.
        stochastic_rounding: round bfloat16 parameters right in the mean.
        seed: of the rounding.

    Raises:
        ValueError: an option is out of range.

    Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019).
    """

    _rowwise = False

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        mode: Literal["lazy", "catchup", "dense"] = "lazy",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if mode not in get_args(SparseMode):
            raise ValueError(f"mode must be one of {get_args(SparseMode)}, got {mode!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "mode": mode,
            "stochastic_rounding": stochastic_rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _update(self, table: Tensor, gradient: RowGradient, group: dict[str, Any], state: dict[str, Any]) -> None:
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(table, dtype=_wide(table))
            shape = table.shape[:1] if self._rowwise else table.shape
            state["exp_avg_sq"] = table.new_zeros(shape, dtype=_wide(table))
            if group["mode"] == "catchup":
                state["last_step"] = table.new_zeros(table.shape[0], dtype=torch.int32)
                state["row_log_decay"] = table.new_zeros(table.shape[0], dtype=torch.float64)
                state["log_decay"] = 0.0
        lr = float(group["lr"])
        (rowwise_adam_ if self._rowwise else sparse_adamw_)(
            table, state["exp_avg"], state["exp_avg_sq"], gradient.rows, gradient.values, lr=lr,
            betas=tuple(group["betas"]), eps=group["eps"], weight_decay=group["weight_decay"], step=state["step"],
            num_rows=gradient.num_rows, grad_scale=gradient.scale, mode=group["mode"],
            last_step=state.get("last_step"), row_log_decay=state.get("row_log_decay"),
            log_decay=state.get("log_decay", 0.0), **_rounding(group, table),
        )  # fmt: skip
        if group["mode"] == "catchup":
            state["log_decay"] += math.log1p(-lr * group["weight_decay"])

    @torch.no_grad()
    def catch_up(self) -> None:
        """With mode "catchup", apply to all rows the decay they missed: before weights are evaluated or saved."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not state or "last_step" not in state:
                    continue
                missed = (state["step"] - state["last_step"]).double()[:, None]
                factor = (state["log_decay"] - state["row_log_decay"]).exp()[:, None]
                _as_table(p).mul_(factor.to(_wide(p)))
                beta1, beta2 = group["betas"]
                state["exp_avg"].mul_((beta1**missed).to(_wide(p)))
                second = state["exp_avg_sq"]
                second.mul_((beta2**missed).to(_wide(p)).view(-1, *(1,) * (second.dim() - 1)))
                state["last_step"].fill_(state["step"])
                state["row_log_decay"].fill_(state["log_decay"])


class RowwiseAdamW(SparseAdamW):
    """`SparseAdamW` with one second moment a row: v <- b2 v + (1 - b2) mean(g^2). Its state is half as large."""

    _rowwise = True


class RowwiseAdagrad(_RowOptimizer):
    """Adagrad with one accumulator a row: G <- G + mean(g^2), p <- (1 - lr wd) p - lr g / (sqrt(G) + eps).

    Args:
        params: parameters or groups of them; gradients as in `SparseAdamW`.
        lr: learning rate.
        eps: added to the root.
        weight_decay: decoupled, on rows that have a gradient.
        initial_accumulator_value: G before the first step.
        stochastic_rounding, seed: as in `SparseAdamW`.

    Raises:
        ValueError: an option is out of range.

    Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods" (JMLR 2011); one accumulator a row as in FBGEMM.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        initial_accumulator_value: float = 0.0,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay),
                            ("initial_accumulator_value", initial_accumulator_value)):  # fmt: skip
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        defaults = {
            "lr": lr, "eps": eps, "weight_decay": weight_decay, "initial_accumulator_value": initial_accumulator_value,
            "stochastic_rounding": stochastic_rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _update(self, table: Tensor, gradient: RowGradient, group: dict[str, Any], state: dict[str, Any]) -> None:
        if "sum" not in state:
            initial = group["initial_accumulator_value"]
            state["sum"] = torch.full(table.shape[:1], initial, dtype=_wide(table), device=table.device)
        rowwise_adagrad_(
            table, state["sum"], gradient.rows, gradient.values, lr=float(group["lr"]), eps=group["eps"],
            weight_decay=group["weight_decay"], step=state["step"], num_rows=gradient.num_rows,
            grad_scale=gradient.scale, **_rounding(group, table),
        )  # fmt: skip
