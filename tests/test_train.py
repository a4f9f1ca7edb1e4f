"""Training: the data, the baseline, interruption and continuation, and the command line.

A run is the same on every backend but for its kernels, so the simulator takes only one test of it: the strictest.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from remora import cli
from remora.models import LanguageModel
from remora.train import (
    ByteNgram,
    TrainConfig,
    Trainer,
    TrainingWindows,
    ValidationWindows,
    load_corpus,
    resumed_config,
)
from remora.train.trainer import choose_device, learning_rate_at

TINY = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "batch_size": 2,
    "seq_len": 12,
    "steps": 20,
    "warmup_steps": 4,
    "eval_every": 10,
    "eval_bytes": 48,
    "checkpoint_every": 0,
    "device": "cpu",
}


@pytest.fixture
def folder(tmp_path):
    """Thirty small files; the generator of numbers makes them differ."""
    root = tmp_path / "text"
    for idx in range(30):
        path = root / f"part{idx % 3}" / f"file{idx}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"line {n * n % (idx + 7)} of {idx}\n" for n in range(12)))
    return root


@pytest.fixture
def config(folder):
    return TrainConfig(**TINY, data=str(folder))


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(log):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


class TestCorpus:
    def test_files_keep_their_side_whatever_else_is_there(self, folder):
        def documents(split):
            return set(split.tobytes().split(b"\0")[1:])

        before = load_corpus(folder)
        assert len(documents(before.train)) + len(documents(before.validation)) == 30
        assert 0 < len(documents(before.validation)) < 10
        (folder / "another.txt").write_text("something new")
        (folder / ".hidden").write_text("left out")
        (folder / "binary.bin").write_bytes(b"left\0out")
        (folder / "empty.txt").write_text("")
        after = load_corpus(folder)
        assert documents(before.validation) <= documents(after.validation)
        assert documents(before.train) <= documents(after.train)
        assert documents(after.train) | documents(after.validation) == (
            documents(before.train) | documents(before.validation) | {b"something new"}
        )
        assert "31 files" in after.description
        assert before.fingerprint == load_corpus_again(folder, without="another.txt").fingerprint != after.fingerprint

    def test_a_single_file_is_cut(self, tmp_path):
        path = tmp_path / "one.txt"
        path.write_bytes(b"x" * 90 + b"y" * 9)
        corpus = load_corpus(path)
        assert corpus.train.tobytes() == b"\0" + b"x" * 89
        assert corpus.validation.tobytes() == b"x" + b"y" * 9
        assert "the last tenth validates" in corpus.description

    def test_the_standard_library_is_the_default(self):
        corpus = load_corpus()
        assert len(corpus.train) > 2e6
        assert len(corpus.validation) > 1e5
        assert b"class Generic" in corpus.train.tobytes() + corpus.validation.tobytes()

    def test_refuses_what_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_corpus(tmp_path / "nothing")
        with pytest.raises(ValueError, match="no text files in"):
            load_corpus(tmp_path)


def load_corpus_again(folder, without):
    (folder / without).unlink()
    return load_corpus(folder)


class TestWindows:
    TEXT = (np.arange(205) % 251).astype(np.uint8)

    def test_an_epoch_reads_every_window_once(self):
        windows = TrainingWindows(self.TEXT, 10, seed=3)
        assert windows.num_windows == 19
        for epoch in range(3):
            inputs, targets = windows.batch(epoch * 19, 19)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            offset = inputs.min().item()
            assert sorted(inputs.flatten().tolist()) == list(range(offset, offset + 190))

    def test_a_batch_depends_on_its_position_only(self):
        straight = TrainingWindows(self.TEXT, 10, seed=3)
        batches = [straight.batch(first, 4) for first in range(0, 80, 4)]
        jumping = TrainingWindows(self.TEXT, 10, seed=3)
        for idx in (19, 0, 7, 4, 5):
            for a, b in zip(jumping.batch(4 * idx, 4), batches[idx]):
                assert torch.equal(a, b)
        other = TrainingWindows(self.TEXT, 10, seed=4)
        assert not torch.equal(other.batch(0, 4)[0], batches[0][0])

    def test_validation_windows_line_up_with_their_contexts(self):
        windows = ValidationWindows.spread(self.TEXT, 10, max_bytes=55)
        assert windows.inputs.shape == windows.targets.shape == (5, 10)
        assert torch.equal(windows.contexts[..., 1], windows.inputs)
        assert torch.equal(windows.inputs + 1, windows.targets)
        assert torch.equal(windows.contexts[..., 0] + 1, windows.inputs)
        starts = windows.inputs[:, 0]
        assert starts[0] == 1
        assert (starts.diff() >= 10).all()
        assert ValidationWindows.spread(self.TEXT, 10, max_bytes=10**6).inputs.shape == (20, 10)

    def test_refuse_short_texts(self):
        with pytest.raises(ValueError, match="at least 20 bytes for windows of 10, got 19"):
            TrainingWindows(self.TEXT[:19], 10, seed=0)
        with pytest.raises(ValueError, match="at least 12 bytes for windows of 10, got 11"):
            ValidationWindows.spread(self.TEXT[:11], 10, 100)


class TestByteNgram:
    TEXT = np.frombuffer(b"abracadabra abracadabra barbara", dtype=np.uint8)

    def test_probabilities_sum_to_one_in_every_context(self):
        model = ByteNgram(self.TEXT)
        targets = np.arange(256)
        for context in (b"ab", b"ra", b"a ", b"zb", b"zz", b"ad"):
            contexts = np.tile(np.frombuffer(context, dtype=np.uint8).astype(np.int64), (256, 1))
            probabilities = model.probabilities(contexts, targets)
            assert probabilities.min() > 0
            assert probabilities.sum() == pytest.approx(1, rel=1e-12)

    def test_follows_its_formula(self):
        text = self.TEXT.tobytes()

        def probability(context, byte):
            if context is None:
                return 1 / 256
            followers = [
                text[i + len(context)] for i in range(len(text) - len(context)) if text[i:].startswith(context)
            ]
            shorter = probability(context[1:] if context else None, byte)
            types = len(set(followers))
            if not followers:
                return shorter
            return (followers.count(byte) + types * shorter) / (len(followers) + types)

        model = ByteNgram(self.TEXT)
        cases = [(context, byte) for context in (b"ab", b"br", b"xa", b"xx", b"r ") for byte in b"abrcx "]
        contexts = np.array([list(context) for context, _ in cases])
        targets = np.array([byte for _, byte in cases])
        expected = np.array([probability(context, byte) for context, byte in cases])
        np.testing.assert_allclose(model.probabilities(contexts, targets), expected, rtol=1e-12)
        assert model.bits_per_byte(contexts, targets) == pytest.approx(-np.log2(expected).mean())


def test_learning_rate_rises_and_falls():
    config = TrainConfig(learning_rate=2.0, warmup_steps=4, steps=12)
    rates = [learning_rate_at(step, config) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0)


@pytest.mark.cpu_only
def test_a_run_learns_and_leaves_everything(config, tmp_path):
    out = tmp_path / "run"
    config = dataclasses.replace(config, steps=60, learning_rate=0.02, eval_every=30)
    trainer = Trainer(config, out)
    assert trainer.run() is False
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pt", "config.json", "log.jsonl", "loss.png", "memories.png", "model.safetensors",
    ]  # fmt: skip
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "memories.png"))
    log = read_log(out)
    for entry in log:
        if "train_bits_per_byte" in entry:
            usage = np.array(entry["memory_usage"])
            assert usage.shape == (1, 4)
            assert usage.sum() == pytest.approx(1)
            assert 0.5 < entry["balance_loss"] <= 8
    train = [entry["train_bits_per_byte"] for entry in log if "train_bits_per_byte" in entry]
    validation = [entry for entry in log if "validation_bits_per_byte" in entry]
    assert [entry["step"] for entry in validation] == [30, 60]
    assert len(train) == 60
    assert train[0] > 7
    assert validation[1]["validation_bits_per_byte"] < 4.5
    assert validation[1]["ngram_bits_per_byte"] == trainer.baseline
    assert log[59]["bytes"] == 59 * 2 * 12

    model = LanguageModel.from_pretrained(out)
    windows = trainer.validation
    with torch.no_grad():
        bits = model(windows.inputs, windows.targets).loss.item() / math.log(2)
    assert bits == pytest.approx(validation[1]["validation_bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("mixer", ["mixture_of_memories", "gated_delta_net"])
def test_stopping_and_resuming_changes_no_bit(config, tmp_path, backend, mixer):
    half = 10 if backend == "cpu" else 2
    config = dataclasses.replace(config, mixer=mixer, steps=2 * half, eval_every=0)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    Trainer(config, straight).run()
    assert Trainer(config, stopped).run(until=half) is False
    assert (stopped / "model.safetensors").read_bytes() != (straight / "model.safetensors").read_bytes()
    torch.manual_seed(12345)
    resumed = Trainer(resumed_config(stopped, {}), stopped, resume=True)
    assert resumed.step == half
    resumed.run()
    assert (stopped / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert without_times(read_log(stopped)) == without_times(read_log(straight))
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (stopped, straight)]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
    assert torch.equal(states[0]["random_state"], states[1]["random_state"])


@pytest.mark.cpu_only
def test_a_killed_run_resumes_from_its_last_checkpoint(config, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    Trainer(config, straight).run()
    trainer = Trainer(config, killed)
    trainer.run(until=7)
    for _ in range(5):
        trainer._train_step()  # logged, never saved
    assert read_log(killed)[-1]["step"] == 12
    Trainer(resumed_config(killed, {}), killed, resume=True).run()
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert without_times(read_log(killed)) == without_times(read_log(straight))


@pytest.mark.cpu_only
def test_a_run_is_not_overwritten_or_changed(config, folder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        resumed_config(out, {})
    Trainer(config, out).run(until=2)
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(config, out)
    with pytest.raises(ValueError, match=r"seq_len of the run in .* is 12 and cannot become 16"):
        resumed_config(out, {"seq_len": 16})
    assert resumed_config(out, {"seq_len": 12, "steps": 30}) == dataclasses.replace(config, steps=30)
    (folder / "part0" / "file0.txt").write_text("changed")
    with pytest.raises(ValueError, match="the text is not the one"):
        Trainer(config, out, resume=True)


@pytest.mark.cpu_only
def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    trainer = Trainer(config, tmp_path / "run")
    trainer.run(until=1)
    saved = (tmp_path / "run" / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        trainer.run()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == saved


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        TrainConfig(steps=0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        TrainConfig(dtype="float64")
    with pytest.raises(ValueError, match="device must be 'auto'"):
        choose_device("typewriter")
    assert choose_device("cpu") == torch.device("cpu")


def command(config, out, **changes):
    options = TINY | changes | {"data": config.data, "out": out}
    return ["train", *(text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value)))]


@pytest.mark.cpu_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "terminate"])
def test_an_interrupted_command_leaves_a_checkpoint_to_continue(config, tmp_path, number):
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "remora", *command(config, out, steps=100000, eval_every=0)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (out / "log.jsonl").exists() or len(read_log(out)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    step = int(re.search(r"interrupted at step (\d+); continue with: .* --resume", output).group(1))
    assert read_log(out)[-1]["step"] == step >= 3

    straight = Trainer(resumed_config(out, {}), tmp_path / "straight")
    straight.run(until=step + 2)
    Trainer(resumed_config(out, {}), out, resume=True).run(until=step + 2)
    saved, expected = (folder / "model.safetensors" for folder in (out, tmp_path / "straight"))
    assert saved.read_bytes() == expected.read_bytes()


@pytest.mark.cpu_only
class TestCommandLine:
    def test_train_resume_generate(self, config, tmp_path, capsys):
        out = tmp_path / "run"
        assert cli.main(command(config, out, steps=3)) == 0
        printed = capsys.readouterr()
        baseline = re.search(r"baseline  order-2 byte n-gram: (\d\.\d{3}) bits per byte", printed.out).group(1)
        assert re.search(rf"validation \d\.\d{{3}} bits per byte; order-2 byte n-gram {baseline}\n", printed.out)
        assert "3/3" in printed.err
        assert re.search(r"balance \d\.\d{3}, memories( \d+){4} %", printed.err)
        assert re.search(r"balance loss \d\.\d{3} \(balanced: 2\);", printed.out)
        shares = re.search(r"  layer 0  (.*)\n", printed.out).group(1)
        assert sum(int(x) for x in re.findall(r"(\d+) %", shares)) == pytest.approx(100, abs=2)

        assert cli.main(command(config, out)) == 2
        assert "holds a run already" in capsys.readouterr().err
        assert cli.main(["train", "--out", str(out), "--resume"]) == 2
        assert "complete at step 3; --steps takes it further" in capsys.readouterr().err
        assert cli.main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 0
        assert read_log(out)[-1]["step"] == 5
        capsys.readouterr()

        generate = ["generate", "--checkpoint", str(out), "--prompt", "lin", "--max-new-tokens", "6", "--device", "cpu"]
        assert cli.main(generate) == 0
        text = capsys.readouterr().out
        assert text.startswith("lin")
        assert text.endswith("\n")
        assert cli.main(generate) == 0
        assert capsys.readouterr().out == text
        assert cli.main([*generate, "--top-k", "0"]) == 2
        assert "top_k must be at least 1" in capsys.readouterr().err

    def test_info(self, capsys):
        assert cli.main(["info"]) == 0
        printed = capsys.readouterr().out
        assert f"torch            {torch.__version__}" in printed

    def test_errors_name_what_is_wrong(self, tmp_path, capsys):
        assert cli.main(["generate", "--checkpoint", str(tmp_path)]) == 2
        assert "config.json" in capsys.readouterr().err
        assert cli.main(["train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "nothing")]) == 2
        assert "no such file or folder" in capsys.readouterr().err
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", "--steps", "many"])
        assert stopped.value.code == 2
        assert "invalid int value: 'many'" in capsys.readouterr().err
