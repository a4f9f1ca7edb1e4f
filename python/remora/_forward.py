"""REMORA_BACKEND=cuda: operators on CPU tensors run on the GPU, on copies of their arguments.

For the test-suite on a machine with a GPU, which it runs as it stands. A copy keeps strides, offsets and what shares
storage with what; written arguments are copied back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_registrations: list[torch.library.Library] = []  # they hold as long as they live


def _forwarded(op: Any) -> Callable[..., Any]:
    written = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]

    def run(*args: Any) -> Any:
        storages: dict[int, Any] = {}

        def to_gpu(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return [to_gpu(y) for y in x] if isinstance(x, list) else x
            storage = x.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage.cuda()
            copy = torch.empty(0, dtype=x.dtype, device="cuda")
            return copy.set_(storages[storage.data_ptr()], x.storage_offset(), x.shape, x.stride())

        on_gpu = [to_gpu(x) for x in args]
        result = op(*on_gpu)
        for x, copy, changed in zip(args, on_gpu, written, strict=False):
            if changed and x is not None:
                x.copy_(copy)
        return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, result)

    return run


def install() -> None:
    """Replaces the CPU kernels of every operator of remora."""
    library = torch.library.Library("remora", "IMPL")
    _registrations.append(library)
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        if namespace == "remora":
            base, _, overload = rest.partition(".")
            op = getattr(getattr(torch.ops.remora, base), overload or "default")
            library.impl(rest, _forwarded(op), "CPU", allow_override=True)
