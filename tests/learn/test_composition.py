"""What a composition does to a module, what it spends, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from merging.learn.composition import Composition, fused_projections
from merging.learn.inplace import InPlace, PullBack
from merging.learn.objectives import Supervised
from merging.learn.select import coefficient_gradients, select
from taskvec.errors import LearningError, MismatchError, NonFiniteError, UsageError
from taskvec.source import LowRank


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def dense(model, seed=1, tasks=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{t}": {
            n: 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()
        }
        for t in range(tasks)
    }


def batch(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(9, (5, 3), generator=generator), torch.randint(3, (5,), generator=generator)


# -- the base comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_base_comes_back_bit_for_bit_after_an_exception(dtype):
    model = network(dtype)
    composition = Composition(model, dense(model), coefficients=0.37)
    base = copy.deepcopy(model.state_dict())

    def failing():
        with composition:
            composition.compose_()
            assert not torch.equal(model[2].weight, base["2.weight"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    with pytest.raises(ZeroDivisionError):
        composition.gradient(lambda: 1 / 0)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_and_flags_that_were_there_come_back():
    model = network()
    composition = Composition(model, dense(model))
    model[2].weight.grad = torch.ones_like(model[2].weight)
    model[4].weight.requires_grad_(False)
    x, y = batch()
    with composition:
        _, grad = composition.gradient(lambda: cross_entropy(model(x), y))
    assert (grad != 0).all()
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight))
    assert not model[4].weight.requires_grad
    assert model[4].weight.grad is None


def test_each_gradient_is_freed_as_it_is_handed_over():
    model = network()
    x, y = batch()
    alive = []

    def consume(name, grad):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        assert grad.shape == dict(model.named_parameters())[name].shape

    parameters = dict(model.named_parameters())
    with PullBack(model, parameters, consume) as pull:
        for _ in range(2):
            cross_entropy(model(x), y).backward()
    assert pull.count == 2 * len(parameters)
    assert alive == [0] * pull.count


def test_in_place_weights_are_rounded_once_and_restored():
    model = network(torch.bfloat16)
    base = model[2].weight.detach().clone()
    with InPlace(model, ["2.weight"]) as weights:
        values = torch.randn(6, 12)
        weights.write_("2.weight", values)
        assert torch.equal(model[2].weight, values.to(torch.bfloat16))
    assert torch.equal(model[2].weight, base)
    with pytest.raises(UsageError, match=r"2.wieght: not a parameter of Sequential. Did you mean '2.weight'"):
        InPlace(model, ["2.wieght"])


# -- ways to call ------------------------------------------------------------------------------------------------------


def test_a_closure_may_return_the_loss_or_call_backward_itself():
    model = network()
    composition = Composition(model, dense(model), coefficients=0.2)
    x, y = batch()

    def own():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    def number():
        return own().item()

    with composition:
        composition.gradient(own)  # the first call takes the table's gradient both ways, and rounds otherwise
        wanted, slope = composition.gradient(lambda: cross_entropy(model(x), y))
        for closure in (own, number, lambda given: cross_entropy(given(x), y), lambda: [cross_entropy(model(x), y)]):
            loss, grad = composition.gradient(closure)
            assert torch.equal(grad, slope)
            assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


def test_a_closure_that_reaches_nothing_is_an_error():
    model = network()
    composition = Composition(model, dense(model))
    other = network(seed=5)
    x, y = batch()
    for closure in (lambda: cross_entropy(other(x), y), lambda: 1.5, lambda: torch.zeros(())):
        with pytest.raises(LearningError, match="no gradient reached any composed parameter"):
            composition.gradient(closure)
    with pytest.raises(UsageError, match="one element"):
        composition.gradient(lambda: model(x))
    with pytest.raises(UsageError, match="returned a str"):
        composition.gradient(lambda: "loss")


def test_calling_the_composition_runs_the_composed_model():
    model = network()
    vectors = dense(model, tasks=1)
    composition = Composition(model, vectors, coefficients=1.0)
    tuned = network()
    tuned.load_state_dict({n: p + vectors["t0"][n] for n, p in model.state_dict().items()})
    x, _ = batch()
    with composition:
        torch.testing.assert_close(composition(x), tuned(x))


def test_coefficients_come_from_a_file_of_the_same_blocks():
    model = network()
    composition = Composition(model, dense(model))
    composition.coefficients = torch.randn(2, 5)
    again = Composition(model, dense(model), coefficients=composition.learned())
    assert torch.equal(again.coefficients, composition.coefficients)
    with pytest.raises(MismatchError, match="the file's blocks are other ones"):
        Composition(model, dense(model), "global", coefficients=composition.learned())
    with pytest.raises(MismatchError, match="the file's partitions are None"):
        Composition(model, dense(model), partitions=(2, 0), coefficients=composition.learned())
    with pytest.raises(UsageError, match=r"coefficients: shape \[2, 4\]; expected \[2, 5\]"):
        composition.coefficients = torch.zeros(2, 4)


# -- what is not made --------------------------------------------------------------------------------------------------


def test_low_rank_layers_and_tables_make_no_weight_gradient_once_both_ways_agreed():
    model = network()
    generator = torch.Generator().manual_seed(1)

    def vector():
        return {
            "0.weight": torch.randn(9, 4, generator=generator),
            "2.weight": LowRank(
                torch.randn(6, 2, generator=generator), torch.randn(2, 12, generator=generator), (6, 12)
            ),
            "4.weight": torch.randn(3, 6, generator=generator),
        }

    composition = Composition(model, {"a": vector(), "b": vector()}, coefficients=0.3)
    made = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: made.append(name))
    x, y = batch()
    with composition:
        _, first = composition.gradient(lambda: cross_entropy(model(x), y))
        assert set(made) == {"0.weight", "2.weight", "4.weight"}
        made.clear()
        _, second = composition.gradient(lambda: cross_entropy(model(x), y))
        assert set(made) == {"4.weight"}
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
        # tables are composed row by row while a gradient is taken; `compose_` completes them
        composition.compose_()
        for name in composition.composed:
            torch.testing.assert_close(dict(model.named_parameters())[name].detach(), composition.merged(name))


def test_a_table_composed_by_rows_is_right_for_rows_that_come_later():
    model = network()
    composition = Composition(model, dense(model), coefficients=0.3)
    x, y = batch()
    with composition:
        for _ in range(2):
            composition.gradient(lambda: cross_entropy(model(x), y))
        composition.coefficients = torch.full((2, 5), 0.7)
        composition.gradient(lambda: cross_entropy(model(x), y))
        others = torch.arange(9).view(3, 3)
        found = model(others)
        composition.compose_()
        assert torch.equal(model(others), found)


class Sneaky(nn.Module):
    """Uses a layer's weight both through its module and behind its back."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.proj = nn.Linear(4, 4, bias=False)

    def forward(self, ids):
        x = self.proj(self.embed(ids)).mean(1)
        return x @ self.proj.weight @ self.embed.weight.T


