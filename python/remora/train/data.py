"""Text as bytes: finding files, splitting them, and cutting training windows."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

# Stands in front of every document; text does not contain it.
SEPARATOR = 0
# One file in this many goes to the validation split.
VALIDATION_SHARE = 10
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})


@dataclass(frozen=True)
class Corpus:
    """A text in two splits, each the concatenation of its documents, every document preceded by `SEPARATOR`.

    Attributes:
        train: bytes to learn from, `[num_bytes]` uint8.
        validation: bytes to measure on, `[num_bytes]` uint8.
        description: one line that says what the text is and how it was split.
    """

    train: Bytes
    validation: Bytes
    description: str

    @property
    def fingerprint(self) -> str:
        """Hash of both splits, by which a resumed run recognises its data."""
        digest = hashlib.blake2b(digest_size=16)
        for split in (self.train, self.validation):
            digest.update(len(split).to_bytes(8, "little"))
            digest.update(split.tobytes())
        return digest.hexdigest()


def load_corpus(data: str | os.PathLike[str] | None = None) -> Corpus:
    """Read the training text.

    A file belongs to the validation split if the hash of its path relative to the folder says so, whatever other files
    there are. A single file, or a folder whose files all fall on one side, is cut instead: its last tenth validates.

    Args:
        data: a file, or a folder whose files are read recursively (hidden ones and those with NUL bytes, which are not
            text, are left out). None reads the source files of Python's standard library, without its tests.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no text in it.
    """
    if data is None:
        root = Path(sysconfig.get_path("stdlib"))
        found: Iterable[Path] = (
            path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        )
        source = f"Python standard library ({root})"
    else:
        root = Path(data)
        if not root.exists():
            raise FileNotFoundError(f"no such file or folder: {root}")
        if root.is_file():
            found, root = [root], root.parent
        else:
            found = (path for path in root.rglob("*") if not _is_hidden(path.relative_to(root)))
        source = str(data)

    documents = {}
    for path in sorted(found):
        if path.is_file():
            contents = path.read_bytes()
            if contents and SEPARATOR not in contents:
                documents[path.relative_to(root).as_posix()] = contents
    if not documents:
        raise ValueError(f"no text files in {source}")

    train = _join(contents for name, contents in documents.items() if not _validates(name))
    validation = _join(contents for name, contents in documents.items() if _validates(name))
    split = "split by file"
    if len(train) == 0 or len(validation) == 0:
        whole = _join(documents.values())
        cut = len(whole) - len(whole) // VALIDATION_SHARE
        train, validation, split = whole[:cut], whole[cut:], "the last tenth validates"
    files = "1 file" if len(documents) == 1 else f"{len(documents)} files"
    sizes = f"{len(train) / 1e6:.2f} MB to train, {len(validation) / 1e6:.2f} MB to validate"
    return Corpus(train, validation, f"{source}: {files}, {sizes}, {split}")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _validates(name: str) -> bool:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VALIDATION_SHARE == 0


def _join(documents: Iterable[bytes]) -> Bytes:
    separator = bytes([SEPARATOR])
    return np.frombuffer(b"".join(separator + contents for contents in documents), dtype=np.uint8)


class TrainingWindows:
    """An endless sequence of windows of `seq_len + 1` bytes, the same for the same seed.

    Each epoch cuts the text at a different random offset and visits the windows in a different random order. Window
    `i` depends on nothing but the text, the seed and `i`, so the number of windows drawn is the whole reading position.

    Args:
        text: `[num_bytes]` uint8.
        seq_len: inputs per window.
        seed: of offsets and orders.

    Raises:
        ValueError: the text is shorter than two windows.
    """

    def __init__(self, text: Bytes, seq_len: int, seed: int) -> None:
        self.num_windows = (len(text) - seq_len) // seq_len
        if self.num_windows < 1:
            raise ValueError(
                f"the training text must have at least {2 * seq_len} bytes for windows of {seq_len}, got {len(text)}"
            )
        self._text = text
        self._seq_len = seq_len
        self._seed = seed
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def batch(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each `[size, seq_len]` int64, of windows `first ... first + size - 1`."""
        rows = np.stack([self._window(idx) for idx in range(first, first + size)])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def _window(self, idx: int) -> Bytes:
        epoch, position = divmod(idx, self.num_windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            offset = torch.randint(self._seq_len, (), generator=generator)
            self._starts = offset + self._seq_len * torch.randperm(self.num_windows, generator=generator)
            self._epoch = epoch
        start = int(self._starts[position])
        return self._text[start : start + self._seq_len + 1]


@dataclass(frozen=True)
class ValidationWindows:
    """Windows spread evenly over the validation text.

    Attributes:
        inputs: `[num_windows, seq_len]` int64.
        targets: the bytes to predict, `[num_windows, seq_len]` int64.
        contexts: the two bytes of text before each target, `[num_windows, seq_len, 2]` int64, for the n-gram model.
    """

    inputs: Tensor
    targets: Tensor
    contexts: Tensor

    @classmethod
    def spread(cls, text: Bytes, seq_len: int, max_bytes: int) -> ValidationWindows:
        """Cut about `max_bytes` targets, or as many as there are, from `text`.

        Raises:
            ValueError: the text is shorter than one window.
        """
        available = (len(text) - 2) // seq_len
        if available < 1:
            raise ValueError(
                f"the validation text must have at least {seq_len + 2} bytes for windows of {seq_len}, got {len(text)}"
            )
        count = max(1, min(available, max_bytes // seq_len))
        starts = 1 + seq_len * (np.arange(count) * available // count)
        rows = torch.from_numpy(np.stack([text[start - 1 : start + seq_len + 1] for start in starts]).astype(np.int64))
        return cls(rows[:, 1:-1], rows[:, 2:], torch.stack([rows[:, :-2], rows[:, 1:-1]], dim=-1))
