"""Every wrong input of `dam_merge` and of the mask functions has an error in words, before a step is taken."""

import copy
import re

import pytest
import torch
from torch import nn

from merging.learn.dam import DamConfig, dam_merge
from merging.learn.masks import ConcreteMask, masked_merge, masked_merge_gradient, rescale
from taskvec.coefficients import Coefficients, Region
from taskvec.errors import DataError, LearningError, MismatchError, NonFiniteError, ParameterError, UsageError

NAN = float("nan")
QUICK = {"mask_steps": 2, "inversion_steps": 2, "restarts": 1, "flag": 0.0, "batch_size": 8}


def family():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 8))
    models, heads, data = {}, {}, {}
    for task in ("a", "b"):
        models[task] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in models[task].parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        heads[task] = nn.Linear(8, 3)
        data[task] = torch.randn(20, 1, 4, 4)
    return base, models, heads, data


def refused(kind, words, *, base=None, models=None, heads=None, data=None, seed=0, forward=None, **settings):
    own, *given = family()
    for parts, changes in zip(given, (models, heads, data), strict=True):
        parts.update(changes or {})
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(kind, match=words) as caught:
        dam_merge(
            own if base is None else base,
            given[0],
            heads=given[1],
            data=given[2],
            forward=forward,
            config=DamConfig(**{**QUICK, **settings}),
            seed=seed,
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    return str(caught.value)


def images(*shape, value=None):
    return torch.randn(*shape) if value is None else torch.full(shape, value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (images(4, 1, 4, 4, value=NAN), r"data\['a'\]: inputs holds NaN or infinity"),
        ([images(4, 1, 4, 4), images(4, 1, 4, 4, value=NAN)], r"data\['a'\]: a batch of inputs holds NaN"),
        ([images(0, 1, 4, 4)], r"data\['a'\] gave a batch of no inputs"),
        (torch.tensor(1.0), "inputs is one number; expected"),
        (5, r"data\['a'\] is a int; expected a tensor, a mapping of tensors or batches of these"),
        ("images", r"data\['a'\] is a str; expected"),
        (
            {"pixels": images(4, 1, 4, 4), "more": images(3)},
            r"tensors of different lengths: \{'pixels': 4, 'more': 3\}",
        ),
        ({"pixels": images(4, 1, 4, 4), "name": "x"}, r"data\['a'\]: name is a str, expected a tensor"),
        ({"pixels": images(4, 1, 4, 4)}, "cannot take these inputs .*pixels.*Do their names"),
        ([images(4, 1, 4, 4), images(4, 3, 4, 4)], r"different channels \[1, 3\]; give `input_range`"),
        (images(4, 1, 4, 4).long(), "cannot take these inputs"),
        ([()], r"data\['a'\] gave a tuple"),
    ],
    ids=str,
)
def test_inputs_that_are_none_are_refused(data, words):
    refused(DataError, words, data={"a": data})


@pytest.mark.parametrize(
    ("head", "kind", "words"),
    [
        (torch.randn(8), UsageError, r"a tensor of shape \[8\]; expected a weight \[class, feature\]"),
        (torch.randn(1, 8), DataError, r"the head gives \[20, 1\] for 20 inputs; expected logits \[20, class\] of two"),
        (torch.randn(0, 8), DataError, "of two classes or more"),
        (lambda x: (x,), DataError, "the head gives a tuple for 20 inputs"),
        (lambda x: x[None], DataError, r"the head gives \[1, 20, 8\] for 20 inputs"),
        (lambda x: x * NAN, LearningError, "task 'a': predictions are NaN or infinite before anything is learned"),
    ],
    ids=str,
)
def test_heads_that_give_no_logits_are_refused(head, kind, words):
    refused(kind, words, heads={"a": head})


def broken(model, value):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[2].weight[0, 0] = value
    return model


