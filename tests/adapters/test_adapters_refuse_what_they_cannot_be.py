"""One refusal for each thing an adapter may be that is not a change of this base's weights."""

import copy
import json
import pickle
import shutil
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftType, get_peft_model
from safetensors.torch import load_file, save_file

from taskvec.adapter import Adapter, is_adapter
from taskvec.errors import (
    CorruptFileError,
    MismatchError,
    MissingTensorError,
    NonFiniteError,
    NotAModelError,
    NotFoundError,
    SourceError,
    UnsafeFileError,
    UnsupportedAdapterError,
)
from taskvec.source import in_memory


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory, saved_adapter):
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"])
    return saved_adapter(llama, config, tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "adapter")


def configured(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def rewritten(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors) or tensors, path, {"format": "pt"})
    return folder


REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3, "router_temperature": 1.0, "use_gks": False},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "match_strict": False},
    "monteclora_config": {"num_samples": 8},
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "megatron_config": {"hidden_size": 8},
    "layer_replication": [[0, 2], [1, 2]],
    "bias": "some",
    "r": 0,
    "lora_alpha": "sixteen",
    "rank_pattern": ["q_proj"],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_a_change_of_weights_is_refused_by_its_name(folder, llama, field):
    configured(folder, **{field: REFUSED[field]})
    with pytest.raises(UnsupportedAdapterError, match=f"`{field}` in adapter_config.json") as error:
        Adapter.open(folder, in_memory(llama))
    assert error.value.field == field


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind.value not in ("LORA", "IA3")])
def test_every_other_kind_of_peft_is_refused(folder, llama, kind):
    with pytest.raises(UnsupportedAdapterError, match=f"`peft_type`.*{kind} is not LORA or IA3"):
        Adapter.open(configured(folder, peft_type=kind), in_memory(llama))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("corda", "covariance"),
        ("lora_ga", "gradients"),
        ("loftq", "quantised"),
        ("pissa_niter_16", "cannot be drawn again"),
        ("surprise", "may have changed the base"),
    ],
)
def test_a_start_that_changed_the_base_for_good_is_refused(folder, llama, start, words):
    with pytest.raises(UnsupportedAdapterError, match=f"`init_lora_weights`.*{words}.*path_initial_model"):
        Adapter.open(configured(folder, init_lora_weights=start), in_memory(llama))


def test_an_unknown_field_is_refused_unless_it_is_off(folder, llama):
    Adapter.open(configured(folder, use_magic=False, magic_config=None), in_memory(llama))
    with pytest.raises(UnsupportedAdapterError, match=r"`magic_config`.*it is 3, and what it changes is not known"):
        Adapter.open(configured(folder, magic_config=3), in_memory(llama))


def test_replication_that_changes_nothing_is_no_reason_to_refuse(folder, llama):
    assert Adapter.open(configured(folder, layer_replication=[[0, 1], [1, 2]]), in_memory(llama)).infos


def test_paths_that_are_no_adapters(folder, llama, tmp_path):
    base = in_memory(llama)
    with pytest.raises(NotFoundError, match="no such folder"):
        Adapter.open(tmp_path / "nowhere", base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"has no adapter_config\.json"):
        Adapter.open(tmp_path / "empty", base)
    assert not is_adapter(tmp_path / "empty")
    assert is_adapter(folder)
    assert is_adapter(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        Adapter.open(folder, base)
    assert not is_adapter(folder)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [("{", CorruptFileError, "not valid JSON"), ('{"r": 4}', NotAModelError, "no `peft_type`")],
)
def test_a_broken_configuration(folder, llama, text, error, words):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(error, match=words):
        Adapter.open(folder, in_memory(llama))


def test_a_truncated_file(folder, llama):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        Adapter.open(folder, in_memory(llama))


def test_empty_tensors_of_a_sharded_save(folder, llama):
    rewritten(folder, lambda tensors: {name: torch.empty(0) for name in tensors})
    with pytest.raises(CorruptFileError, match=r"12 of 12 tensors are empty .* ZeRO-3"):
        Adapter.open(folder, in_memory(llama))