def test_a_weight_used_behind_its_modules_back_stays_dense():
    torch.manual_seed(0)
    model = Sneaky().double()
    generator = torch.Generator().manual_seed(1)
    low = LowRank(
        torch.randn(4, 2, generator=generator).double(), torch.randn(2, 4, generator=generator).double(), (4, 4)
    )
    vectors = {"a": {"proj.weight": low, "embed.weight": torch.randn(9, 4, generator=generator).double()}}
    x, _ = batch()
    y = torch.randint(9, (5,), generator=generator)
    found = []
    for factored in (True, False):
        composition = Composition(model, vectors, coefficients=0.4, factored=factored)
        with composition:
            found.append([composition.gradient(lambda: cross_entropy(model(x), y))[1] for _ in range(3)])
    for grad, wanted in zip(*found, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


def test_dead_and_excluded_blocks_cost_nothing():
    model = network()
    vectors = dense(model)
    for deltas in vectors.values():
        deltas["2.weight"].zero_()
    del vectors["t1"]["4.bias"]
    composition = Composition(model, vectors, exclude=["0.*"])
    assert composition.blocks == ("2.weight", "2.bias", "4.weight", "4.bias")
    assert composition.composed == ("2.bias", "4.weight", "4.bias")
    assert composition.live.tolist() == [[False, True, True, True], [False, True, True, False]]
    x, y = batch()
    made = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: made.append(name))
    with composition:
        _, grad = composition.gradient(lambda: cross_entropy(model(x), y))
    assert set(made) == {"2.bias", "4.weight", "4.bias"}
    assert grad[:, 0].tolist() == [0, 0]
    assert float(grad[1, 3]) == 0
    with pytest.raises(LearningError, match="Every task vector is zero"):
        Composition(model, vectors, exclude=["0.*", "2.bias", "4.*"])


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_misfit_of_a_task_vector_is_listed():
    model = network()
    vectors = dense(model)
    vectors["t0"]["2.weigth"] = torch.ones(6, 12)
    with pytest.raises(MismatchError, match=r"'t0' changes 2.weigth, not in Sequential. Did you mean '2.weight'"):
        Composition(model, vectors)
    Composition(model, vectors, exclude=["2.weigth"])
    wrong = dense(model)
    wrong["t0"]["2.weight"] = torch.ones(5, 12)
    wrong["t1"]["4.bias"] = torch.ones(4)
    with pytest.raises(MismatchError) as caught:
        Composition(model, wrong)
    assert len(caught.value.problems) == 2
    assert "2.weight: task vector 't0' has [5, 12], the model has [6, 12]" in str(caught.value)
    wrong = dense(model)
    wrong["t0"]["2.weight"][0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"2\.weight: t0 holds 1 NaN or infinite"):
        Composition(model, wrong)


