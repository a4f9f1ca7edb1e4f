"""The needle experiment: its tasks, its contenders, and the command."""

import itertools
import json

import pytest
import torch

from remora import cli
from remora.experiments import NeedleConfig
from remora.experiments.needle import bin_edges, contenders, cost, needle_batch, order_batch
from remora.models import LanguageModel

pytestmark = pytest.mark.cpu_only
CONFIG = NeedleConfig(seq_len=40, bins=4)


def test_a_needle_stands_where_it_should():
    places = torch.tensor([0, 7, 35])
    inputs, targets = needle_batch(CONFIG, places, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (3, 40)
    is_needle = (inputs >= CONFIG.num_fillers) & (inputs < CONFIG.vocab_size - 4)
    assert is_needle.nonzero().tolist() == [[0, 0], [1, 7], [2, 35]]
    assert torch.equal(targets[:, -1], inputs[torch.arange(3), places])
    assert (targets[:, :-1] == -100).all()
    assert (inputs[:, -1] == CONFIG.vocab_size - 4).all()


def test_orders_are_what_the_answers_say():
    distances = torch.tensor([1, 5, 20, 34] * 8)
    inputs, targets = order_batch(CONFIG, distances, torch.Generator().manual_seed(0))
    answers = set()
    for row, target, distance in zip(inputs.tolist(), targets[:, -1].tolist(), distances.tolist(), strict=True):
        *stream, _question, first, second = row
        assert row[-3] == CONFIG.vocab_size - 3
        places = {token: stream.index(token) for token in (first, second)}
        assert abs(places[first] - places[second]) == distance
        assert target == CONFIG.vocab_size - (2 if places[first] < places[second] else 1)
        answers.add(target)
    assert len(answers) == 2


def test_bins_cover_all_places():
    edges = bin_edges(CONFIG)
    assert edges[0] == 1
    assert edges[-1] == CONFIG.places - 1
    assert all(a < b for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("config", [NeedleConfig(), NeedleConfig.quick()], ids=["default", "quick"])
def test_contenders_have_as_many_parameters(config):
    with torch.device("meta"):
        sizes = [LanguageModel(shape).num_parameters for shape in contenders(config).values()]
    assert len(set(sizes)) == 1


def test_the_cache_of_scout_is_smaller():
    device = torch.device("cpu")
    sizes = {name: cost(shape, 256, device)["bytes"] for name, shape in contenders(NeedleConfig.quick()).items()}
    assert sizes["window alone"] < sizes["SCOUT"] < sizes["full attention"] / 4


def test_command(tmp_path, capsys):
    options = ["--steps", "4", "--device", "cpu", "--jobs", "1", "--lengths", "32", "64"]
    assert cli.main(["experiment", "needle", "--quick", "--out", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["needle.json", "needle.png"]
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "needle.json").read_text())
    assert list(report["models"]) == ["SCOUT", "window alone", "full attention"]
    for name, result in report["models"].items():
        assert name in printed
        assert len(result["needle"]) == len(result["order"]) == 4
        assert all(len(cell["runs"]) == 2 and 0 <= cell["mean"] <= 1 for cell in result["needle"] + result["order"])
        assert list(result["cost"]) == ["32", "64"]
    assert cli.main(["experiment", "needle", "--quick", "--out", str(tmp_path), "--window", "0"]) == 2
    assert "window must be positive, got 0" in capsys.readouterr().err
