"""Full models: thin compositions of modules."""

from remora.models.language_model import LanguageModel, LanguageModelConfig, LanguageModelOutput
from remora.models.mixers import Mixer, get_mixer, register_mixer
from remora.models.sampling import sample

__all__ = [
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "Mixer",
    "get_mixer",
    "register_mixer",
    "sample",
]
