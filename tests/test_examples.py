"""The examples run, and do what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


@pytest.mark.cpu_only
def test_a_custom_layer_learns_to_recall(monkeypatch):
    assert run("custom_layer", monkeypatch, "--steps", "100", "--backend", "aot_eager") > 0.7  # by guessing: 0.06


@pytest.mark.cpu_only
def test_serving_from_a_pool_gives_what_one_call_gives(monkeypatch):
    assert run("serving", monkeypatch) < 1e-5


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"custom_layer", "serving"}