def test_a_quantised_weight_is_refused_by_name():
    model = network()
    vectors = dense(model)
    model[2].weight = nn.Parameter(torch.zeros(6, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MismatchError, match=r"'t0' changes 2\.weight, stored as torch.int8 in the model"):
        Composition(model, vectors)


def test_tied_weights_have_one_block_and_must_change_alike():
    model = nn.Module()
    model.embed = nn.Embedding(5, 4)
    model.head = nn.Linear(4, 5, bias=False)
    model.head.weight = model.embed.weight
    delta = torch.randn(5, 4)
    both = Composition(model, {"a": {"embed.weight": delta, "head.weight": delta.clone()}})
    assert both.blocks == ("embed.weight",)
    other_name = Composition(model, {"a": {"head.weight": delta}}, coefficients=1.0)
    torch.testing.assert_close(other_name.merged("embed.weight"), model.embed.weight.detach() + delta)
    with pytest.raises(MismatchError, match=r"tied to 'embed.weight' in the model; task vector 'a' changes the two"):
        Composition(model, {"a": {"embed.weight": delta, "head.weight": delta + 1}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "blok"}, "granularity: 'blok' is not known. Did you mean 'block'"),
        ({"mode": "linaer"}, "mode: 'linaer' is not known. Did you mean 'linear'"),
        ({"bank": "gpu"}, "bank: 'gpu' is not known"),
        ({"bank_dtype": "int8"}, "bank_dtype: 'int8' is not known"),
        ({"statistics": "mean"}, "statistics: 'mean' is not known"),
        ({"partitions": 4}, r"partitions: 4; expected \(k, seed\)"),
        ({"partitions": (0, 1)}, "partitions: 0 parts; expected 1 to 65536"),
        ({"partitions": {}}, "the mapping is empty"),
        ({"granularity": "row", "partitions": (2, 0)}, "granularity `row` cuts it already"),
        ({"granularity": lambda name: 3}, "gave 3 for 0.weight; expected the name of a group"),
        ({"vectors": {}}, "vectors: expected at least one"),
        ({"vectors": {"a": 3}}, "'a' is a int; expected a TaskVector"),
    ],
)
def test_wrong_words_are_refused(options, message):
    model = network()
    vectors = options.pop("vectors", None)
    with pytest.raises(UsageError, match=message):
        Composition(model, dense(model) if vectors is None else vectors, **options)


def test_wrong_partitions_are_refused():
    model = network()
    wrong = {"2.wait": torch.zeros(2), "2.weight": torch.zeros(2, dtype=torch.int64), "4.weight": torch.zeros(3, 6)}
    with pytest.raises(MismatchError) as caught:
        Composition(model, dense(model), partitions=wrong)
    assert len(caught.value.problems) == 3


