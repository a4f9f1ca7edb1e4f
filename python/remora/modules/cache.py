"""The decoding state of a model: what every layer must remember of the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class LayerCache:
    """What one mixer layer carries from one call to the next, for `N` sequences.

    Attributes:
        conv_states: the last `W - 1` inputs of each short convolution, each `[N, W - 1, D]`, in the dtype of the
            convolution's input. Empty for a mixer without short convolutions.
        recurrent_state: the memory of the recurrence, `[N, HV, K, V]`, fp32.
    """

    conv_states: tuple[Tensor, ...]
    recurrent_state: Tensor


class Cache:
    """The states of all layers of a model, keyed by `layer_idx`.

    A cache starts empty. The first call that receives it (the prefill) creates the states, later calls continue from
    them and update them. A call with one token a sequence (a decode step) updates the tensors in place, so that a
    captured CUDA graph keeps reading and writing the same memory.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerCache] = {}

    def get(self, layer_idx: int) -> LayerCache | None:
        """Return the state of a layer, or None before its first call."""
        return self.layers.get(layer_idx)

    def set(self, layer_idx: int, state: LayerCache) -> None:
        """Replace the state of a layer."""
        self.layers[layer_idx] = state

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_bytes(self) -> int:
        """Memory held by all states; it does not grow with the number of tokens seen."""
        tensors = (tensor for layer in self.layers.values() for tensor in (*layer.conv_states, layer.recurrent_state))
        return sum(tensor.nbytes for tensor in tensors)
