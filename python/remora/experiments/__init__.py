"""Experiments that compare memories, run from the command line."""

from remora.experiments.recall import RecallConfig, recall_table, run_recall

__all__ = ["RecallConfig", "recall_table", "run_recall"]
