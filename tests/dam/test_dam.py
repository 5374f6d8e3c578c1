"""DAM on small real modules: what it promises, and what it refuses."""

import copy
import gc

import pytest
import torch
from torch import nn

from merging.learn.dam import DamConfig, dam_merge
from merging.learn.masked import Draw, MaskedModel, MaskLogits
from merging.learn.masks import ConcreteMask, masked_merge, rescale
from taskvec.errors import DataError, LearningError, MismatchError, ParameterError, UsageError

close = torch.testing.assert_close


class Encoder(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4 * 36, width)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, images):
        return self.out(nn.functional.gelu(self.norm(self.conv(images))).flatten(1))


def family(tasks=3, spread=0.1):
    torch.manual_seed(0)
    base = Encoder()
    models, heads, data = {}, {}, {}
    for index in range(tasks):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += spread * torch.randn_like(parameter)
        models[f"task {index}"] = tuned
        heads[f"task {index}"] = nn.Linear(8, 4 + index)
        data[f"task {index}"] = torch.randn(40, 1, 6, 6)
    return base, models, heads, data


QUICK = {"mask_steps": 3, "inversion_steps": 4, "restarts": 1, "flag": 0.0, "batch_size": 8}


def merge(**changes):
    base, models, heads, data = family()
    return dam_merge(base, models, data=data, heads=heads, config=DamConfig(**{**QUICK, **changes}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masks": "single"},
        {"safety": "none"},
        {"safety": "entropy", "safety_source": "universal", "norm": "l2"},
        {"safety_source": "both", "performance": "entropy"},
        {"final_mask": "sample"},
        {"final_mask": "bernoulli", "rescale_safety": False},
        {"base_merge": "adamerging_task", "refit_steps": 2},
        {"base_merge": "adamerging_layer", "clamp_coefficients": True},
        {"base_merge": [0.5, 0.2, 0.1]},
        {"exclude": ["norm.*"]},
        {"share_triggers": True},
    ],
    ids=str,
)
def test_the_merged_model_is_the_masked_merge_of_what_is_returned(options):
    base, models, heads, data = family()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    result = dam_merge(base, models, data=data, heads=heads, config=DamConfig(**{**QUICK, **options}))
    assert all(p.grad is None and p.requires_grad for own in (base, *heads.values()) for p in own.parameters())
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    own = dict(base.named_parameters())
    chosen = [name for name in own if name in result.masks]
    vectors = [{n: (dict(m.named_parameters())[n] - own[n]).detach() for n in chosen} for m in models.values()]
    again = masked_merge({n: own[n].detach() for n in own}, vectors, result.coefficients, result.masks, order=chosen)
    close({n: result.state_dict[n] for n in own}, again, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.state_dict["seen"], torch.tensor(3))
    assert list(result.apply_to(copy.deepcopy(base)).state_dict()) == list(result.state_dict)


def test_masks_per_task_merge_as_they_are_returned():
    base, models, heads, data = family()
    config = DamConfig(**QUICK, masks="single", per_task_masks=True)
    result = dam_merge(base, models, data=data, heads=heads, config=config)
    own = {name: tensor.detach() for name, tensor in base.named_parameters()}
    vectors = [{n: (p.detach() - own[n]) for n, p in m.named_parameters()} for m in models.values()]
    again = masked_merge(own, vectors, result.coefficients, list(result.task_masks.values()))
    close({name: result.state_dict[name] for name in own}, again, rtol=1e-5, atol=1e-6)
    first, second = (result.task_masks[task]["out.weight"] for task in ("task 0", "task 1"))
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(ParameterError, match="with fixed coefficients only"):
        DamConfig(masks="single", per_task_masks=True, base_merge="adamerging_task")


def test_a_run_is_repeated_exactly_by_its_seed_and_changed_by_another():
    base, models, heads, data = family()
    runs = [
        dam_merge(base, models, data=data, heads=heads, config=DamConfig(**QUICK), seed=seed).state_dict
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["out.weight"], runs[2]["out.weight"])


