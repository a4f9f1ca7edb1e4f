"""Trainings that do not depend on each other, spread over the cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
from tqdm import tqdm

Result = TypeVar("Result")


def perform_all(
    runs: Mapping[tuple[str, ...], Callable[[], Result]], jobs: int, device: torch.device
) -> dict[tuple[str, ...], Result]:
    """Perform runs, which can be pickled, under a progress bar; return their results by name.

    Args:
        runs: by name; started in this order.
        jobs: runs at a time, each in a process of its own with its share of the cores; 0 is one per core on the CPU,
            and one on a GPU.
        device: what the runs compute on.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(len(runs), jobs or (cores if device.type == "cpu" else 1))
    found: dict[tuple[str, ...], Result] = {}

    def finish(name: tuple[str, ...], result: Result) -> None:
        found[name] = result
        bar.set_postfix_str(", ".join(name), refresh=False)
        bar.update()

    with tqdm(total=len(runs), unit="run") as bar:
        if jobs == 1:
            for name, run in runs.items():
                finish(name, run())
            return found
        # A fresh process each: a fork would inherit the threads of this one.
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            threads = max(1, cores // jobs)
            futures = {pool.submit(_with_threads, threads, run): name for name, run in runs.items()}
            for future in as_completed(futures):
                finish(futures[future], future.result())
    return found


def _with_threads(threads: int, run: Callable[[], Result]) -> Result:
    torch.set_num_threads(threads)
    return run()
