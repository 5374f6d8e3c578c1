"""Tiny models of many architectures, on disk, with a fine-tune or two."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def _small() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "vocab_size": 32,
    }


def _text() -> dict[str, Any]:
    return {"input_ids": torch.arange(2, 10).reshape(2, 4)}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)}


def builders() -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """Name to a function that makes a model and an input for it."""
    import transformers as tf

    kv = {"num_key_value_heads": 1, "head_dim": 8}
    rope = {**_small(), **kv, "max_position_embeddings": 32}
    encoder = {**_small(), "max_position_embeddings": 40}
    moe = {"num_local_experts": 3, "num_experts_per_tok": 2}
    vision = {**_small(), "image_size": 8, "patch_size": 4}
    vision.pop("vocab_size")

    def clip() -> Any:
        text = {**_small(), "max_position_embeddings": 16, "eos_token_id": 31, "bos_token_id": 1, "pad_token_id": 0}
        config = tf.CLIPConfig(text_config=text, vision_config={**vision, "projection_dim": 8}, projection_dim=8)
        return tf.CLIPModel(config)

    def whisper() -> Any:
        return tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=32, num_mel_bins=8, max_source_positions=8,
                max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                suppress_tokens=[], begin_suppress_tokens=[],
            )
        )  # fmt: skip

    def t5() -> Any:
        config = tf.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=32, decoder_start_token_id=0,
            tie_word_embeddings=False,
        )  # fmt: skip
        return tf.T5ForConditionalGeneration(config)

    listening = {
        "input_features": torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16),
        "decoder_input_ids": torch.arange(3)[None],
    }
    return {
        "llama": lambda: (tf.LlamaForCausalLM(tf.LlamaConfig(**rope)), _text()),
        "mistral": lambda: (tf.MistralForCausalLM(tf.MistralConfig(**rope)), _text()),
        "qwen2": lambda: (tf.Qwen2ForCausalLM(tf.Qwen2Config(**rope, tie_word_embeddings=True)), _text()),
        "qwen3": lambda: (tf.Qwen3ForCausalLM(tf.Qwen3Config(**rope)), _text()),
        "gemma": lambda: (tf.GemmaForCausalLM(tf.GemmaConfig(**rope)), _text()),
        "gpt2": lambda: (
            tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_inner=24, vocab_size=32, n_positions=24, bos_token_id=0, eos_token_id=1)),
            _text(),
        ),
        "gpt_neox": lambda: (tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**encoder, bos_token_id=0, eos_token_id=1)), _text()),
        "mixtral": lambda: (tf.MixtralForCausalLM(tf.MixtralConfig(**rope, **moe)), _text()),
        "mamba": lambda: (
            tf.MambaForCausalLM(tf.MambaConfig(hidden_size=16, num_hidden_layers=3, vocab_size=32, state_size=4, bos_token_id=0, eos_token_id=1, pad_token_id=0)),
            _text(),
        ),
        "bert": lambda: (tf.BertForMaskedLM(tf.BertConfig(**encoder)), _text()),
        "roberta": lambda: (tf.RobertaForSequenceClassification(tf.RobertaConfig(**encoder)), _text()),
        "vit": lambda: (tf.ViTForImageClassification(tf.ViTConfig(**vision)), _pixels()),
        "clip": lambda: (clip(), {**_text(), **_pixels()}),
        "whisper": lambda: (whisper(), listening),
        "t5": lambda: (t5(), {**_text(), "decoder_input_ids": torch.arange(4).reshape(2, 2)}),
    }  # fmt: skip


class Family:
    """A base model of one architecture and two fine-tunes of it on disk."""

    def __init__(self, folder: Path, name: str):
        self.name, self.folder = name, folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model, self.inputs = builders()[name]()
            self.kind = type(model)
            self.base = self._saved(model, "base")
            self.tuned = []
            for seed in (1, 2):
                generator = torch.Generator().manual_seed(seed)
                with torch.no_grad():
                    tuned = {
                        key: value + 0.02 * torch.randn(value.shape, generator=generator)
                        if value.is_floating_point()
                        else value
                        for key, value in self.state.items()
                    }
                model.load_state_dict(tuned)
                model.tie_weights()
                self.tuned.append(self._saved(model, f"ft{seed}"))

    def _saved(self, model: Any, name: str) -> Path:
        if name == "base":
            self.state = {key: value.clone() for key, value in model.state_dict().items()}
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def loaded(self, path: Path) -> Any:
        """The model in transformers, after checking that every tensor found its place."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, told = self.kind.from_pretrained(path, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
        return model.eval()

    def logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model(**self.inputs)
        found = out.logits if hasattr(out, "logits") else out.logits_per_image
        assert isinstance(found, torch.Tensor)
        return found


_FAMILIES: dict[str, Family] = {}


@pytest.fixture
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The family named by the test's parameter, made once."""
    name = request.param
    if name not in _FAMILIES:
        _FAMILIES[name] = Family(tmp_path_factory.mktemp(name), name)
    return _FAMILIES[name]