def test_fused_projections_are_cut_by_each_familys_convention():
    from transformers import BloomConfig, BloomModel, GPT2Config, GPT2Model

    gpt2 = GPT2Model(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    region = fused_projections(gpt2)["h.0.attn.c_attn.weight"]
    columns = torch.arange(8 * 24) // region.inner % region.parts
    assert torch.equal(columns.view(8, 24)[0], torch.arange(3).repeat_interleave(8))
    bloom = BloomModel(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2))
    region = fused_projections(bloom)["h.0.self_attention.query_key_value.weight"]
    rows = (torch.arange(24 * 8) // region.inner % region.parts).view(24, 8)[:, 0]
    assert torch.equal(rows, torch.arange(3).repeat_interleave(4).repeat(2))
    torch_own = fused_projections(nn.MultiheadAttention(4, 2))
    assert set(torch_own) == {"in_proj_weight", "in_proj_bias"}


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def test_batchnorm_statistics_are_kept_averaged_or_measured_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)).eval()
    before = copy.deepcopy(model.state_dict())
    vectors = {
        t: {n: torch.rand_like(p) for n, p in model.state_dict().items() if p.is_floating_point()} for t in ("a", "b")
    }
    kept = Composition(model, vectors, coefficients=0.5)
    with kept:
        kept.compose_()
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
    averaged = Composition(model, vectors, coefficients=0.5, statistics="average")
    with averaged:
        averaged.compose_().compose_()
        wanted = before["1.running_var"] + (vectors["a"]["1.running_var"] + vectors["b"]["1.running_var"]) / 2
        torch.testing.assert_close(model[1].running_var, wanted)
    torch.testing.assert_close(averaged.learned().weights("1.running_var"), torch.full((2,), 0.5))
    batches = [torch.randn(6, 1, 5, 5) for _ in range(3)]
    with kept:
        kept.recompute_statistics_(batches, lambda model, x: model(x))
        inner = model[0](torch.cat(batches)).detach()
        torch.testing.assert_close(model[1].running_mean, inner.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert not model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match="has no BatchNorm"):
        Composition(network(), dense(network())).recompute_statistics_([], None)


# -- selection ---------------------------------------------------------------------------------------------------------


def test_gradients_at_zero_come_from_one_pass_and_equal_the_composition():
    model = network(torch.float64)
    vectors = dense(model, tasks=4)
    composition = Composition(model, vectors)
    batches = [batch(2), batch(3)]
    found, blocks = coefficient_gradients(model, select_sources(vectors), Supervised(), batches)
    with composition:
        _, grad = composition.gradient(lambda: (cross_entropy(model(x), y) / 2 for x, y in batches))
    assert blocks == composition.blocks
    torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-12)


def select_sources(vectors):
    from merging.learn.bank import GivenDeltas

    return {task: GivenDeltas(deltas, task) for task, deltas in vectors.items()}


def test_selection_takes_the_largest_gradients_and_its_coefficients_go_back_to_the_vectors():
    model = network(torch.float64)
    vectors = dense(model, tasks=4)
    options = {"model": model, "objective": Supervised(), "batches": [batch(2)]}
    whole = select(vectors, 2, "gradient", **options)
    means = whole.scores.mean(1)
    assert set(whole.vectors) == {f"t{t}" for t in means.topk(2).indices.tolist()}
    picked = select(vectors, 2, "gradient-block", **options)
    for b, name in enumerate(picked.blocks):
        assert picked.winners[name] == tuple(f"t{t}" for t in picked.scores[:, b].topk(2).indices.tolist())
        assert torch.equal(picked.vectors["pick1"].read(name), vectors[picked.winners[name][0]][name])
    stitched = Composition(model, picked.vectors)
    stitched.coefficients = torch.randn(2, 5, dtype=torch.float64)
    back = Composition(model, vectors, coefficients=picked.unstitched(stitched.learned()))
    for name in stitched.composed:
        torch.testing.assert_close(back.merged(name), stitched.merged(name))
    scaled = {t: {n: d * (10.0 if t == "t3" else 1.0) for n, d in v.items()} for t, v in vectors.items()}
    plain = select(vectors, 1, "gradient", normalize=True, **options)
    assert list(select(scaled, 1, "gradient", normalize=True, **options).vectors) == list(plain.vectors)


