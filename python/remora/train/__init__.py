"""Training a byte-level language model: data, baseline, run."""

from remora.train.data import Corpus, TrainingWindows, ValidationWindows, load_corpus
from remora.train.ngram import ByteNgram
from remora.train.trainer import TrainConfig, Trainer, resumed_config

__all__ = [
    "ByteNgram",
    "Corpus",
    "TrainConfig",
    "Trainer",
    "TrainingWindows",
    "ValidationWindows",
    "load_corpus",
    "resumed_config",
]
