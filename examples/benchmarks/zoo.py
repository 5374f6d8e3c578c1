"""A synthetic Llama-shaped zoo for benchmarks: a base and fine-tunes of any size, bf16, sharded, with config.json.

python examples/benchmarks/zoo.py OUT --layers 24 --hidden 1024 --tasks 4
"""

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from taskvec.checkpoint import SEGMENT
from taskvec.source import TensorInfo
from taskvec.writer import CheckpointWriter


def shapes(hidden: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama with this width; the feed-forward part is 2.75 times as wide."""
    inner = hidden * 11 // 4
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            found[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        found[f"{prefix}mlp.gate_proj.weight"] = found[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        found[f"{prefix}input_layernorm.weight"] = found[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (vocabulary, hidden)
    return found


@cache
def _piece(number: int, tuned: int | None) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(SEGMENT, generator=generator).mul_(0.02)
    if tuned is not None:
        generator.manual_seed(1000 * (tuned + 1) + number)
        noise = torch.randn(SEGMENT, generator=generator)
        noise.mul_(noise.square().add_(0.1)).mul_(0.0005)  # heavier tails than a Gaussian's
        values.addcmul_(noise, torch.rand(SEGMENT, generator=generator) < 0.3)
    return values.bfloat16()


def pieces(seed: int, numel: int, *, tuned: int | None) -> Iterator[tuple[int, Tensor]]:
    """Weights of scale 0.02; a fine-tune changes 30 % of the entries by heavy-tailed noise of 5 % of that scale.

    They are taken in turn from seven segments of 2^22 values, so that a large zoo is made as fast as it is written.
    """
    for start in range(0, numel, SEGMENT):
        count = min(SEGMENT, numel - start)
        yield start, _piece((seed + start // SEGMENT) % 7, tuned)[:count]


def build(
    out: Path, *, hidden: int, layers: int, vocabulary: int = 32000, tasks: int = 4, shard: str = "400MB"
) -> list[Path]:
    """Makes (or finds) the zoo; returns base and fine-tunes."""
    tensors = shapes(hidden, layers, vocabulary)
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in tensors.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 64),
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    paths = [out / "base", *(out / f"ft{i + 1}" for i in range(tasks))]
    for number, path in enumerate(paths):
        if (path / "config.json").is_file():
            continue
        with CheckpointWriter(path, infos, shard_size=shard) as writer:
            for index, (name, info) in enumerate(infos.items()):
                for start, values in pieces(index, info.numel, tuned=None if number == 0 else number):
                    writer.write(name, values, start)
            writer.finish(files={"config.json": json.dumps(config, indent=2)})
    return paths


def parameters(hidden: int, layers: int, vocabulary: int = 32000) -> int:
    return sum(TensorInfo(shape, torch.bfloat16).numel for shape in shapes(hidden, layers, vocabulary).values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tasks", type=int, default=4)
    arguments = parser.parse_args()
    print(*build(arguments.out, hidden=arguments.hidden, layers=arguments.layers, tasks=arguments.tasks), sep="\n")
