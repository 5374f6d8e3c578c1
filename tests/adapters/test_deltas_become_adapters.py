"""Merged deltas written as a PEFT adapter: plain PEFT loads it, and the logits are those of base + deltas."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from merging import Recipe, merge
from merging.adapter_out import AdapterWriter, Rank, extract_lora, low_rank_of, merge_to_adapter, write_adapter
from taskvec.adapter import Adapter
from taskvec.checkpoint import Checkpoint
from taskvec.errors import MismatchError, NonFiniteError, OutputError, OutputExistsError, UsageError
from taskvec.source import LowRank, in_memory
from taskvec.vector import TaskVector


@pytest.fixture
def loads(logits, with_deltas):
    """Shows that PEFT's live model with the written adapter has the logits of base + deltas."""

    def check(model, out, source, inputs, tolerance=1e-5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            live = logits(PeftModel.from_pretrained(copy.deepcopy(model), out), inputs)
        expected = logits(with_deltas(model, source), inputs)
        assert (expected - logits(model, inputs)).abs().max() > 0.01
        torch.testing.assert_close(live, expected, atol=tolerance * float(expected.abs().max()), rtol=0)

    return check


@pytest.fixture
def adapters(llama, saved_adapter, tmp_path):
    kinds = [
        {"r": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
        {"r": 3, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 5}, "lora_alpha": 7},
        {"r": 4, "target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    ]
    return [saved_adapter(llama, LoraConfig(**kind), tmp_path / f"a{i}") for i, kind in enumerate(kinds)]


def noisy(model, names, *, scale=0.1, rank=None):
    """A fine-tuned copy of the model: these tensors moved at random."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if any(part in name for part in names):
                shape = parameter.shape
                if rank is None or len(shape) != 2:
                    parameter += scale * torch.randn(shape, generator=generator)
                else:
                    left, right = (
                        torch.randn(*size, generator=generator) for size in ((shape[0], rank), (rank, shape[1]))
                    )
                    parameter += scale * left @ right
    return tuned


def test_a_merge_of_adapters_is_exact_and_never_dense(llama, adapters, tokens, tmp_path, loads):
    base = in_memory(llama)
    vectors = [TaskVector.from_adapter(base, path) for path in adapters]
    merged = TaskVector.sum([0.5 * vectors[0], -1.5 * vectors[1], vectors[2]])

    class Factored:
        label, infos, aliases, low_rank = merged.label, merged.infos, merged.aliases, merged.low_rank

        def read(self, name):
            raise AssertionError(f"{name} was made dense")

        read_flat = read

    report = write_adapter(Factored(), base, tmp_path / "out", rank="exact")
    assert report.error == 0
    assert all(kept.error == 0 for kept in report.kept)
    assert {kept.rank for kept in report.kept} == {2, 4, 5}
    loads(llama, tmp_path / "out", merged, tokens)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["target_modules"]) == ["down_proj", "embed_tokens", "lm_head", "o_proj", "q_proj", "up_proj"]


def test_what_was_written_reads_back_as_the_same_deltas(llama, adapters, tmp_path):
    base = in_memory(llama)
    merged = TaskVector.sum([TaskVector.from_adapter(base, path) for path in adapters])
    write_adapter(merged, base, tmp_path / "out")
    again = Adapter.open(tmp_path / "out", base)
    assert set(again.infos) == set(merged.infos)
    for name in merged.infos:
        torch.testing.assert_close(again.read(name), merged.read(name), atol=1e-6, rtol=1e-5)


def test_a_rank_below_that_of_the_factors_is_the_best_of_that_rank(llama, adapters, tmp_path):
    base = in_memory(llama)
    merged = TaskVector.sum([TaskVector.from_adapter(base, path) for path in adapters[:2]])
    report = write_adapter(merged, base, tmp_path / "out", rank="rank=2")
    again = Adapter.open(tmp_path / "out", base)
    for kept in report.kept:
        delta = merged.read(kept.name).double()
        values = torch.linalg.svdvals(delta)
        best = float(values[2:].square().sum().sqrt() / values.square().sum().sqrt())
        assert kept.rank == 2
        assert kept.error == pytest.approx(best, abs=1e-6)
        found = float((again.read(kept.name).double() - delta).norm() / delta.norm())
        assert found == pytest.approx(kept.error, abs=1e-6)
        assert kept.norm == pytest.approx(float(delta.norm()), rel=1e-6)
    total = sum(kept.norm**2 for kept in report.kept)
    assert report.error == pytest.approx((sum((k.norm * k.error) ** 2 for k in report.kept) / total) ** 0.5)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "vit"])
def test_full_rank_differences_of_matrices_are_extracted(request, model, tokens, pixels, tmp_path, loads):
    base = request.getfixturevalue(model)
    matrices = [name for name, value in base.named_parameters() if value.dim() in (2, 4)]
    tuned = noisy(base, matrices)
    # a wrapped position table of ViT is a bare parameter, which is no module's weight
    base_source, inputs = in_memory(base), pixels if model == "vit" else tokens
    report = extract_lora(base_source, in_memory(tuned), tmp_path / "out", rank="exact")
    assert report.error < 1e-5
    loads(base, tmp_path / "out", TaskVector.between(base_source, in_memory(tuned)), inputs)


def test_low_rank_differences_are_found_by_energy(llama, tokens, tmp_path, loads):
    base, tuned = in_memory(llama), noisy(llama, ["q_proj", "down_proj"], rank=3)
    report = extract_lora(base, in_memory(tuned), tmp_path / "out", rank="energy=0.999999")
    assert {kept.rank for kept in report.kept} == {3}
    loads(llama, tmp_path / "out", TaskVector.between(base, in_memory(tuned)), tokens)


def test_convolutions_are_extracted(convnet, senses, tmp_path, loads):
    base, tuned = (
        in_memory(convnet),
        noisy(convnet, ["conv1.weight", "conv2.weight", "point.weight", "conv3.weight"], scale=0.3),
    )
    extract_lora(base, in_memory(tuned), tmp_path / "out", rank="exact")
    loads(convnet, tmp_path / "out", TaskVector.between(base, in_memory(tuned)), senses)


def test_norms_and_biases_are_refused_by_name_saved_or_dropped(bert, tokens, tmp_path, loads):
    base = in_memory(bert)
    tuned = in_memory(noisy(bert, ["query", "LayerNorm.weight", "pooler.dense.bias"], scale=0.3))
    with pytest.raises(MismatchError, match=r"8 tensors changed that LoRA cannot hold .*other='save'") as error:
        extract_lora(base, tuned, tmp_path / "out", rank="exact")
    assert "bert.encoder.layer.0.attention.self.query.bias" in error.value.problems
    assert not (tmp_path / "out").exists()
    report = extract_lora(base, tuned, tmp_path / "out", rank="exact", other="save")
    assert len(report.saved) == 8
    assert report.error < 1e-5
    loads(bert, tmp_path / "out", TaskVector.between(base, tuned), tokens)
    report = extract_lora(base, tuned, tmp_path / "dropped", rank="exact", other="drop")
    assert len(report.dropped) == 8
    deltas = TaskVector.between(base, tuned)
    lost = sum(float(deltas.read(name).norm()) ** 2 for name in report.dropped)
    assert report.error == pytest.approx(lost**0.5 / deltas.norm(), rel=1e-4)


def test_a_change_of_norms_alone_loads_too(llama, tokens, tmp_path, loads):
    base, tuned = in_memory(llama), in_memory(noisy(llama, ["norm"], scale=0.5))
    report = extract_lora(base, tuned, tmp_path / "out", rank=4, other="save")
    assert (report.kept, len(report.saved), report.error) == ([], 5, 0)
    loads(llama, tmp_path / "out", TaskVector.between(base, tuned), tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_head_gets_the_same_change_as_its_embedding(family, tied_llama, tokens, tmp_path, loads, logits):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = tied_llama
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=53, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        )
        model.eval()
    tuned = noisy(model, ["embed_tokens", "wte", "q_proj", "c_attn.weight"], rank=2)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    base, moved = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    extract_lora(base, moved, tmp_path / "out", rank="rank=2")
    loads(model, tmp_path / "out", TaskVector.between(base, moved), tokens)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, tokens), logits(tuned, tokens), atol=1e-4, rtol=0)


def test_an_embedding_of_several_modules_is_stored_for_each(tmp_path, loads, logits):
    # T5's encoder, decoder and head use one table
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, num_heads=2, d_ff=24, num_layers=1, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    tuned = noisy(model, ["shared", "SelfAttention.q"], rank=2)
    for part, name in ((model, "base"), (tuned, "tuned")):
        part.save_pretrained(tmp_path / name)
    base, moved = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    extract_lora(base, moved, tmp_path / "out", rank="rank=2")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(name.endswith("lora_embedding_A") for name in stored) >= 2
    ids = torch.randint(0, 40, (2, 5))
    loads(model, tmp_path / "out", TaskVector.between(base, moved), {"input_ids": ids, "decoder_input_ids": ids})


def test_names_in_memory_are_written_where_the_disk_has_others(tmp_path, loads, logits):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    tuned = noisy(model, ["q_proj.weight", "o_proj.weight", "fc1.weight", "fc2.weight"], rank=2)
    for part, name in ((model, "base"), (tuned, "tuned")):
        part.save_pretrained(tmp_path / name)
    extract_lora(
        Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned"), tmp_path / "out", rank="rank=2"
    )
    images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    loads(model, tmp_path / "out", TaskVector.between(in_memory(model), in_memory(tuned)), images)


def test_names_on_disk_without_their_prefix_become_live_paths(gpt2, tokens, tmp_path, loads):
    # gpt2 on the hub has `h.0.attn.c_attn.weight`, PEFT's keys want `transformer.h.0.attn.c_attn`
    from safetensors.torch import save_file

    tuned = noisy(gpt2, ["c_attn.weight", "attn.c_proj.weight"], rank=2)
    for model, folder in ((gpt2, tmp_path / "base"), (tuned, tmp_path / "tuned")):
        model.save_pretrained(folder)
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    base, moved = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    assert "h.0.attn.c_attn.weight" in base.infos
    extract_lora(base, moved, tmp_path / "out", rank="rank=2")
    loads(gpt2, tmp_path / "out", TaskVector.between(in_memory(gpt2), in_memory(tuned)), tokens)


@pytest.mark.parametrize("parts", [["w2"], ["w1", "q_proj"]], ids=["down", "gate and attention"])
def test_experts_that_the_live_model_fuses(mixtral, tokens, tmp_path, parts, logits):
    # on disk there is one matrix for each expert; PEFT fuses their factors when it loads them
    from safetensors.torch import save_file
    from transformers import MixtralForCausalLM

    mixtral.save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    tensors = {name: base.read(name).clone() for name in base.infos}
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        # ranks differ, and one expert does not change
        if any(f"{part}.weight" in name for part in parts) and "experts.1" not in name:
            rank = 1 if "experts.2" in name else 2
            rows, columns = tensors[name].shape
            tensors[name] += (
                0.3 * torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
            )
    (tmp_path / "tuned").mkdir()
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    mixtral.config.save_pretrained(tmp_path / "tuned")
    report = extract_lora(base, Checkpoint.open(tmp_path / "tuned"), tmp_path / "out", rank="energy=0.9999999")
    assert {kept.rank for kept in report.kept} == {1, 2}
    tuned = MixtralForCausalLM.from_pretrained(tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    expected = logits(tuned, tokens)
    assert (expected - logits(mixtral, tokens)).abs().max() > 0.1
    torch.testing.assert_close(logits(live, tokens), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_modules_that_are_named_as_experts_are(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    widths = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "kv_lora_rank": 4,
    }
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
    experts = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 1,
    }
    config = DeepseekV3Config(**widths, **heads, **experts, num_hidden_layers=2, q_lora_rank=None)
    model = DeepseekV3ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    noisy(model, ["down_proj"]).save_pretrained(tmp_path / "tuned")
    base, tuned = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    with pytest.raises(MismatchError, match="PEFT would take these modules for experts") as error:
        extract_lora(base, tuned, tmp_path / "out", rank=2)
    assert error.value.problems == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj")
    report = extract_lora(base, tuned, tmp_path / "out", rank=2, only=["*.experts.*"])
    assert len(report.kept) == 4


def test_only_and_skip_choose_by_pattern(llama, tmp_path):
    base, tuned = in_memory(llama), in_memory(noisy(llama, ["q_proj", "o_proj", "norm"]))
    report = extract_lora(base, tuned, tmp_path / "out", rank=2, only=["*proj*"], skip=["*.1.*"])
    assert [kept.name for kept in report.kept] == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qo"]
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj"]


def test_the_randomised_solver_is_near_the_best_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    decay = torch.exp(-torch.arange(120) / 20)
    delta = (torch.randn(150, 120, generator=generator) * decay) @ torch.randn(120, 200, generator=generator)
    values = torch.linalg.svdvals(delta)
    for rank in ("rank=8", "energy=0.9"):
        best = low_rank_of(delta, rank, solver="exact")
        found = low_rank_of(delta, rank, solver="randomised", name="w")
        assert abs(found.rank - best.rank) <= 1
        missed = float((found.dense() - delta).norm() / values[found.rank :].norm())
        assert missed < 1.001
        assert torch.equal(low_rank_of(delta, rank, solver="randomised", name="w").left, found.left)
        assert not torch.equal(low_rank_of(delta, rank, solver="randomised", name="v").left, found.left)


def test_exact_factors_that_are_wider_than_the_matrix_are_reduced():
    generator = torch.Generator().manual_seed(0)
    wide = LowRank(torch.randn(6, 20, generator=generator), torch.randn(20, 9, generator=generator), (6, 9))
    found = low_rank_of(wide, "exact")
    assert found.rank == 6
    torch.testing.assert_close(found.dense(), wide.dense(), atol=1e-4, rtol=1e-5)


def test_the_reported_error_includes_the_rounding_of_the_stored_dtype(llama, adapters, tmp_path):
    base = in_memory(llama)
    vector = TaskVector.from_adapter(base, adapters[0])
    report = write_adapter(vector, base, tmp_path / "out", dtype="bfloat16")
    again = Adapter.open(tmp_path / "out", base)
    assert all(
        tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    )
    for kept in report.kept:
        delta = vector.read(kept.name).double()
        assert 1e-4 < kept.error < 1e-2
        assert kept.error == pytest.approx(
            float((again.read(kept.name).double() - delta).norm() / delta.norm()), rel=1e-3
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank=0", "whole number of at least 1"),
        ("rank=2.5", "whole number"),
        ("energy=1.5", r"not in \(0, 1\]"),
        ("exakt", r"rank=NUMBER, energy=SHARE or exact\. Did you mean 'exact'"),
        ("size=3", "is not rank=NUMBER"),
    ],
)
def test_a_rank_that_makes_no_sense(text, words):
    with pytest.raises(UsageError, match=words):
        Rank.parse(text)


def test_ranks_are_read_as_they_are_written():
    assert Rank.parse("rank=16") == Rank.parse(16) == Rank("rank", 16)
    assert Rank.parse("energy=0.95") == Rank("energy", 0.95)
    assert Rank.parse(Rank.parse("exact")) == Rank("exact")


def test_outputs_that_are_taken_empty_or_inside_an_input(llama, adapters, tmp_path):
    base = in_memory(llama)
    vector = TaskVector.from_adapter(base, adapters[0])
    out = tmp_path / "out"
    write_adapter(vector, base, out)
    with pytest.raises(OutputExistsError, match="exists already"):
        write_adapter(vector, base, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    write_adapter(2 * vector, base, out, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before
    with pytest.raises(OutputError, match="nothing changed"):
        write_adapter(0 * vector, base, tmp_path / "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0", "a1", "a2", "out"]


def test_deltas_that_do_not_belong_to_the_base(llama, tmp_path):
    with AdapterWriter(tmp_path / "out", in_memory(llama), rank=2) as writer:
        with pytest.raises(MismatchError, match=r"lm_heat.weight: not in .* Did you mean 'lm_head.weight'"):
            writer.add("lm_heat.weight", torch.zeros(61, 32))
        with pytest.raises(MismatchError, match=r"the delta is \[2, 2\], .* has \[61, 32\]"):
            writer.add("lm_head.weight", torch.zeros(2, 2))
        with pytest.raises(NonFiniteError, match=r"lm_head\.weight"):
            writer.add("lm_head.weight", torch.full((61, 32), float("nan")))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def zoo(llama, adapters, tmp_path):
    """The base on disk, three adapters and a whole fine-tuned model."""
    llama.save_pretrained(tmp_path / "base")
    noisy(llama, ["v_proj", "gate_proj"], rank=2).save_pretrained(tmp_path / "tuned")
    return {
        "base": str(tmp_path / "base"),
        "tuned": str(tmp_path / "tuned"),
        "adapters": [str(path) for path in adapters],
    }


RECIPES = {
    "task_arithmetic": {"scale": 0.7, "weights": [1.0, -2.0, {"*q_proj*": 0.5, "default": 1.5}]},
    "task_arithmetic of a mean": {
        "method": "task_arithmetic",
        "parameters": {"normalize": True},
        "weights": [1.0, 2.0, 1.0],
    },
    "average": {"weights": [1.0, 2.0, 3.0]},
    "ties": {"parameters": {"density": 0.5}},
    "with a whole model": {"method": "task_arithmetic", "tuned": True},
    "with a preprocess": {"method": "task_arithmetic", "preprocess": [{"method": "magnitude", "density": 0.3}]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_an_adapter_is_the_same_merge_as_a_checkpoint(zoo, tmp_path, name):
    values = dict(RECIPES[name])
    paths = [*zoo["adapters"], *([zoo["tuned"]] if values.pop("tuned", False) else [])]
    weights = values.pop("weights", [1.0] * len(paths))
    tasks = [{"path": path, "weight": weight} for path, weight in zip(paths, weights)]
    recipe = Recipe.from_data({"base": zoo["base"], "method": name, "tasks": tasks} | values)
    report = merge_to_adapter(recipe, tmp_path / "adapter")
    merge(recipe, tmp_path / "merged")
    base, merged = Checkpoint.open(zoo["base"]), Checkpoint.open(tmp_path / "merged")
    written = Adapter.open(tmp_path / "adapter", base)
    assert {kept.name for kept in report.kept} == set(written.infos)
    for tensor in base.infos:
        delta = merged.read(tensor) - base.read(tensor)
        found = written.read(tensor) if tensor in written.infos else torch.zeros_like(delta)
        torch.testing.assert_close(found, delta, atol=2e-5, rtol=1e-4)
    facts = json.loads((tmp_path / "adapter" / "taskvec.json").read_text())
    assert facts["recipe"]["method"] == recipe.method
    assert facts["error"] == report.error
    assert "content_hash" in facts["inputs"][0]


def test_a_linear_recipe_over_adapters_never_makes_a_delta_dense(zoo, tmp_path, monkeypatch):
    def dense(self, name, *rest):
        raise AssertionError(f"{name} was made dense")

    tasks = [{"path": path, "weight": 0.5} for path in zoo["adapters"]]
    recipe = Recipe.from_data({"base": zoo["base"], "method": "task_arithmetic", "tasks": tasks})
    monkeypatch.setattr(Adapter, "read", dense)
    monkeypatch.setattr(Adapter, "read_flat", dense)
    report = merge_to_adapter(recipe, tmp_path / "adapter")
    assert report.error == 0
    assert sum(kept.rank for kept in report.kept) == 2 * (2 + 3) + 2 * 2 + 2 * 5 + 2 * 4 + 4 + 4


def test_a_recipe_that_leaves_no_base_for_an_adapter(zoo, tmp_path):
    from taskvec.errors import RecipeError

    tasks = [{"path": zoo["tuned"]}, {"path": zoo["base"]}]
    with pytest.raises(RecipeError, match="an adapter is a change to a base"):
        merge_to_adapter(Recipe.from_data({"method": "average", "tasks": tasks}), tmp_path / "out")
    recipe = Recipe.from_data({"base": zoo["base"], "method": "average", "tasks": tasks[:1], "exclude": ["lm_head*"]})
    with pytest.raises(RecipeError, match="an adapter leaves its base as it is"):
        merge_to_adapter(recipe, tmp_path / "out")


def test_what_is_written_does_not_depend_on_threads(zoo, tmp_path):
    files = []
    for workers in (1, 3):
        recipe = Recipe.from_data(
            {
                "base": zoo["base"],
                "method": "ties",
                "tasks": zoo["adapters"],
                "workers": workers,
                "parameters": {"density": 0.5},
            }
        )
        merge_to_adapter(recipe, tmp_path / f"out{workers}", rank=3)
        files.append(
            [
                (tmp_path / f"out{workers}" / name).read_bytes()
                for name in ("adapter_model.safetensors", "adapter_config.json")
            ]
        )
    assert files[0] == files[1]


@pytest.fixture
def command(capsys):
    """Runs `taskvec` with these arguments and gives its exit code and what it printed."""
    from merging.commands import main

    def run(*arguments):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            return ended.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return run


def test_the_commands_write_adapters(llama, zoo, tmp_path, command):
    code, printed = command("extract-lora", zoo["base"], zoo["tuned"], tmp_path / "lora", "--rank", 2)
    assert code == 0
    assert "4 tensors as LoRA factors" in printed.out
    assert "rank 2" in printed.out
    arguments = ["merge", "--base", zoo["base"], "--method", "task_arithmetic", "--out-adapter", "exact"]
    code, printed = command(*arguments, "--json", tmp_path / "merged", tmp_path / "lora", zoo["adapters"][0])
    assert code == 0
    found = json.loads(printed.out)
    assert found["error"] == 0
    assert len(found["kept"]) == 8
    assert Adapter.open(tmp_path / "merged", Checkpoint.open(zoo["base"])).infos
    code, printed = command("extract-lora", zoo["base"], zoo["tuned"], tmp_path / "other")
    assert code == 2
    assert "give one of --rank, --energy and --exact" in printed.err
    assert command(*arguments, tmp_path / "merged", zoo["adapters"][0])[0] == 1
    normed = copy.deepcopy(llama)
    normed.model.norm.weight.data += 0.5
    normed.save_pretrained(tmp_path / "normed")
    code, printed = command(*arguments, tmp_path / "held", tmp_path / "normed")
    assert code == 1
    assert "model.norm.weight" in printed.err
    code, printed = command(*arguments, "--other", "save", tmp_path / "held", tmp_path / "normed")
    assert code == 0
    assert "saved whole: model.norm.weight" in printed.out


def test_a_recipe_says_what_of_an_adapter_to_leave_out(bert, saved_adapter, tmp_path):
    from taskvec.errors import RecipeError

    bert.bert.save_pretrained(tmp_path / "base")
    folder = saved_adapter(bert, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "a")
    task = {"path": str(folder)}
    values = {"base": str(tmp_path / "base"), "method": "task_arithmetic"}
    with pytest.raises(RecipeError, match="the base has no such tensor"):
        merge(Recipe.from_data(values | {"tasks": [task]}), tmp_path / "out")
    merge(Recipe.from_data(values | {"tasks": [task | {"skip": "classifier*"}]}), tmp_path / "out")
    base, merged = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "out")
    moved = [name for name in base.infos if not torch.equal(base.read(name), merged.read(name))]
    assert moved == [f"encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)]


def test_a_recipe_says_whether_both_uses_of_a_tied_tensor_change(tied_llama, saved_adapter, tmp_path):
    from taskvec.errors import RecipeError

    tied_llama.save_pretrained(tmp_path / "base")
    folder = saved_adapter(tied_llama, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "a")
    values = {"base": str(tmp_path / "base"), "method": "task_arithmetic"}
    with pytest.raises(RecipeError, match="tied='both'"):
        merge(Recipe.from_data(values | {"tasks": [{"path": str(folder)}]}), tmp_path / "out")
    merge(Recipe.from_data(values | {"tasks": [{"path": str(folder), "tied": "both"}]}), tmp_path / "out")
    base, merged = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "out")
    assert not torch.equal(base.read("model.embed_tokens.weight"), merged.read("model.embed_tokens.weight"))