def test_selection_by_features_and_at_random():
    vectors = dense(network(), tasks=3)
    features = {"t0": torch.tensor([1.0, 0.0]), "t1": torch.tensor([0.0, 1.0]), "t2": torch.tensor([1.0, 1.0])}
    chosen = select(vectors, 2, "features", target=torch.tensor([0.1, 1.0]), features=features)
    assert list(chosen.vectors) == ["t1", "t2"]
    assert list(select(vectors, 2, "random", seed=1).vectors) == list(select(vectors, 2, "random", seed=1).vectors)
    with pytest.raises(UsageError, match="budget: 4; expected 1 to 3"):
        select(vectors, 4)
    with pytest.raises(UsageError, match="strategy: 'grad' is not known"):
        select(vectors, 1, "grad")
    with pytest.raises(UsageError, match="gradient: needs `model`"):
        select(vectors, 1, "gradient")
    with pytest.raises(UsageError, match="features: needs `target`"):
        select(vectors, 1, "features")


# -- what ordinary modules are used with -------------------------------------------------------------------------------


def test_a_compiled_model_is_composed_like_any_other():
    model = network()
    vectors = dense(model)
    x, y = batch()
    torch._dynamo.utils.counters.clear()  # as if nothing had been compiled in this process
    composition = Composition(model, vectors, coefficients=0.3)
    with composition:
        wanted = [composition.gradient(lambda: cross_entropy(model(x), y))[1] for _ in range(2)]
    again = Composition(model, vectors, coefficients=0.3)
    late = Composition(model, vectors, coefficients=0.3)
    with late:
        for _ in range(2):
            late.gradient(lambda: cross_entropy(model(x), y))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    try:
        with pytest.raises(LearningError, match="compiled inside the closure"):
            late.gradient(lambda: cross_entropy(compiled(x), y))
        with again:
            found = [again.gradient(lambda: cross_entropy(compiled(x), y))[1] for _ in range(2)]
            again.coefficients = again.coefficients + 1
            moved = again.gradient(lambda: cross_entropy(compiled(x), y))[1]
    finally:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moved, wanted[0])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers
def test_peft_adapters_compose_to_the_live_model_and_keep_their_factors(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from merging.learn.objectives import CausalLM
    from taskvec import Checkpoint, TaskVector

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    ids = torch.randint(20, (2, 6))
    vectors, logits = {}, []
    for seed in range(2):
        torch.manual_seed(seed)
        live = get_peft_model(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        live.save_pretrained(tmp_path / f"adapter{seed}")
        vectors[f"a{seed}"] = TaskVector.from_adapter(base, tmp_path / f"adapter{seed}")
        logits.append(live.eval()(input_ids=ids).logits.detach())
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    composition = Composition(model, vectors)
    assert {name.split(".")[-2] for name in composition.composed} == {"q_proj", "down_proj"}
    assert all(block.values is None for block in composition.bank.blocks.values())
    with composition:
        for task, wanted in enumerate(logits):
            composition.coefficients = torch.zeros_like(composition.coefficients)
            composition.coefficients[task] = 1
            composition.compose_()
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)

        def closure():
            (term,) = CausalLM().terms(model, {"input_ids": ids})
            return term.total / term.number

        made = []
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: made.append(1))
        first = composition.gradient(closure)[1]
        assert made
        made.clear()
        second = composition.gradient(closure)[1]
        assert not made
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (torch.full((2, 3), -1), "whole numbers from 0 to 65535; got -1 to -1"),
        (torch.full((2, 3), 10**9), "whole numbers from 0 to 65535; got 1000000000 to 1000000000"),
        (torch.zeros(2, 3), "whole numbers from 0; got torch.float32"),
    ],
    ids=str,
)
def test_partitions_are_small_whole_numbers(index, words):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(MismatchError, match=words):
        Composition(model, {"a": {"weight": torch.ones(2, 3)}}, partitions={"weight": index})
