"""The decoding state of a model: what every layer must remember of the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar, overload

from torch import Tensor


class LayerState(Protocol):
    """What one layer carries from one call to the next."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the state."""
        ...


@dataclass(slots=True)
class LayerCache:
    """What one recurrent mixer layer carries from one call to the next, for `N` sequences.

    Attributes:
        conv_states: the last `W - 1` inputs of each short convolution, each `[N, W - 1, D]`, in the dtype of the
            convolution's input. Empty for a mixer without short convolutions.
        recurrent_state: the memory of the recurrence, `[N, HV, K, V]` (of a selective scan `[N, D, S]`), fp32.
    """

    conv_states: tuple[Tensor, ...]
    recurrent_state: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.conv_states, self.recurrent_state)


@dataclass(slots=True)
class KeyValueCache:
    """What one attention layer carries from one call to the next, for `B` sequences of one length.

    Attributes:
        keys, values: `[B, S, Hk, D]`, those that later tokens may read.
        num_tokens: tokens seen.
        segment: of segment compression that is no choice of one token, what later tokens complete: keys, values (and
            gates) of the unfinished segment, each `[B, r, Hk, D]`.
    """

    keys: Tensor
    values: Tensor
    num_tokens: int
    segment: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values, *self.segment)


State = TypeVar("State", bound=LayerState)


class Cache:
    """The states of all layers of a model, keyed by `layer_idx`.

    A cache starts empty. The first call that receives it (the prefill) creates the states, later calls continue from
    them and update them. A call with one token a sequence (a decode step) updates the tensors of recurrent layers in
    place, so that a captured CUDA graph keeps reading and writing the same memory; keys and values of attention layers
    grow.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerState] = {}

    @overload
    def get(self, layer_idx: int) -> LayerCache | None: ...
    @overload
    def get(self, layer_idx: int, kind: type[State]) -> State | None: ...
    def get(self, layer_idx: int, kind: type[LayerState] = LayerCache) -> LayerState | None:
        """Return the state of a layer, or None before its first call.

        Raises:
            TypeError: the state of the layer is of another kind: two layers share an index.
        """
        state = self.layers.get(layer_idx)
        if state is not None and not isinstance(state, kind):
            raise TypeError(f"the state of layer {layer_idx} must be a {kind.__name__}, got a {type(state).__name__}")
        return state

    def set(self, layer_idx: int, state: LayerState) -> None:
        """Replace the state of a layer."""
        self.layers[layer_idx] = state

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_bytes(self) -> int:
        """Memory held by all states; that of recurrent layers does not grow with the number of tokens seen."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors)
