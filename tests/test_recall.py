"""The recall experiment: its tasks, its contenders, and the command."""

import json

import numpy as np
import pytest
import torch

from remora import cli
from remora.experiments import RecallConfig
from remora.experiments.recall import contenders, num_parameters, state_size
from remora.experiments.tasks import NameWindows, all_right, recall_batch, share_right

pytestmark = pytest.mark.cpu_only


def test_associative_recall():
    inputs, targets = recall_batch(5, 7, 9, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (7, 20)
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        pairs = dict(zip(row[:10:2], row[1:10:2]))
        assert len(pairs) == 5
        assert set(pairs) <= set(range(9))
        assert set(pairs.values()) <= set(range(9, 18))
        assert dict(zip(row[10::2], row[11::2])) == pairs
        assert wanted[:10] == [-100] * 10
        assert wanted[10::2] == row[11::2]
        assert wanted[11::2] == [-100] * 5
    again, _ = recall_batch(5, 7, 9, torch.Generator().manual_seed(0))
    assert torch.equal(again, inputs)
    with pytest.raises(ValueError, match="at most num_symbols=4, got 5"):
        recall_batch(5, 1, 4, torch.Generator())


def test_repeated_names():
    train = np.frombuffer(b"known_name is here", dtype=np.uint8)
    text = b"." * 30 + b"unheard_of, known_name; short, unheard_of, known_name; " + b"." * 60 + b" unheard_of."
    windows = NameWindows.find(np.frombuffer(text, dtype=np.uint8), train, 45, 10)
    assert windows.inputs.shape == (1, 45)
    assert bytes(windows.inputs[0].tolist()).endswith(b" short, unheard_of")
    counted = windows.targets[0] >= 0
    assert bytes(windows.targets[0][counted].tolist()) == b"eard_of,"
    assert counted[-8:].all()
    with pytest.raises(ValueError, match="no name of the validation text repeats"):
        NameWindows.find(train, train, 10, 10)


def test_accuracies():
    targets = torch.tensor([[-100, 1, 0], [-100, 2, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 1, 0], [0, 2, 1]]), 3).float()
    assert all_right(logits, targets).tolist() == [True, False]
    assert share_right(logits, targets) == pytest.approx(3 / 4)


@pytest.mark.parametrize("config", [RecallConfig(), RecallConfig.quick()], ids=["default", "quick"])
def test_the_contenders_are_equal_in_what_they_say(config):
    mixture, same_state, same_parameters = contenders(config, 128).values()
    assert state_size(same_state) == state_size(mixture)
    assert num_parameters(same_parameters) == pytest.approx(num_parameters(mixture), rel=0.05)
    assert state_size(mixture) == 5 * config.num_layers * config.num_heads * config.head_dim**2


def test_command(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    for idx in range(30):
        (folder / f"{idx}.txt").write_text(f"identifier_{idx} = function_{idx}()\n" * 40)
    out = tmp_path / "out"
    options = [
        "--pairs",
        "2",
        "4",
        "--recall-steps",
        "3",
        "--text-steps",
        "2",
        "--data",
        str(folder),
        "--device",
        "cpu",
        "--jobs",
        "1",
    ]
    assert cli.main(["experiment", "recall", "--quick", "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["recall.json", "recall.png"]
    assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "recall.json").read_text())
    assert list(report["models"]) == ["mixture of memories", "one memory, equal state", "one memory, equal parameters"]
    for name, result in report["models"].items():
        assert name in printed
        for cell in (*result["recall"].values(), result["names"], result["bytes_of_names"]):
            assert len(cell["runs"]) == 2
            assert cell["mean"] == pytest.approx(np.mean(cell["runs"]))
            assert cell["deviation"] == pytest.approx(np.std(cell["runs"], ddof=1))
            assert 0 <= cell["mean"] <= 1
    at_once = [*options[:-1], "2"]
    assert cli.main(["experiment", "recall", "--quick", "--out", str(out), *at_once]) == 0
    again = json.loads((out / "recall.json").read_text())
    for name, result in again["models"].items():
        for pairs, cell in result["recall"].items():
            assert cell["mean"] == pytest.approx(report["models"][name]["recall"][pairs]["mean"], abs=0.1)
    assert cli.main(["experiment", "recall", "--quick", "--out", str(out), "--pairs", "99"]) == 2
    assert "pairs must be in 1 ... num_symbols=16" in capsys.readouterr().err
