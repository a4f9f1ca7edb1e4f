"""Full models: thin compositions of modules."""

from remora.models.language_model import LanguageModel, LanguageModelConfig, LanguageModelOutput
from remora.models.mixers import Mixer, get_mixer, register_mixer
from remora.models.mixture_of_memories import MOM_1_3B, MOM_340M, MOM_TINY, convert_released_mom
from remora.models.sampling import sample
from remora.models.scout import SCOUT_MAMBA_1_59B, SCOUT_MAMBA_430M, SCOUT_SWA_1_57B, SCOUT_SWA_470M, SCOUT_TINY
from remora.models.ultramem_v2 import ULTRAMEM_V2_1B, ULTRAMEM_V2_227M, ULTRAMEM_V2_TINY

__all__ = [
    "MOM_1_3B",
    "MOM_340M",
    "MOM_TINY",
    "SCOUT_MAMBA_1_59B",
    "SCOUT_MAMBA_430M",
    "SCOUT_SWA_1_57B",
    "SCOUT_SWA_470M",
    "SCOUT_TINY",
    "ULTRAMEM_V2_1B",
    "ULTRAMEM_V2_227M",
    "ULTRAMEM_V2_TINY",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "Mixer",
    "convert_released_mom",
    "get_mixer",
    "register_mixer",
    "sample",
]