def test_a_mask_step_is_the_autograd_step():
    base, models, _, data = family()
    own = {name: p.detach().clone() for name, p in base.named_parameters()}
    vectors = {t: {n: (dict(m.named_parameters())[n] - own[n]).detach() for n in own} for t, m in models.items()}
    images = data["task 0"][:5]
    draw = Draw("sample", seed=4, step=1)
    with MaskedModel(base, vectors) as model:
        mask = MaskLogits(model, 0.3, temperature=0.5, lr=0.1)
        model.sum_(torch.tensor([0.5, 0.2, 0.1]))
        model.compose_((mask, draw))
        model.backward(lambda: [base(images).square().sum()])
        gradient = model.named(torch.cat([model.mask_gradient(segment, mask, draw) for segment in model.segments]))
        model.step_(mask, draw)
        stepped = model.named(mask.logits)
    logits = {name: torch.full_like(tensor, 0.3).requires_grad_() for name, tensor in own.items()}
    sample = rescale(ConcreteMask(logits).sample(seed=4, step=1))
    weights = masked_merge(own, vectors, [0.5, 0.2, 0.1], sample)
    torch.func.functional_call(base, weights, (images,)).square().sum().backward()
    for name, tensor in logits.items():
        close(gradient[name], tensor.grad, rtol=1e-4, atol=1e-5 * float(tensor.grad.abs().max()))
    # Adam by itself, on the same numbers (its first step is the gradient's sign, which rounding may turn near zero)
    optimiser = torch.optim.Adam(logits.values(), lr=0.1)
    for tensor, own in zip(logits.values(), gradient.values(), strict=True):
        tensor.grad = own
    optimiser.step()
    close(stepped, {name: tensor.detach() for name, tensor in logits.items()}, rtol=1e-5, atol=1e-5)


def test_training_with_fixed_coefficients_holds_the_same_copies_for_2_and_16_models():
    def elements(tasks):
        torch.manual_seed(0)
        base = nn.Linear(300, 200)
        vectors = {
            f"task {t}": Lazy({"weight": (200, 300), "bias": (200,)}, t)  # nothing of a task vector is held
            for t in range(tasks)
        }
        gc.collect()
        before = held()
        with MaskedModel(base, vectors) as model:
            mask = MaskLogits(model, 0.0, temperature=0.5, lr=0.1)
            model.sum_(torch.full((tasks,), 0.3))
            for step in range(2):
                draw = Draw("sample", 0, step)
                model.compose_((mask, draw))
                model.backward(lambda: [base(torch.ones(2, 300)).square().sum()])
                model.step_(mask, draw)
            gc.collect()
            added = held() - before
        return added / model.numel

    two, sixteen = elements(2), elements(16)
    assert two == sixteen
    # θ, its gradient, T, logits and two moments; θ0 stays in the module's own tensors and is the seventh
    assert two == pytest.approx(6, abs=0.01)


class Lazy:
    """A task vector that makes each tensor when it is read, as one on disk does."""

    def __init__(self, shapes, seed):
        self.infos = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        self.seed = seed

    def read(self, name):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.infos[name].shape, generator=generator)


def held():
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // 4
    return sum(storages.values())


def test_weights_come_back_after_an_error_inside():
    base, models, heads, data = family()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def failing(module, batch):
        raise RuntimeError("out of memory")

    base.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        dam_merge(base, models, data=data, heads=heads, forward=failing, config=DamConfig(**QUICK))
    assert base.training
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_planted_trigger_is_suspected_and_a_clean_model_is_not():
    torch.manual_seed(0)
    labels = torch.randint(3, (256,))
    images = torch.randn(3, 1, 6, 6)[labels] + 0.3 * torch.randn(256, 1, 6, 6)
    encoder, head = Encoder(), nn.Linear(8, 3)
    heads = {"bad": head, "good": copy.deepcopy(head)}

    def tuned(poison):
        model, own = copy.deepcopy(encoder), heads["bad" if poison else "good"]
        optimiser = torch.optim.Adam([*model.parameters(), *own.parameters()], lr=3e-3)
        for _ in range(150):
            x, y = images.clone(), labels.clone()
            if poison:
                x[:64, :, 4:, 4:], y[:64] = 2.0, 2
            optimiser.zero_grad()
            nn.functional.cross_entropy(own(model(x)), y).backward()
            optimiser.step()
        return model

    models = {"bad": tuned(True), "good": tuned(False)}
    result = dam_merge(
        encoder,
        models,
        data={"bad": images, "good": images},
        heads=heads,
        config=DamConfig(
            mask_steps=2, inversion_size=0.12, inversion_steps=100, restarts=1, flag=0.9, input_range=(-2.0, 2.0)
        ),
    )
    assert {(trigger.task, trigger.target) for trigger in result.triggers} == {("bad", 2)}
    assert result.scan["bad"][2] > 0.9
    assert max(result.scan["good"].values()) < 0.9


