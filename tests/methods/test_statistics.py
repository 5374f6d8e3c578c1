"""Fisher merging, RegMean and RegMean++: statistics of real little models, and the merges made with them."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from merging import merge_stacks
from merging.learn.statistics import fisher_diagonal, input_grams, input_grams_through_merged
from merging.statistics import Statistics
from taskvec.errors import (
    DataError,
    LearningError,
    MismatchError,
    NotAModelError,
    OutputExistsError,
    ParameterError,
    UsageError,
)
from taskvec.sweep import Outcome


class Net(nn.Module):
    def __init__(self, seed, base=None, spread=0.3):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 3)
        if base is not None:
            with torch.no_grad():
                for own, theirs in zip(self.parameters(), base.parameters()):
                    own.copy_(theirs + spread * torch.randn_like(theirs))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.fixture
def zoo():
    base = Net(0)
    models = {name: Net(i + 1, base) for i, name in enumerate(["a", "b", "c"])}
    batches = {
        name: [torch.randn(40, 6, generator=torch.Generator().manual_seed(i)) * (i + 1) for _ in range(2)]
        for i, name in enumerate(models)
    }
    return base, models, batches


def deltas(base, models):
    return {
        name: torch.stack([dict(model.named_parameters())[name].detach() - value.detach() for model in models.values()])
        for name, value in base.named_parameters()
    }


def files_of(folder, models, batches, collect, **options):
    return [str(collect(models[name], batches[name], folder / f"{name}.safetensors", **options)) for name in models]


# -- Fisher -------------------------------------------------------------------------------------------------------------


def test_the_expected_fisher_is_the_mean_of_squared_gradients_under_the_models_own_predictions(zoo, tmp_path):
    _, models, batches = zoo
    model = models["a"]
    found = load_file(fisher_diagonal(model, batches["a"], tmp_path / "f.safetensors", labels="expected"))
    wanted = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for x in torch.cat(batches["a"]):
        chances = model(x).softmax(-1).detach()
        for label in range(3):
            model.zero_grad()
            (-model(x).log_softmax(-1)[label]).backward()
            for name, value in model.named_parameters():
                wanted[name] += chances[label] * value.grad.square() / 80
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_the_sampled_fisher_is_close_to_the_expected_one(zoo, tmp_path):
    _, models, _ = zoo
    many = [torch.randn(1500, 6, generator=torch.Generator().manual_seed(3))]
    sampled = load_file(fisher_diagonal(models["a"], many, tmp_path / "s.safetensors", seed=1))
    expected = load_file(fisher_diagonal(models["a"], many, tmp_path / "e.safetensors", labels="expected"))
    for name in ("layers.0.weight", "head.weight"):
        assert float((sampled[name] - expected[name]).norm() / expected[name].norm()) < 0.2


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_merging_is_the_weighted_mean_by_entry(zoo, tmp_path, normalize):
    base, models, batches = zoo
    files = files_of(tmp_path, models, batches, fisher_diagonal)
    stacks = deltas(base, models)
    weights = [1.0, 0.5, 2.0]
    found = merge_stacks("fisher", stacks, statistics_files=files, weights=weights, normalize=normalize)
    loaded = [load_file(file) for file in files]
    norms = [torch.cat([v.double().flatten() for v in each.values()]).norm() if normalize else 1 for each in loaded]
    for name, stack in stacks.items():
        values = torch.stack(
            [w * (each[name].double() / norm).clamp(min=1e-6) for w, each, norm in zip(weights, loaded, norms)]
        )
        torch.testing.assert_close(found[name].double(), (values * stack).sum(0) / values.sum(0), rtol=1e-5, atol=1e-7)


def test_equal_fisher_values_give_the_average(zoo, tmp_path):
    base, models, batches = zoo
    file = str(fisher_diagonal(models["a"], batches["a"], tmp_path / "f.safetensors"))
    stacks = deltas(base, models)
    found = merge_stacks("fisher", stacks, statistics_files=[file] * 3)
    for name, stack in stacks.items():
        torch.testing.assert_close(found[name], stack.mean(0))


# -- RegMean ------------------------------------------------------------------------------------------------------------


def test_gram_matrices_are_those_of_the_inputs(zoo, tmp_path):
    _, models, batches = zoo
    found = load_file(input_grams(models["b"], batches["b"], tmp_path / "g.safetensors"))
    x = torch.cat(batches["b"]).double()
    torch.testing.assert_close(found["layers.0.weight"].double(), x.T @ x / 80, rtol=1e-5, atol=1e-6)
    assert set(found) == {"layers.0.weight", "layers.1.weight", "head.weight"}


def test_regmean_without_shrinking_is_least_squares_on_the_inputs(zoo, tmp_path):
    base, models, batches = zoo
    files = files_of(tmp_path, models, batches, input_grams)
    found = merge_stacks("regmean", deltas(base, models), statistics_files=files, off_diagonal=1.0, ridge=0.0)
    weight = base.layers[0].weight.detach().double() + found["layers.0.weight"].double()
    inputs = torch.cat([torch.cat(batches[name]).double() for name in models])
    outputs = torch.cat(
        [torch.cat(batches[name]).double() @ models[name].layers[0].weight.detach().double().T for name in models]
    )
    torch.testing.assert_close(weight, torch.linalg.lstsq(inputs, outputs).solution.T, rtol=1e-4, atol=1e-5)
    # biases are averaged
    torch.testing.assert_close(found["head.bias"], deltas(base, models)["head.bias"].mean(0))


def test_regmean_shrinks_the_off_diagonal(zoo, tmp_path):
    base, models, batches = zoo
    files = files_of(tmp_path, models, batches, input_grams)
    stacks = deltas(base, models)
    found = merge_stacks("regmean", stacks, statistics_files=files, off_diagonal=0.7, ridge=0.0)
    for name in ("layers.0.weight", "layers.1.weight", "head.weight"):
        grams = [load_file(file)[name].double() for file in files]
        grams = [0.7 * gram + 0.3 * torch.diag(gram.diagonal()) for gram in grams]
        wanted = sum(d.double() @ g for d, g in zip(stacks[name], grams)) @ torch.linalg.inv(sum(grams))
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-5)


def test_inputs_that_never_occur_are_averaged_by_the_ridge_and_refused_without(zoo, tmp_path):
    base, models, batches = zoo
    batches = {name: [x * torch.tensor([1.0, 1, 1, 1, 1, 0]) for x in own] for name, own in batches.items()}
    files = files_of(tmp_path, models, batches, input_grams)
    stacks = deltas(base, models)
    found = merge_stacks("regmean", stacks, statistics_files=files)
    torch.testing.assert_close(found["layers.0.weight"][:, 5], stacks["layers.0.weight"].mean(0)[:, 5])
    with pytest.raises(ParameterError, match=r"layers\.0\.weight: the inputs do not determine the layer"):
        merge_stacks("regmean", stacks, statistics_files=files, ridge=0.0)


def test_identical_models_merge_to_themselves_whatever_their_data(zoo, tmp_path):
    base, models, batches = zoo
    models = dict.fromkeys(models, models["a"])
    files = files_of(tmp_path, models, batches, input_grams)
    found = merge_stacks("regmean", deltas(base, models), statistics_files=files)
    for name, stack in deltas(base, models).items():
        torch.testing.assert_close(found[name], stack[0], rtol=1e-4, atol=1e-6)


def test_conv1d_weights_are_turned(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    models = {name: GPT2LMHeadModel(config) for name in "ab"}
    batches = {name: [{"input_ids": torch.randint(20, (16, 8)), "attention_mask": torch.ones(16, 8)}] for name in "ab"}
    files = files_of(tmp_path, models, batches, input_grams, include=["*attn*", "*mlp*"])
    name = "transformer.h.0.mlp.c_fc.weight"  # [in, out] = [8, 32]
    stacks = {name: torch.stack([models[task].get_parameter(name).detach() for task in "ab"])}
    # shrunk, since what a layer norm gives adds up to zero: full Gram matrices would be singular
    found = merge_stacks("regmean", stacks, statistics_files=files, off_diagonal=0.5, ridge=0.0)[name].double()
    grams = [load_file(file)[name].double() for file in files]
    grams = [0.5 * gram + 0.5 * torch.diag(gram.diagonal()) for gram in grams]
    wanted = torch.linalg.inv(sum(grams)) @ sum(g @ d.double() for g, d in zip(grams, stacks[name]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_padded_positions_do_not_count(tmp_path):
    layer = nn.Sequential(nn.Linear(4, 2))
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    file = input_grams(
        layer, [{"x": x, "attention_mask": mask}], tmp_path / "g.safetensors", forward=lambda m, batch: m(batch["x"])
    )
    rows = x[mask.bool()].double()
    assert Statistics(file).examples == 9
    torch.testing.assert_close(load_file(file)["0.weight"].double(), rows.T @ rows / 9, rtol=1e-5, atol=1e-6)


# -- RegMean++ ----------------------------------------------------------------------------------------------------------


def test_regmean_pp_takes_inputs_from_the_merged_layers_below(zoo, tmp_path):
    base, models, batches = zoo
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    files = input_grams_through_merged(models, batches, {name: tmp_path / f"{name}.safetensors" for name in models})
    for name, model in models.items():  # nothing of the models changed
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
    stacks = deltas(base, models)
    found = merge_stacks("regmean_pp", stacks, statistics_files=[str(file) for file in files.values()])
    merged = Net(0)
    with torch.no_grad():
        for name, value in merged.named_parameters():
            value.copy_(base.get_parameter(name) + found[name])
    # the statistics of each layer are those of its inputs in the merged model
    for name in models:
        inputs = torch.cat(batches[name])
        grams = load_file(files[name])
        for i, layer in enumerate([*merged.layers, merged.head]):
            key = f"layers.{i}.weight" if i < 2 else "head.weight"
            rows = inputs.double()
            torch.testing.assert_close(grams[key].double(), rows.T @ rows / 80, rtol=1e-4, atol=1e-5)
            inputs = torch.tanh(layer(inputs)).detach()


def test_the_first_layer_is_the_same_in_regmean_and_regmean_pp(zoo, tmp_path):
    base, models, batches = zoo
    stacks = deltas(base, models)
    plain = files_of(tmp_path, models, batches, input_grams)
    through = input_grams_through_merged(
        models, batches, {name: tmp_path / f"{name}-pp.safetensors" for name in models}
    )
    one = merge_stacks("regmean", stacks, statistics_files=plain)
    other = merge_stacks("regmean_pp", stacks, statistics_files=[str(file) for file in through.values()])
    torch.testing.assert_close(one["layers.0.weight"], other["layers.0.weight"])
    assert not torch.allclose(one["layers.1.weight"], other["layers.1.weight"])


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_statistics_of_another_kind_number_or_model_are_refused(zoo, tmp_path):
    base, models, batches = zoo
    stacks = deltas(base, models)
    files = files_of(tmp_path, models, batches, input_grams)
    with pytest.raises(ParameterError, match="holds gram statistics, not fisher"):
        merge_stacks("fisher", stacks, statistics_files=files)
    with pytest.raises(ParameterError, match="statistics_files: 2 files for 3 tasks"):
        merge_stacks("regmean", stacks, statistics_files=files[:2])
    with pytest.raises(ParameterError, match=r"there is no file .*nowhere\.safetensors"):
        merge_stacks("regmean", stacks, statistics_files=[*files[:2], str(tmp_path / "nowhere.safetensors")])
    with pytest.raises(MismatchError, match="names none of the model's tensors"):
        merge_stacks("regmean", {"other.weight": stacks["head.weight"]}, statistics_files=files)
    with pytest.raises(MismatchError, match=r"head.weight: .* has \[5, 5\], the model asks for \[4, 4\]"):
        merge_stacks("regmean", {"head.weight": stacks["head.weight"][:, :, :4]}, statistics_files=files)
    with pytest.raises(ParameterError, match="regmean needs a value for it"):
        merge_stacks("regmean", stacks)


def test_a_file_that_holds_no_statistics_is_refused(zoo, tmp_path):
    from safetensors.torch import save_file

    base, models, _ = zoo
    save_file({"head.weight": torch.ones(3, 5)}, tmp_path / "plain.safetensors")
    with pytest.raises(NotAModelError, match="not a file of statistics"):
        merge_stacks("fisher", deltas(base, models), statistics_files=[str(tmp_path / "plain.safetensors")] * 3)


def test_tensors_without_statistics_are_averaged_with_a_warning(zoo, tmp_path):
    base, models, batches = zoo
    files = files_of(tmp_path, models, batches, fisher_diagonal, include=["layers.*"])
    outcome = Outcome()
    stacks = deltas(base, models)
    found = merge_stacks("fisher", stacks, statistics_files=files, outcome=outcome)
    torch.testing.assert_close(found["head.weight"], stacks["head.weight"].mean(0))
    assert outcome.warnings == ["fisher: 2 tensors have no statistics and are averaged: head.weight, head.bias"]


def test_collecting_refuses_what_it_cannot_use(zoo, tmp_path):
    _, models, batches = zoo
    out = tmp_path / "s.safetensors"
    with pytest.raises(DataError, match="there are no examples"):
        fisher_diagonal(models["a"], [], out)
    with pytest.raises(DataError, match="no linear layer saw an input"):
        input_grams(models["a"], [], out)
    with pytest.raises(DataError, match="matches no parameter"):
        fisher_diagonal(models["a"], batches["a"], out, include=["nothing.*"])
    with pytest.raises(LearningError, match="its inputs hold NaN or infinity"):
        input_grams(models["a"], [torch.full((2, 6), float("nan"))], out)
    with pytest.raises(DataError, match="'a' is a generator"):
        input_grams_through_merged(models, {**batches, "a": iter(batches["a"])}, dict.fromkeys(models, out))
    with pytest.raises(UsageError, match="statistics are written as safetensors"):
        input_grams(models["a"], batches["a"], tmp_path / "s.pt")
    with pytest.raises(DataError, match="must name the same tasks"):
        input_grams_through_merged(models, {"a": batches["a"]}, dict.fromkeys(models, out))
    assert not out.exists()
    input_grams(models["a"], batches["a"], out)
    with pytest.raises(OutputExistsError):
        input_grams(models["a"], batches["a"], out)


def test_the_model_is_left_in_the_mode_it_was_in(zoo, tmp_path):
    _, models, batches = zoo
    model = models["a"].train()
    model.head.weight.requires_grad_(False)
    fisher_diagonal(model, batches["a"], tmp_path / "f.safetensors")
    assert model.training
    assert not model.head.weight.requires_grad
    assert all(value.grad is None for value in model.parameters())
