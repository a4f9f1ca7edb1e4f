"""A decoder language model around any token mixer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remora.models.files import replacing
from remora.models.memories import make_memories
from remora.models.mixers import Mixer, get_mixer
from remora.models.sampling import sample
from remora.modules import Cache, GroupedLinear, RMSNorm, Routing, SegmentCompressedAttention, SwiGLU

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class LanguageModelConfig:
    """Everything that determines a `LanguageModel`'s shape and initialisation.

    Attributes:
        vocab_size: number of tokens; 256 reads bytes.
        hidden_size: `D`, the width of the residual stream.
        num_layers: number of blocks.
        mixer: registered name of the token mixer.
        mixer_options: keyword arguments of the mixer.
        intermediate_size: inner width of the SwiGLU layers; None takes that layer's default.
        memory: memory layer beside every SwiGLU layer, "product_key_memory", "memory_plus" or "ultramem_v2"; None has
            none.
        memory_options: keyword arguments of the memory layer, and how layers share its tables (`make_memories`).
        segment_attention: keyword arguments of a `SegmentCompressedAttention` that follows every block, with a SwiGLU
            layer of its own, as in SCOUT; None has none.
        norm_eps: epsilon of all normalisations.
        tie_embeddings: whether the output layer uses the embedding's weights.
        initializer_range: standard deviation of the initial weights of embeddings and projections.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    num_layers: int = 4
    mixer: str = "gated_delta_net"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    intermediate_size: int | None = None
    memory: str | None = None
    memory_options: dict[str, Any] = field(default_factory=dict)
    segment_attention: dict[str, Any] | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        get_mixer(self.mixer)

    def to_json(self) -> str:
        """Return the configuration as a JSON document."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LanguageModelConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a name is not a field of the configuration, or a value is out of range.
        """
        values = json.loads(text)
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown names in the model configuration: {', '.join(unknown)}")
        return cls(**values)


class LanguageModelOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits: `[B, T, vocab]`, or `[B, 1, vocab]` when only the last token's were asked for.
        loss: mean cross entropy in nats, fp32 scalar; None without targets.
    """

    logits: Tensor
    loss: Tensor | None


class Block(nn.Module):
    """Pre-norm residual block: `h = x + mixer(norm(x))`, `y = h + swiglu(norm(h))`, and `+ memory(norm(h))` if there is
    one. With segment attention `h = y + attention(norm(y))`, `z = h + swiglu(norm(h))` follow.
    """

    def __init__(self, config: LanguageModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = get_mixer(config.mixer)(
            hidden_size=config.hidden_size, layer_idx=layer_idx, norm_eps=config.norm_eps, **config.mixer_options
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.memory: nn.Module | None = None
        self.segment_attn: SegmentCompressedAttention | None = None
        if config.segment_attention is not None:
            self.segment_attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.segment_attn = SegmentCompressedAttention(
                config.hidden_size, layer_idx=config.num_layers + layer_idx, **config.segment_attention
            )
            self.segment_mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.segment_mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
        x = x + cast(Mixer, self.attn)(self.attn_norm(x), cache=cache, cu_seqlens=cu_seqlens)
        h = self.mlp_norm(x)
        y: Tensor = x + self.mlp(h)
        if self.memory is not None:
            y = y + self.memory(h)
        if self.segment_attn is not None:
            y = y + self.segment_attn(self.segment_attn_norm(y), cache=cache, cu_seqlens=cu_seqlens)
            y = y + self.segment_mlp(self.segment_mlp_norm(y))
        return y


class LanguageModel(nn.Module):
    """Decoder language model: embedding, blocks of mixer and SwiGLU, norm, output layer.

    Parameter names are those of flash-linear-attention's models below their `model.` prefix. Projections and
    embeddings start normal with standard deviation `initializer_range`; projections that write to the residual stream
    have it divided by the root of their number, `2 * num_layers` without segment attention (Radford et al., "Language
    Models are Unsupervised Multitask Learners", 2019). The mixers' own parameters (gates, convolutions, the steps of
    Mamba) and memory layers keep the initialisation of their modules.

    Args:
        config: the shape of the model.

    Raises:
        ValueError: the mixer is unknown, or its options do not fit.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, layer_idx) for layer_idx in range(config.num_layers)]
        if config.memory is not None:
            ffn_expansion = blocks[0].mlp.up_proj.out_features / config.hidden_size
            memories = make_memories(
                config.memory, config.hidden_size, config.num_layers, ffn_expansion, config.memory_options
            )
            for block, memory in zip(blocks, memories, strict=True):
                block.memory = memory
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's default generator."""
        std = self.config.initializer_range
        writers = (2 if self.config.segment_attention is None else 4) * len(self.layers)
        nn.init.normal_(self.embeddings.weight, std=std)
        for name, module in self.named_modules():
            keeps_own = ".memory." in name or name.endswith("dt_proj")
            if isinstance(module, (nn.Linear, GroupedLinear)) and not keeps_own:
                writes_residual = name.endswith(("o_proj", "down_proj", "out_proj"))
                nn.init.normal_(module.weight, std=std / math.sqrt(writers) if writes_residual else std)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def routing(self) -> list[Routing]:
        """What the routers of the layers that have one did in the last forward pass, in the layers' order."""
        routings = (getattr(layer.attn, "routing", None) for layer in self.layers)
        return [routing for routing in routings if isinstance(routing, Routing)]

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        last_token_only: bool = False,
    ) -> LanguageModelOutput:
        """Predict the token after each input token.

        Args:
            input_ids: `[B, T]` integer; `[1, T]` with `cu_seqlens`.
            targets: `[B, T]` integer, the token that follows each input token; -100 is left out of the loss.
            cache: state to continue from and to update.
            cu_seqlens: `[N + 1]` integer, boundaries of the sequences packed in one row.
            last_token_only: compute the logits of the last token only, as a prefill needs them.

        Raises:
            ValueError: `input_ids` or `targets` has the wrong shape, or targets come with `last_token_only`.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
        if targets is not None and (targets.shape != input_ids.shape or last_token_only):
            raise ValueError(
                f"targets must be {list(input_ids.shape)} like input_ids, got {list(targets.shape)}"
                + (" with last_token_only" if last_token_only else "")
            )
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, cache, cu_seqlens)
        if last_token_only:
            x = x[:, -1:]
        x = self.norm(x)
        logits = F.linear(x, self.embeddings.weight) if self.lm_head is None else self.lm_head(x)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
        return LanguageModelOutput(logits, loss)

    def _aliases(self) -> dict[str, str]:
        """Further names of parameters that layers share, and the first name of each."""
        first: dict[int, str] = {}
        names = ((name, first.setdefault(id(p), name)) for name, p in self.named_parameters(remove_duplicate=False))
        return {name: shared for name, shared in names if name != shared}

    @torch.inference_mode()
    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Continue each row of `input_ids` `[B, T]`, yielding the new tokens `[B]` one step at a time.

        The prompt is read once; every further token is a decode step whose cost does not depend on what came before.
        Arguments as in `generate`.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be [B, T] with at least one token, got {list(input_ids.shape)}")
        generator = None
        if seed is not None:
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        cache = Cache()
        for _ in range(max_new_tokens):
            logits = self(input_ids, cache=cache, last_token_only=True).logits[:, -1]
            tokens = sample(logits, temperature, top_k, top_p, generator)
            yield tokens
            input_ids = tokens[:, None]

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue each row of `input_ids`.

        Args:
            input_ids: `[B, T]` integer, the prompts, at least one token long.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: sample among the `top_k` most likely tokens.
            top_p: sample among the smallest set of most likely tokens whose probability reaches `top_p`.
            seed: makes the draw repeatable; None uses torch's default generator.

        Returns:
            `[B, T + max_new_tokens]`, prompts and continuations.

        Raises:
            ValueError: the prompt is empty or an option is out of range.
        """
        new_tokens = self.stream(input_ids, max_new_tokens, temperature, top_k, top_p, seed)
        return torch.cat([input_ids, *(tokens[:, None] for tokens in new_tokens)], dim=1)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`; each file appears complete or not at all."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / CONFIG_NAME) as temporary:
            temporary.write_text(self.config.to_json(), encoding="utf-8")
        with replacing(path / WEIGHTS_NAME) as temporary:
            aliases = self._aliases()
            weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items() if name not in aliases}
            safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """Build the model that `save_pretrained` wrote.

        Args:
            directory: folder with `config.json` and `model.safetensors`.
            device: where to put it.
            dtype: dtype of the parameters; None keeps the stored one.

        Raises:
            FileNotFoundError: a file is missing.
            RuntimeError: the weights do not fit the configuration.
        """
        path = Path(directory)
        config = LanguageModelConfig.from_json((path / CONFIG_NAME).read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(path / WEIGHTS_NAME)
        with torch.device("meta"):
            model = cls(config)
        # A copy even on the CPU: the loaded tensors may sit at any alignment.
        copies = {name: tensor.to(device, dtype or tensor.dtype, copy=True) for name, tensor in weights.items()}
        aliases = model._aliases()
        model.load_state_dict(copies | {name: copies[first] for name, first in aliases.items()}, assign=True)
        for name, first in aliases.items():
            module, _, parameter = name.rpartition(".")
            setattr(model.get_submodule(module), parameter, model.get_parameter(first))
        return model
