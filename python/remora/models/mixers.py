"""Token mixers by name: what a language model can be built around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor, nn

from remora.modules import Cache, GatedDeltaNet, Mamba, MixtureOfMemories, SlidingWindowAttention


class Mixer(Protocol):
    """The call every mixer answers: `[B, T, D]` in, `[B, T, D]` out, state in the cache under its `layer_idx`."""

    def __call__(
        self, hidden_states: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor: ...


MixerFactory = Callable[..., nn.Module]
Factory = TypeVar("Factory", bound=MixerFactory)

_MIXERS: dict[str, MixerFactory] = {}


def register_mixer(name: str) -> Callable[[Factory], Factory]:
    """Register a mixer class or factory under `name`.

    The factory is called with the keyword arguments `hidden_size`, `layer_idx`, `norm_eps` and the model's
    `mixer_options`, and returns a module with the call of `Mixer`.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        if name in _MIXERS:
            raise ValueError(f"mixer {name!r} is already registered")
        _MIXERS[name] = factory
        return factory

    return register


def get_mixer(name: str) -> MixerFactory:
    """Return the factory registered under `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in _MIXERS:
        raise ValueError(f"mixer must be one of {sorted(_MIXERS)}, got {name!r}")
    return _MIXERS[name]


register_mixer("gated_delta_net")(GatedDeltaNet)
register_mixer("mixture_of_memories")(MixtureOfMemories)
register_mixer("mamba")(Mamba)
register_mixer("sliding_window_attention")(SlidingWindowAttention)
