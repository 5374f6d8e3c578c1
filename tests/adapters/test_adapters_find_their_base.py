"""An adapter over a base from disk or memory, with another prefix to its names, another dtype, another file format."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from taskvec.adapter import Adapter, summed
from taskvec.checkpoint import Checkpoint
from taskvec.errors import MismatchError, NotFoundError, SourceError
from taskvec.source import DeltaSource, in_memory


@pytest.fixture
def folder(llama, tmp_path, saved_adapter):
    return saved_adapter(llama, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), tmp_path / "adapter")


def test_an_adapter_is_a_source_of_deltas(folder, llama):
    adapter = Adapter.open(folder, in_memory(llama))
    assert isinstance(adapter, DeltaSource)
    assert list(adapter) == [name for name in llama.state_dict() if name in adapter.infos]
    assert adapter.label == str(folder)
    assert repr(adapter) == f"Adapter({str(folder)!r}, LORA, 4 tensors)"


def test_opening_reads_headers_only(folder, llama):
    class Unread:
        label, aliases = "base", {}
        infos = in_memory(llama).infos

        def read(self, name):
            raise AssertionError(name)

        read_flat = read

    Adapter.open(folder, Unread()).read("model.layers.0.mlp.up_proj.weight")


def test_a_checkpoint_on_disk(folder, llama, tokens, tmp_path, live_logits, with_deltas, logits):
    llama.save_pretrained(tmp_path / "base")
    adapter = Adapter.open(folder, Checkpoint.open(tmp_path / "base"))
    torch.testing.assert_close(
        logits(with_deltas(llama, adapter), tokens), live_logits(llama, folder, tokens), atol=1e-4, rtol=0
    )


def test_prefixes_that_one_side_lacks(folder, llama, tmp_path, saved_adapter):
    expected = Adapter.open(folder, in_memory(llama))
    bare = Adapter.open(folder, in_memory(llama.model))
    state = {f"language_model.{name}": tensor for name, tensor in llama.state_dict().items()}
    longer = Adapter.open(folder, in_memory(state))
    for name in expected.infos:
        assert torch.equal(bare.read(name.removeprefix("model.")), expected.read(name))
        assert torch.equal(longer.read(f"language_model.{name}"), expected.read(name))
    inner = saved_adapter(llama.model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), tmp_path / "inner")
    assert set(Adapter.open(inner, in_memory(llama)).infos) == set(expected.infos)


def test_gpt2_as_the_hub_stores_it_without_its_transformer_prefix(gpt2, tmp_path, saved_adapter):
    config = LoraConfig(r=4, target_modules=["c_attn", "lm_head"], fan_in_fan_out=True)
    folder = saved_adapter(gpt2, config, tmp_path / "a")
    state = {name.removeprefix("transformer."): tensor for name, tensor in gpt2.state_dict().items()}
    adapter = Adapter.open(folder, in_memory(state))
    assert list(adapter.infos) == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight", "lm_head.weight"]


def test_an_adapter_of_one_tower_over_a_model_of_two_is_ambiguous(folder, llama):
    state = {f"{tower}.{n}": t for tower in ("left", "right") for n, t in llama.model.state_dict().items()}
    with pytest.raises(SourceError, match="fits state dict in more than one way"):
        Adapter.open(folder, in_memory(state))


def test_layers_that_are_missing_are_not_sought_in_another_tower(folder, llama):
    # the left tower has one layer, the adapter changes two, and the right tower has a second one
    state = {f"right.{name}": tensor for name, tensor in llama.state_dict().items()}
    state |= {name: tensor for name, tensor in llama.state_dict().items() if "layers.1." not in name}
    with pytest.raises(MismatchError, match=r"match no tensor of the base \(2\): model\.layers\.1\."):
        Adapter.open(folder, in_memory(state))


def test_keys_without_the_prefix_of_peft(folder, llama):
    expected = Adapter.open(folder, in_memory(llama)).read("model.layers.0.mlp.up_proj.weight")
    path = folder / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert torch.equal(Adapter.open(folder, in_memory(llama)).read("model.layers.0.mlp.up_proj.weight"), expected)


def test_a_bin_file_reads_as_the_safetensors_file(folder, llama):
    expected = Adapter.open(folder, in_memory(llama))
    hashed = expected.content_hash()
    deltas = {name: expected.read(name) for name in expected.infos}
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()
    adapter = Adapter.open(folder, in_memory(llama))
    assert all(torch.equal(adapter.read(name), delta) for name, delta in deltas.items())
    assert adapter.content_hash() == hashed


def test_a_hub_id_is_found_in_the_cache(folder, llama, tmp_path, monkeypatch):
    from merging import Recipe, merge

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "cache" / "models--me--my-lora"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    shutil.copytree(folder, cached / "snapshots" / "0123")
    adapter = Adapter.open("me/my-lora", in_memory(llama))
    assert adapter.content_hash() == Adapter.open(folder, in_memory(llama)).content_hash()
    with pytest.raises(NotFoundError, match="not in the local cache and the hub cannot be reached"):
        Adapter.open("me/another", in_memory(llama))
    llama.save_pretrained(tmp_path / "base")
    recipe = {"base": str(tmp_path / "base"), "method": "task_arithmetic", "tasks": ["me/my-lora"]}
    merge(Recipe.from_data(recipe), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    merged, base = Checkpoint.open(tmp_path / "out").read(name), Checkpoint.open(tmp_path / "base").read(name)
    torch.testing.assert_close(merged - base, adapter.read(name), atol=1e-6, rtol=0)


def test_the_hash_follows_the_content_and_not_the_place(folder, llama, tmp_path):
    hashed = Adapter.open(folder, in_memory(llama)).content_hash()
    moved = shutil.copytree(folder, tmp_path / "moved")
    path = moved / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere", "peft_version": "0.1"}))
    assert Adapter.open(moved, in_memory(llama)).content_hash() == hashed
    path.write_text(json.dumps(config | {"lora_alpha": 9}))
    assert Adapter.open(moved, in_memory(llama)).content_hash() != hashed
    shutil.copy(folder / "adapter_config.json", path)
    tensors = load_file(moved / "adapter_model.safetensors")
    tensors[next(iter(tensors))] += 1
    save_file(tensors, moved / "adapter_model.safetensors")
    assert Adapter.open(moved, in_memory(llama)).content_hash() != hashed


@pytest.mark.parametrize(("dtype", "delta"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_deltas_are_made_in_float32_or_in_float64_if_stored_so(folder, llama, dtype, delta):
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    adapter = Adapter.open(folder, in_memory(llama))
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"].double() for half in "AB")
    assert adapter.infos[name].dtype == adapter.read(name).dtype == adapter.low_rank(name).left.dtype == delta
    torch.testing.assert_close(
        adapter.read(name).double(), 2 * b @ a, atol=1e-6 if delta == torch.float32 else 1e-15, rtol=0
    )


def test_an_embedding_copy_that_was_rounded_is_a_copy_and_one_that_differs_is_a_replacement(
    llama, tmp_path, saved_adapter, check_reads
):
    folder = saved_adapter(llama, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "a")
    name, key = "model.embed_tokens.weight", "base_model.model.model.embed_tokens.base_layer.weight"
    expected = Adapter.open(folder, in_memory(llama)).low_rank(name)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {key: tensors[key].bfloat16()}, path)
    assert torch.equal(Adapter.open(folder, in_memory(llama)).low_rank(name).dense(), expected.dense())
    save_file(tensors | {key: tensors[key] + 0.25}, path)
    adapter = Adapter.open(folder, in_memory(llama))
    assert adapter.low_rank(name) is None
    torch.testing.assert_close(adapter.read(name), expected.dense() + 0.25)
    check_reads(adapter)


def test_a_mixture_stored_expert_by_expert(mixtral, tokens, tmp_path, saved_adapter, live_logits, check_reads, logits):
    # transformers stores block_sparse_moe.experts.0.w1, the live model has mlp.experts.gate_up_proj
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    folder = saved_adapter(mixtral, config, tmp_path / "adapter")
    mixtral.save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in base.infos
    adapter = Adapter.open(folder, base)
    assert len(adapter.infos) == 2 * (1 + 3 * 3)
    assert adapter.low_rank("model.layers.0.block_sparse_moe.experts.2.w3.weight").rank == 2
    check_reads(adapter)
    merged = {name: base.read(name) + (adapter.read(name) if name in adapter.infos else 0) for name in base.infos}
    (tmp_path / "merged").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "merged" / "config.json")
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    from transformers import MixtralForCausalLM

    ours = logits(MixtralForCausalLM.from_pretrained(tmp_path / "merged"), tokens)
    live = live_logits(mixtral, folder, tokens)
    torch.testing.assert_close(ours, live, atol=1e-5 * float(live.abs().max()), rtol=0)


def test_experts_stored_with_their_inputs_first(proven, tokens, sizes):
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, head_dim=8, tie_word_embeddings=False)
    for width in (48, 32):  # down_proj is square in the second, as in the real one
        config.intermediate_size = width
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = GptOssForCausalLM(config).eval()
        lora = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        adapter = proven(model, lora, tokens).adapter
        assert adapter.infos["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32, 2 * width)


def test_a_square_expert_parameter_alone_is_placed_by_its_siblings(proven, tokens, sizes):
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        **(sizes | {"intermediate_size": 32}),
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GptOssForCausalLM(config).eval()
    proven(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]), tokens)


@pytest.mark.parametrize("version", ["0.17.1", "0.19.0", "0.21.2"])
@pytest.mark.parametrize("width", [48, 32], ids=["wide", "square"])
def test_experts_are_read_as_the_peft_that_trained_them_read_them(mixtral, tmp_path, version, width):
    # before 0.19.1 PEFT took every expert parameter for [expert, in, out]; a square one does not tell
    name, experts, rank = "layer.experts.down_proj", 3, 2
    base = in_memory(
        {name: torch.zeros(experts, 32, width), "layer.experts.gate_up_proj": torch.zeros(experts, 2 * width, 32)}
    )
    inner, outer = (width, 32) if version == "0.21.2" else (32, width)
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(experts * rank, inner, generator=generator),
        torch.randn(outer, rank * experts, generator=generator),
    )
    prefix = "base_model.model.layer.experts"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_parameters": ["experts.down_proj"],
        "peft_version": version,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    form = "ore,eri->eoi" if version == "0.21.2" else "ore,eri->eio"
    expected = torch.einsum(form, b.reshape(outer, rank, experts), a.reshape(experts, rank, inner))
    torch.testing.assert_close(Adapter.open(tmp_path, base).read(name), expected)


def test_a_scaled_embedding(proven, tokens, sizes):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes, head_dim=8, tie_word_embeddings=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Gemma3ForCausalLM(config).eval()
    proven(model, LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"]), tokens)


def test_an_encoder_decoder_with_shared_embeddings(proven):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.arange(10).reshape(1, 10), "decoder_input_ids": torch.arange(4).reshape(1, 4)}
    proven(model, LoraConfig(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"), inputs)


def test_a_sum_of_adapters_stays_factored(llama, tmp_path, perturbed):
    base = in_memory(llama)
    adapters = []
    for rank in (2, 5):
        torch.manual_seed(rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = perturbed(get_peft_model(copy.deepcopy(llama), LoraConfig(r=rank, target_modules=["q_proj"])))
        model.save_pretrained(tmp_path / str(rank))
        adapters.append(Adapter.open(tmp_path / str(rank), base))
    for name in adapters[0].infos:
        total = summed([adapter.low_rank(name) for adapter in adapters], [0.3, -2.0])
        assert total.rank == 7
        torch.testing.assert_close(total.dense(), 0.3 * adapters[0].read(name) - 2 * adapters[1].read(name))