def test_a_file_without_tensors(folder, llama):
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(NotAModelError, match="holds no tensors"):
        Adapter.open(folder, in_memory(llama))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(folder, llama, value):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def spoil(tensors):
        tensors[key][1, 2] = value

    adapter = Adapter.open(rewritten(folder, spoil), in_memory(llama))
    for read in (adapter.read, adapter.low_rank, lambda name: adapter.read_flat(name, 0, 3)):
        with pytest.raises(NonFiniteError, match=f"{key}: .* holds 1 NaN or infinite") as error:
            read("model.layers.0.self_attn.q_proj.weight")
        assert error.value.tensor == key
    with pytest.raises(NonFiniteError):
        adapter.check()
    adapter.read("model.layers.1.self_attn.q_proj.weight")


def test_an_overflowing_scale_is_named(folder, llama):
    adapter = Adapter.open(configured(folder, lora_alpha=1e41), in_memory(llama))
    with pytest.raises(NonFiniteError, match=r"q_proj.weight"):
        adapter.read("model.layers.0.self_attn.q_proj.weight")


def test_integers_are_not_an_adapter(folder, llama):
    rewritten(folder, lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    with pytest.raises(SourceError, match="not floating-point"):
        Adapter.open(folder, in_memory(llama))


def test_a_missing_half(folder, llama):
    rewritten(
        folder, lambda tensors: {name: t for name, t in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in name}
    )
    with pytest.raises(
        MismatchError, match=r"incomplete in the adapter \(1\): model\.layers\.0\.mlp\.up_proj has .* but no B"
    ):
        Adapter.open(folder, in_memory(llama))


def test_another_rank_than_the_configuration_says(folder, llama):
    with pytest.raises(MismatchError, match=r"another rank .* \(6\): .* has 4, r is 5"):
        Adapter.open(configured(folder, r=5), in_memory(llama))


def test_an_adapter_for_another_base_says_so_and_lists_every_tensor(folder, gpt2):
    configured(folder, base_model_name_or_path="me/my-llama")
    with pytest.raises(MismatchError, match="trained on 'me/my-llama'") as error:
        Adapter.open(folder, in_memory(gpt2))
    assert "does not fit GPT2LMHeadModel (it says" in str(error.value)
    assert "match no tensor of the base (6)" in str(error.value)


def test_an_adapter_for_a_wider_base(folder, llama):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(LlamaConfig(**(llama.config.to_dict() | {"hidden_size": 64, "head_dim": 16})))
    with pytest.raises(
        MismatchError, match=r"do not fit the base's shapes \(6\): .*A \[4, 32\] and B \[32, 4\], .* is \[64, 64\]"
    ):
        Adapter.open(folder, in_memory(wide))


def test_a_key_with_a_typo_gets_the_nearest_name(folder, llama):
    rewritten(folder, lambda tensors: {name.replace("up_proj", "upp_proj"): t for name, t in tensors.items()})
    with pytest.raises(
        MismatchError, match=r"match no tensor.*upp_proj.weight; nearest in the base: .*layers.0.mlp.up_proj.weight"
    ):
        Adapter.open(folder, in_memory(llama))


def test_a_leaf_that_nobody_knows(folder, llama):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"
    rewritten(folder, lambda tensors: tensors | {key: torch.ones(4, 4)})
    with pytest.raises(MismatchError, match=r"match no tensor of the base \(1\): .*lora_C\.weight"):
        Adapter.open(folder, in_memory(llama))


def test_a_resized_vocabulary(llama, tmp_path, saved_adapter):
    folder = saved_adapter(
        llama, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "a"
    )
    key = "base_model.model.lm_head.weight"
    rewritten(folder, lambda tensors: tensors | {key: torch.ones(64, 32)})
    with pytest.raises(MismatchError, match=r"vocabulary of 64 tokens against 61"):
        Adapter.open(folder, in_memory(llama))


def test_a_quantised_base(folder, llama):
    state = dict(llama.state_dict())
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name] = torch.zeros(512, 1, dtype=torch.uint8)
    with pytest.raises(MismatchError, match=r"quantised in the base .* \(1\): .*q_proj.weight is uint8"):
        Adapter.open(folder, in_memory(state))
    state[name] = llama.state_dict()[name].to(torch.float8_e4m3fn)
    state[f"{name}_scale_inv"] = torch.ones(1, 1)
    with pytest.raises(MismatchError, match=r"quantised in the base .* \(1\): .*q_proj.weight is float8_e4m3fn"):
        Adapter.open(folder, in_memory(state))