@pytest.mark.parametrize("compat", [None, "published"])
def test_models_that_hold_no_numbers_are_named(compat):
    base, models, *_ = family()
    settings = {"compat": compat, "refit_steps": 1} if compat else {}
    text = refused(NonFiniteError, "the model of task 'b' holds", models={"b": broken(models["b"], NAN)}, **settings)
    assert text.startswith("2.weight")
    refused(NonFiniteError, "2.weight: the base holds", base=broken(base, float("inf")))
    state = models["a"].state_dict()
    refused(UsageError, "task 'a' has a list as 2.bias", models={"a": {**state, "2.bias": [1.0]}})
    refused(MismatchError, "task 'a' has torch.int64, the base has", models={"a": {**state, "2.bias": torch.arange(8)}})


class Blowing(nn.Module):
    """A head whose second answer is no number."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, features):
        self.calls += 1
        return features * (NAN if self.calls > 1 else 1.0)


@pytest.mark.parametrize("compat", [None, "published"])
def test_a_loss_that_is_no_number_stops_every_loop(compat):
    settings = {"compat": "published"} if compat else {"safety": "none", "performance": "entropy"}
    refused(LearningError, "mask step 0: the loss is not finite", heads={"a": Blowing()}, **settings)


def test_what_is_no_model_config_forward_or_seed_is_refused():
    base, models, heads, data = family()
    with pytest.raises(UsageError, match="data: got a list; expected task to inputs"):
        dam_merge(base, models, data=list(data.values()), heads=heads)
    with pytest.raises(UsageError, match="config: got a dict; expected a DamConfig"):
        dam_merge(base, models, data=data, heads=heads, config={})
    refused(UsageError, "the ReLU has no parameters", base=nn.ReLU())
    refused(UsageError, "forward: got a int", forward=3)
    refused(UsageError, "seed: 'x' is not a whole number", seed="x")
    refused(DataError, "cannot take these inputs .TypeError", forward=lambda module, batch: "no features")
    dam_merge(base, models, data=data, heads=heads, config=DamConfig(**QUICK), seed=2**62 - 1)


def noise(draws, **changes):
    base, *_ = family()
    return [{**{name: torch.rand(p.shape) for name, p in base.named_parameters()}, **changes} for _ in range(draws)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_range": (1, 0)}, "input_range: low is not below high"),
        ({"input_range": 5}, r"input_range: 5 is not a pair \(low, high\)"),
        ({"input_range": ("a", "b")}, "are not numbers"),
        ({"input_range": (NAN, 1)}, "expected two finite numbers"),
        ({"input_range": ([0, 0], [1, 1])}, "input_range: 2 channels, the inputs have 1"),
        ({"trace": "yes"}, "trace: 'yes' is not true or false"),
        ({"include": "conv*"}, "include: 'conv.' is not a list of patterns"),
        ({"exclude": [3]}, r"exclude: \[3\] is not a list of patterns"),
        ({"known_triggers": {"a": abs}}, "known_triggers: expected task to a list of functions"),
        ({"known_triggers": {"a": [3]}}, "known_triggers: expected task to a list of functions"),
        ({"noise": 5}, "noise: expected a list of mappings"),
        ({"masks": "single", "noise": noise(1)}, "1 draws recorded, 2 are needed: 1 for each of 2 mask steps"),
        ({"noise": noise(3)}, "3 draws recorded, 4 are needed: 2 for each of 2 mask steps$"),
        ({"noise": noise(4), "final_mask": "sample"}, "4 draws recorded, 6 are needed.*, and for the final mask"),
        ({"noise": noise(4, **{"2.bias": torch.full((8,), 1.5)})}, r"draw 0 for 2.bias must lie in \[0, 1\]"),
        ({"base_merge": "adamerging_tsk"}, "Did you mean 'adamerging_task'"),
        ({"base_merge": {"a": 0.3}}, "base_merge: none for task 'b'"),
        ({"base_merge": {"a": 0.3, "b": 0.1, "c": 1}}, "base_merge: there is no task 'c'"),
        ({"base_merge": ["x", "y"]}, "are not numbers, one for each task"),
        ({"base_merge": 0.3}, "base_merge: 0.3 is not one of"),
        ({"safety_source": "knwn"}, "Did you mean 'known'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    refused(ParameterError, words, **settings)


def test_a_known_trigger_keeps_the_shape_of_its_inputs():
    known = {"safety_source": "known"}
    words = r"known_triggers\['a'\]: gave \[\d+, 1, 2, 4\] for inputs \[\d+, 1, 4, 4\]"
    refused(DataError, words, known_triggers={"a": [lambda x: x[:, :, :2]]}, **known)
    refused(DataError, "gave a NoneType for inputs", known_triggers={"a": [lambda x: None]}, **known)


def test_both_masks_have_noise_of_their_own():
    base, models, heads, data = family()

    def merged(draws, **settings):
        config = DamConfig(**{**QUICK, "mask_steps": 0, "min_elements": 1, **settings}, noise=draws)
        return dam_merge(base, models, data=data, heads=heads, config=config)

    first, second = noise(2)
    found = merged([first, second], final_mask="sample")
    logits = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
    one, two = (rescale(ConcreteMask(logits).sample(draw)) for draw in (first, second))
    for name, weights in found.masks.items():
        torch.testing.assert_close(weights, one[name] * two[name])
    # made noise differs, too
    made = merged(None, final_mask="bernoulli", rescale_safety=False)
    both = torch.cat([weights.reshape(-1) != 0 for weights in made.masks.values()]).float().mean()
    assert 0.15 < both < 0.35  # a quarter; a half if both masks had one noise
    each = merged([first, second], final_mask="sample", masks="single", per_task_masks=True)
    for task, expected in (("a", one), ("b", two)):
        torch.testing.assert_close(each.task_masks[task], expected)


def test_what_is_not_used_is_said():
    base, models, heads, data = family()
    models["a"] = {**models["a"].state_dict(), "classifier.weight": torch.zeros(3, 8)}
    found = dam_merge(base, models, data={**data, "c": data["a"]}, heads=heads, config=DamConfig(**QUICK))
    said = "\n".join(found.warnings)
    assert "data of 'c' are not used" in said
    assert "task 'a' has tensors that the base lacks, left out: classifier.weight" in said


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, inputs):
        return self.two(self.one(inputs).tanh())


def test_a_tied_parameter_is_masked_once_and_must_be_tied_in_every_model():
    torch.manual_seed(0)
    base = Tied()
    state = {name: tensor + 0.1 for name, tensor in base.state_dict().items()}
    heads, data = {"a": nn.Linear(4, 2)}, {"a": torch.randn(20, 4)}
    found = dam_merge(base, {"a": state}, heads=heads, data=data, config=DamConfig(**QUICK))
    assert set(found.masks) == {"one.weight", "one.bias", "two.bias"}
    assert torch.equal(found.state_dict["one.weight"], found.state_dict["two.weight"])
    apart = {**state, "two.weight": state["two.weight"] + 1}
    with pytest.raises(
        MismatchError, match=r"two.weight: is one.weight in the base; the model of task 'a' has another"
    ):
        dam_merge(base, {"a": apart}, heads=heads, data=data, config=DamConfig(**QUICK))


# -- coefficients from elsewhere -----------------------------------------------------------------------------------------


def learned(**changes):
    base, *_ = family()
    names = [name for name, _ in base.named_parameters()]
    settings = {
        "values": torch.arange(8.0).view(2, 4) / 10,
        "tasks": ("b", "a"),
        "runs": tuple((name, 1) for name in names),
        "regions": {name: Region(i, inner=p.numel()) for i, (name, p) in enumerate(base.named_parameters())},
    }
    return Coefficients(**{**settings, **changes})


def test_coefficients_come_from_a_file_or_by_task_name(tmp_path):
    base, models, heads, data = family()

    def merged(coefficients):
        config = DamConfig(**QUICK, base_merge=coefficients)
        return dam_merge(base, models, data=data, heads=heads, config=config)

    learned().save(tmp_path / "learned.safetensors")
    found = merged(tmp_path / "learned.safetensors")
    # the file's rows are b, a; the merge's a, b
    assert torch.equal(found.coefficients, learned().values.flip(0))
    same = merged(str(tmp_path / "learned.safetensors"))
    assert all(torch.equal(same.state_dict[name], tensor) for name, tensor in found.state_dict.items())
    assert merged({"b": 0.2, "a": 0.1}).coefficients.tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("a", "c")}, "the coefficients are those of a, c, not of a, b"),
        ({"mode": "linear"}, "first-order model"),
        ({"regions": {"0.weight": Region(0, inner=18)}}, "the coefficients have none for 0.bias, 2.weight, 2.bias"),
        ({"partitions": (2, 0), "values": torch.zeros(2, 4, 2)}, "have several numbers a task"),
    ],
    ids=str,
)
def test_coefficients_that_do_not_fit_are_refused(changes, words):
    refused(ParameterError, words, base_merge=learned(**changes))


# -- the mask functions by themselves ------------------------------------------------------------------------------------

BASE = {"w": torch.zeros(3, 2), "s": torch.tensor(1.0)}
VECTORS = {"a": {"w": torch.ones(3, 2), "s": torch.tensor(0.5)}}


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: masked_merge(BASE, VECTORS, ["x"]), UsageError, "coefficients: got a list; expected a number"),
        (lambda: masked_merge(BASE, VECTORS, None), UsageError, "coefficients: got a NoneType"),
        (lambda: masked_merge(BASE, VECTORS, torch.tensor([1j])), UsageError, "coefficients: are complex"),
        (lambda: masked_merge([1], VECTORS, [1.0]), UsageError, "base: got a list; expected name to tensor"),
        (lambda: masked_merge(BASE, [1], [1.0]), UsageError, "task vector 0: got a int"),
        (lambda: masked_merge(BASE, {"w": torch.ones(3, 2)}, [1.0]), UsageError, "task vector 0: got a Tensor"),
        (lambda: masked_merge(BASE, VECTORS, [1.0], [torch.ones(2)]), UsageError, "mask: got a Tensor"),
        (lambda: masked_merge(BASE, VECTORS, [1.0], {"w": 1.0, "s": 1.0}), MismatchError, "w: mask is a float"),
        (lambda: masked_merge(BASE, VECTORS, [1.0], order=["w", "w", "s"]), MismatchError, "w: 2 times in `order`"),
        (lambda: masked_merge(BASE, VECTORS, [1.0], order=["w"]), MismatchError, "s: in task vector 0, not in `order`"),
        (
            lambda: masked_merge({"w": torch.arange(2)}, [{"w": torch.ones(2)}], [1.0], order=["w"]),
            MismatchError,
            "w: is torch.int64, which is copied and never merged",
        ),
        (
            lambda: masked_merge_gradient(BASE, VECTORS, [1.0], {"a": BASE}),
            UsageError,
            "the gradient is that of one mask for all tasks",
        ),
        (lambda: rescale([torch.ones(2)]), UsageError, "mask: expected a tensor, or name to tensor, found a list"),
        (lambda: ConcreteMask({"w": torch.tensor([NAN])}), ParameterError, "w: logits hold NaN"),
        (lambda: ConcreteMask({}, temperature="x"), ParameterError, "temperature: 'x' is not positive"),
        (
            lambda: ConcreteMask({"w": torch.zeros(2)}).sample({"w": [0.5, 0.5]}),
            MismatchError,
            "w: noise is a list, expected a tensor",
        ),
    ],
)
def test_mask_functions_say_what_they_cannot_use(call, kind, words):
    with pytest.raises(kind, match=re.compile(words)):
        call()
