"""Experiments that compare memories, run from the command line."""

from remora.experiments.needle import NeedleConfig, needle_table, run_needle
from remora.experiments.recall import RecallConfig, recall_table, run_recall
from remora.experiments.retention import RetentionConfig, retention_table, run_retention

__all__ = [
    "NeedleConfig",
    "RecallConfig",
    "RetentionConfig",
    "needle_table",
    "recall_table",
    "retention_table",
    "run_needle",
    "run_recall",
    "run_retention",
]