def test_dora_and_its_magnitudes_come_together(llama, folder, tmp_path, saved_adapter):
    dora = saved_adapter(llama, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), tmp_path / "dora")
    with pytest.raises(MismatchError, match="are DoRA magnitudes, but use_dora is not set"):
        Adapter.open(configured(dora, use_dora=False), in_memory(llama))
    with pytest.raises(MismatchError, match="has no lora_magnitude_vector, but use_dora is set"):
        Adapter.open(configured(folder, use_dora=True), in_memory(llama))


def test_lora_bias_without_a_bias_to_hold_it(llama, tmp_path, saved_adapter):
    folder = saved_adapter(llama, LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match=r"`lora_bias`.*q_proj has no bias in the base"):
        Adapter.open(folder, in_memory(llama))


@pytest.mark.parametrize(
    ("indices", "words"), [([1, 70], "tokens 70 are beyond"), ({"a": [1, 2], "b": [3, 4]}, "does not say which")]
)
def test_token_indices_that_make_no_sense(llama, tmp_path, indices, words, saved_adapter):
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    folder = saved_adapter(llama, config, tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match=f"`trainable_token_indices`.*{words}"):
        Adapter.open(configured(folder, trainable_token_indices=indices), in_memory(llama))


def test_a_grouped_convolution(tmp_path, perturbed):
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perturbed(get_peft_model(net, LoraConfig(r=4, target_modules=["0"]))).save_pretrained(tmp_path / "a")
    base = in_memory(torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2)))
    with pytest.raises(UnsupportedAdapterError, match=r"`target_modules`.*convolution in 2 groups"):
        Adapter.open(tmp_path / "a", base)


def test_a_matrix_whose_orientation_cannot_be_told(tmp_path):
    layers = {"a.0.wide.weight": (4, 8), "a.0.wide.bias": (8,), "a.0.tall.weight": (9, 4), "a.0.tall.bias": (9,)}
    base = in_memory(
        {name: torch.zeros(shape) for name, shape in layers.items()} | {"a.0.square.weight": torch.zeros(4, 4)}
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    factors = {f"base_model.model.a.0.square.lora_{x}.weight": torch.ones(s) for x, s in (("A", (1, 4)), ("B", (4, 1)))}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapterError, match=r"`fan_in_fan_out`.*is square"):
        Adapter.open(tmp_path, base)


TIED = {
    "an embedding": ({"target_modules": ["embed_tokens"]}, "target_modules", "its output head"),
    "a head": ({"target_modules": ["lm_head"]}, "target_modules", "its input embedding"),
    "a saved embedding": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "modules_to_save",
        "its output head",
    ),
    "both apart": ({"target_modules": ["embed_tokens", "lm_head"]}, "target_modules", "changes them differently"),
}


@pytest.mark.parametrize("case", TIED)
def test_one_use_of_a_tied_tensor_is_refused_unless_both_are_asked_for(tied_llama, tmp_path, case, saved_adapter):
    arguments, field, words = TIED[case]
    folder = saved_adapter(tied_llama, LoraConfig(r=4, **arguments), tmp_path / "a")
    for base in (
        in_memory(tied_llama),
        in_memory({n: t for n, t in tied_llama.state_dict().items() if n != "lm_head.weight"}),
    ):
        if base.aliases == {} and case in ("an embedding", "a saved embedding"):
            configured(folder, task_type="CAUSAL_LM")  # a file without a configuration does not say that it is tied
        with pytest.raises(UnsupportedAdapterError, match=f"`{field}`.*{words}"):
            Adapter.open(folder, base)
        if case != "both apart":
            assert "model.embed_tokens.weight" in Adapter.open(folder, base, tied="both").infos