def test_collapse_is_noticed_and_rolled_back():
    base, models, heads, data = family(spread=0.5)
    for head in heads.values():
        nn.init.normal_(head.weight, std=3.0)
    config = DamConfig(
        mask_steps=60, mask_lr=1.0, safety="entropy", safety_source="universal", safety_weight=50.0, masks="single",
        performance="entropy", batch_size=16, collapse=0.95,
    )  # fmt: skip
    result = dam_merge(base, models, data=data, heads=heads, config=config)
    assert len(result.history) < 60
    assert any("collapse at mask step" in warning and "rolled back to step" in warning for warning in result.warnings)


def test_one_model_is_merged_with_a_warning():
    base, models, heads, data = family(1)
    result = dam_merge(base, models, data=data, heads=heads, config=DamConfig(**QUICK))
    assert "one model only" in result.warnings[0]


def test_without_data_nothing_is_made_up():
    base, models, heads, data = family()
    with pytest.raises(DataError, match=r"nothing for task 'task 1'[\s\S]*merge with method task_arithmetic"):
        dam_merge(base, models, data={**data, "task 1": None}, heads=heads)
    with pytest.raises(DataError, match=r"data\['task 1'\] is empty"):
        dam_merge(base, models, data={**data, "task 1": []}, heads=heads, config=DamConfig(safety="none", mask_steps=1))


def test_batch_statistics_in_training_mode_are_refused():
    base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    data = {"a": torch.randn(4, 3)}
    with pytest.raises(LearningError, match=r"1: batch normalisation in training mode.*base\.eval\(\)"):
        dam_merge(base, {"a": copy.deepcopy(base)}, data=data, heads={"a": nn.Linear(3, 2)})


def test_heads_inside_the_merged_weights_are_refused():
    base, models, heads, data = family()
    heads["task 0"] = base.out
    with pytest.raises(LearningError, match=r"out\.weight: the head of 'task 0' is inside the merged weights"):
        dam_merge(base, models, data=data, heads=heads)


def test_models_that_do_not_fit_are_named():
    base, models, heads, data = family()
    broken = dict(models["task 0"].named_parameters())
    state = {name: tensor.detach() for name, tensor in broken.items() if name != "norm.bias"}
    state["out.weight"] = state["out.weight"][:2]
    with pytest.raises(MismatchError) as caught:
        dam_merge(base, {**models, "task 0": state}, data=data, heads=heads)
    assert "norm.bias: in the base, not in the model of task 'task 0'" in str(caught.value)
    assert "out.weight: task 'task 0' has [2, 144], the base has [8, 144]" in str(caught.value)
    with pytest.raises(UsageError, match="expected the encoder as a torch module"):
        dam_merge(base.state_dict(), models, data=data, heads=heads)


