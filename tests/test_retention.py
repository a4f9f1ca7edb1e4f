"""The retention experiment: its facts, its contenders, and the command."""

import json
from collections import Counter

import pytest
import torch

from remora import cli
from remora.experiments import RetentionConfig, run_retention
from remora.experiments.retention import (
    FactModel,
    Facts,
    contenders,
    ffn_flops,
    fresh_facts,
    memory_flops,
    writing_batches,
)
from remora.experiments.retention import probe as probe_facts

pytestmark = pytest.mark.cpu_only

TINY = {
    "seeds": 2, "hidden_size": 16, "num_layers": 1, "num_keys": 8, "topk": 2, "num_symbols": 8, "num_values": 8,
    "facts": 6, "max_exposures": 2, "batch_size": 8, "warmup_updates": 2, "updates": (0, 3),
}  # fmt: skip


def test_facts_are_written_as_often_as_they_say():
    config = RetentionConfig(**TINY)
    generator = torch.Generator().manual_seed(0)
    written = Facts.draw(config, generator)
    assert (written.values != written.foils).all()
    assert len({tuple(key) for key in written.keys.tolist()}) == 12
    shown = Counter()
    for keys, values in writing_batches(config, written, generator):
        assert len(keys) <= config.batch_size
        shown.update((*key, value) for key, value in zip(keys.tolist(), values.tolist(), strict=True))
    for key, value, exposures in zip(
        written.keys.tolist(), written.values.tolist(), written.exposures.tolist(), strict=True
    ):
        assert shown[(*key, value)] == exposures
    known = {tuple(key) for key in written.keys.tolist()}
    keys, _ = fresh_facts(config, written, generator, 64)
    assert known.isdisjoint(tuple(key) for key in keys.tolist())


@pytest.mark.parametrize("config", [RetentionConfig(), RetentionConfig.quick()], ids=["default", "quick"])
def test_contenders_take_the_same_operations(config):
    shapes = contenders(config).values()
    flops = [ffn_flops(config.hidden_size, width) + memory_flops(config, name) for name, width in shapes]
    assert max(flops) / min(flops) < 1.02
    assert all(width > 0 for _, width in contenders(config).values())


def test_probe():
    config = RetentionConfig(**TINY)
    written = Facts.draw(config, torch.Generator().manual_seed(0))
    model = FactModel(config, 8, None)
    with torch.no_grad():
        model.head.weight.zero_()
    nothing = probe_facts(model, written, config)
    assert nothing["recognition"] == [0.0, 0.0]
    # A model that knows every value.
    answers = {tuple(key): value for key, value in zip(written.keys.tolist(), written.values.tolist(), strict=True)}
    model.forward = lambda keys: torch.nn.functional.one_hot(
        torch.tensor([answers[tuple(key)] for key in keys.tolist()]), config.num_values
    ).float()
    assert probe_facts(model, written, config) == {"recognition": [1.0, 1.0], "recall": [1.0, 1.0]}


def test_runs_repeat_and_report(tmp_path):
    config = RetentionConfig(**TINY)
    first, second = (run_retention(config, tmp_path / name) for name in ("a", "b"))
    assert first["models"] == second["models"]
    stored = json.loads((tmp_path / "a" / "retention.json").read_text())
    assert stored["models"] == first["models"]
    assert (tmp_path / "a" / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert list(first["models"]) == ["dense", "product-key memory", "UltraMemV2"]
    for result in first["models"].values():
        assert [at["updates"] for at in result["probes"]] == [0, 3]
        assert all(0 <= at[m]["all"]["mean"] <= 1 for at in result["probes"] for m in ("recognition", "recall"))


def test_command(tmp_path, capsys):
    arguments = ["--seeds", "1", "--hidden-size", "16", "--num-keys", "8", "--facts", "4", "--updates", "0", "2"]
    assert cli.main(["experiment", "retention", "--quick", "--out", str(tmp_path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "UltraMemV2" in printed
    assert "2 updates" in printed
    assert "mean ± deviation of 1 seeds" in printed


@pytest.mark.parametrize(
    ("change", "match"),
    [({"seeds": 0}, "seeds"), ({"updates": (3, 1)}, "updates"), ({"num_symbols": 2}, "num_symbols")],
)
def test_errors(change, match):
    with pytest.raises(ValueError, match=match):
        RetentionConfig(**(TINY | change))
