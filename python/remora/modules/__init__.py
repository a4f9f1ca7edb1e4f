"""Layers: parameters, initialisation, and the state for decoding."""

from remora.modules.cache import Cache, KeyValueCache, LayerCache
from remora.modules.convolution import ShortConvolution
from remora.modules.gated_delta_net import GatedDeltaNet
from remora.modules.grouped_linear import GroupedLinear
from remora.modules.mamba import Mamba
from remora.modules.memory_table import MemoryTable, memory_parameter_groups
from remora.modules.mixture_of_memories import MixtureOfMemories, Routing
from remora.modules.mlp import SwiGLU
from remora.modules.normalization import GatedRMSNorm, RMSNorm
from remora.modules.product_key_memory import PEER, MemoryPlus, ProductKeyMemory
from remora.modules.segment_attention import SegmentCompressedAttention, SlidingWindowAttention
from remora.modules.ultra_mem import UltraMem, UltraMemV2

__all__ = [
    "PEER",
    "Cache",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "GroupedLinear",
    "KeyValueCache",
    "LayerCache",
    "Mamba",
    "MemoryPlus",
    "MemoryTable",
    "MixtureOfMemories",
    "ProductKeyMemory",
    "RMSNorm",
    "Routing",
    "SegmentCompressedAttention",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SwiGLU",
    "UltraMem",
    "UltraMemV2",
    "memory_parameter_groups",
]