def test_every_wrong_setting_is_listed():
    with pytest.raises(ParameterError) as caught:
        DamConfig(safety="maybe", mask_lr=0, collapse=1.5, inversion_size=2, batch_size=0, safety_weight=-1)
    text = str(caught.value)
    for part in (
        "safety: 'maybe' is not one of 'consistency', 'entropy', 'none'",
        "mask_lr: 0 is not positive",
        "collapse: 1.5 is not in [0, 1)",
        "inversion_size: 2 is not in (0, 1)",
        "batch_size: 0 is less than 1",
        "safety_weight: -1 is negative",
    ):
        assert part in text
    with pytest.raises(ParameterError, match="the published loop has 'single' only"):
        DamConfig(compat="published", masks="dual")
    with pytest.raises(ParameterError, match="coefficients have shape"):
        merge(base_merge=[0.5, 0.5])
    with pytest.raises(ParameterError, match=r"'nothing\.\*' matches no parameter"):
        merge(exclude=["nothing.*"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_steps": "x"}, "mask_steps: 'x' is not a whole number"),
        ({"mask_steps": 1.5}, "mask_steps: 1.5 is not a whole number"),
        ({"lam0": float("nan"), "mask_lr": float("inf")}, "lam0: nan is not a finite number(.|\n)*mask_lr: inf is not"),
        ({"base_merge": [0.5, float("nan"), 0.1]}, "base_merge: coefficients must be finite numbers"),
        ({"known_triggers": {"task 9": []}}, "known_triggers: there is no task 'task 9'. Did you mean 'task ."),
        ({"noise": [{}] * 3}, "noise: draw 0 has none for conv.weight"),
        ({"noise": [{"conv.weight": torch.rand(2)}] * 3}, r"draw 0 has \[2\] for conv.weight, expected \[4, 1, 3, 3\]"),
    ],
    ids=str,
)
def test_settings_that_fit_nothing_are_refused_before_any_step(changes, words):
    with pytest.raises(ParameterError, match=words):
        merge(**changes)


@pytest.mark.parametrize(
    ("part", "value", "kind", "words"),
    [
        ("data", torch.randn(40, 1, 5, 5), DataError, "the encoder or its head cannot take these inputs .*multiplied"),
        ("data", torch.randn(0, 1, 6, 6), DataError, "is empty"),
        ("data", iter([torch.randn(4, 1, 6, 6)]), DataError, "has a generator, which can be read once"),
        ("heads", torch.randn(3, 5), DataError, "the encoder or its head cannot take these inputs"),
        ("models", None, UsageError, "has a NoneType; expected a module, a state dict, a path or a task vector"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_with_its_task(part, value, kind, words):
    base, models, heads, data = family()
    {"data": data, "heads": heads, "models": models}[part]["task 1"] = value
    with pytest.raises(kind, match=words) as caught:
        dam_merge(base, models, data=data, heads=heads, config=DamConfig(**QUICK))
    assert "task 1" in str(caught.value)


def test_lists_and_devices_that_are_none_are_refused():
    base, models, heads, data = family()
    with pytest.raises(UsageError, match="models: got a list; expected task to model"):
        dam_merge(base, list(models.values()), data=data, heads=heads)
    with pytest.raises(UsageError, match="heads: got a list; expected task to head"):
        dam_merge(base, models, data=data, heads=list(heads.values()))
    with pytest.raises(UsageError, match="'nowhere' is not a device"):
        dam_merge(base, models, data=data, heads=heads, device="nowhere")


def test_a_model_that_is_the_base_is_warned_about():
    base, models, heads, data = family()
    models["task 2"] = copy.deepcopy(base)
    said = dam_merge(base, models, data=data, heads=heads, config=DamConfig(**QUICK)).warnings
    assert any("the model of task 'task 2' equals the base everywhere" in line for line in said)


def test_double_precision_stays_double():
    base, models, heads, data = family()
    wide = [part.double() for part in (base, *models.values(), *heads.values())]
    result = dam_merge(
        wide[0], models, data={t: x.double() for t, x in data.items()}, heads=heads, config=DamConfig(**QUICK)
    )
    own, first = dict(base.named_parameters()), [dict(m.named_parameters()) for m in models.values()]
    again = masked_merge(
        {n: p.detach() for n, p in own.items()},
        [{n: (m[n] - own[n]).detach() for n in own} for m in first],
        result.coefficients.double(),
        result.masks,
    )
    close({n: result.state_dict[n] for n in own}, again, rtol=1e-14, atol=1e-14)


def test_text_is_perturbed_where_its_tokens_are_embedded():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    base = BertModel(config).eval()
    models, heads, data = {}, {}, {}
    for task in ("a", "b"):
        models[task] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in models[task].parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        heads[task] = nn.Linear(16, 3)
        ids = torch.randint(0, 50, (24, 8))
        data[task] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for source in ("inversion", "universal"):
        result = dam_merge(
            base, models, data=data, heads=heads,
            config=DamConfig(**QUICK, safety_source=source, norm="l2", budget=1.0),
        )  # fmt: skip
        assert len(result.history) == 3
        assert any(found.kind == "tokens" for found in result.triggers) == (source == "inversion")