def test_both_uses_of_a_tied_tensor_are_what_merge_and_unload_makes(tied_llama, tmp_path, saved_adapter):
    from peft import PeftModel

    folder = saved_adapter(tied_llama, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(copy.deepcopy(tied_llama), folder).merge_and_unload().state_dict()
    adapter = Adapter.open(folder, in_memory(tied_llama), tied="both")
    for name in adapter.infos:
        torch.testing.assert_close(tied_llama.state_dict()[name] + adapter.read(name), merged[name])


def test_embeddings_of_a_model_without_a_language_head_are_not_tied(bert, tied_llama, saved_adapter, tmp_path):
    from taskvec.checkpoint import Checkpoint

    # BERT's configuration says tie_word_embeddings, but a classifier has no head to tie
    bert = copy.deepcopy(bert)
    bert.config.tie_word_embeddings = True
    bert.save_pretrained(tmp_path / "bert")
    folder = saved_adapter(bert, LoraConfig(r=4, target_modules=["word_embeddings"]), tmp_path / "a")
    assert Adapter.open(folder, Checkpoint.open(tmp_path / "bert")).infos
    folder = saved_adapter(tied_llama, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "b")
    with pytest.raises(UnsupportedAdapterError, match="its output head"):
        Adapter.open(folder, in_memory(tied_llama))
    assert Adapter.open(configured(folder, task_type="SEQ_CLS"), in_memory(tied_llama)).infos


def test_tied_is_one_of_two_words(folder, llama):
    with pytest.raises(ValueError, match="expected 'refuse' or 'both'"):
        Adapter.open(folder, in_memory(llama), tied="neither")


def test_a_saved_head_that_the_base_lacks_is_an_error_or_left_out_by_name(bert, tmp_path, saved_adapter):
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    folder = saved_adapter(bert, config, tmp_path / "a")
    base = in_memory(bert.bert)
    with pytest.raises(MismatchError, match=r"base has no such tensor .* with skip\) \(2\): classifier\.bias"):
        Adapter.open(folder, base)
    adapter = Adapter.open(folder, base, skip=["classifier*"])
    assert set(adapter.infos) == {f"encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)}
    assert len(adapter.skipped) == 2
    with pytest.raises(NotAModelError, match="changes no tensor that skip leaves"):
        Adapter.open(folder, base, skip=["*"])


def test_a_name_that_the_adapter_does_not_change(folder, llama):
    with pytest.raises(MissingTensorError, match=r"does not change 'model.layers.0.self_attn.q_proj'.*q_proj.weight"):
        Adapter.open(folder, in_memory(llama)).read("model.layers.0.self_attn.q_proj")


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_would_run_code_is_refused(folder, llama):
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsafeFileError, match="reading it would run code"):
        Adapter.open(folder, in_memory(llama))
    (folder / "adapter_model.bin").write_bytes(b"PK" + pickle.dumps({}))
    with pytest.raises((CorruptFileError, UnsafeFileError)):
        Adapter.open(folder, in_memory(llama))


def test_a_scaled_tensor_beside_a_different_copy_of_it(llama, tmp_path, saved_adapter):
    folder = saved_adapter(llama, LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True), tmp_path / "a")

    def change(tensors):
        tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1

    with pytest.raises(UnsupportedAdapterError, match=r"`use_dora`.*differs from the base's"):
        Adapter.open(rewritten(folder, change), in_memory(llama))


def test_single_tokens_beside_a_copy_of_the_embedding(llama, saved_adapter, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    folder = saved_adapter(llama, config, tmp_path / "a")
    name, key = "model.embed_tokens.weight", "base_model.model.model.embed_tokens.base_layer.weight"
    expected = Adapter.open(folder, in_memory(llama)).read(name)
    copy_of_base = llama.state_dict()[name].clone()
    rewritten(folder, lambda tensors: tensors | {key: copy_of_base})
    assert torch.equal(Adapter.open(folder, in_memory(llama)).read(name), expected)
    rewritten(folder, lambda tensors: tensors | {key: copy_of_base + 1})
    with pytest.raises(UnsupportedAdapterError, match=r"`trainable_token_indices`.*differs from the base's"):
        Adapter.open(folder, in_memory(llama))


def test_ia3_of_another_width(llama, tmp_path, saved_adapter):
    folder = saved_adapter(llama, IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tmp_path / "a")
    rewritten(folder, lambda tensors: {name: torch.ones(7, 1) for name in tensors})
    with pytest.raises(MismatchError, match=r"k_proj.ia3_l is \[7, 1\], .*k_proj.weight is \[16, 32\]"):
        Adapter.open(folder, in_memory(llama))
