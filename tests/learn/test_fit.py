"""The training loop: what it promises about accumulation, resuming, stopping, processes and wrong inputs."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from merging.learn.composition import Composition
from merging.learn.fit import AdamWSpec, Constraint, fit, shard
from merging.learn.objectives import UFM, CausalLM, Entropy, MultiTask, Negation, Penalty, Supervised, trusted_examples
from taskvec.errors import CorruptFileError, DataError, LearningError, MismatchError, UsageError


def made(seed=0, dtype=torch.float32, tasks=2, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    vectors = {
        f"t{t}": {n: 0.5 * torch.randn(p.shape, generator=generator, dtype=dtype) for n, p in model.named_parameters()}
        for t in range(tasks)
    }
    return Composition(model, vectors, **options)


def data(count=6, rows=8, seed=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, 4, generator=generator, dtype=dtype),
            torch.randint(3, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


def test_accumulated_batches_equal_one_large_batch():
    small = data(4, 4, dtype=torch.float64)
    large = [
        (torch.cat([small[i][0], small[i + 1][0]]), torch.cat([small[i][1], small[i + 1][1]])) for i in range(0, 4, 2)
    ]
    one, two, held = (made(dtype=torch.float64) for _ in range(3))
    fit(one, Supervised(), small, accumulate=2, epochs=3)
    fit(held, Supervised(), small, accumulate=2, epochs=3, hold=True)
    fit(two, Supervised(), large, epochs=3)
    torch.testing.assert_close(one.coefficients, two.coefficients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.coefficients, held.coefficients, rtol=1e-10, atol=1e-12)


def test_normalised_clipping_does_not_see_the_scale_of_the_loss():
    runs = []
    for scale in (1.0, 10.0):
        composition = made(dtype=torch.float64)
        fit(
            composition,
            lambda model, batch, scale=scale: scale * cross_entropy(model(batch[0]), batch[1]),
            data(dtype=torch.float64),
            clip_mode="normalized",
        )
        runs.append(composition.coefficients)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)


def test_the_best_evaluation_is_kept_and_the_base_comes_back():
    composition = made()
    base = {name: p.detach().clone() for name, p in composition.model.named_parameters()}
    scores = iter([0.1, 0.5, 0.9, 0.2, 0.3, 0.1, 0.0])
    seen = []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(composition.coefficients.clone())
        return next(scores)

    run = fit(composition, Supervised(), data(), epochs=6, evaluate=evaluate, patience=3)
    assert run.best["metrics"]["score"] == 0.9
    assert torch.equal(composition.coefficients, seen[2])
    assert run.stopped == "no improvement in 3 evaluations"
    assert len(run.evaluations) == 6
    for name, parameter in composition.model.named_parameters():
        assert torch.equal(parameter, base[name])


def test_the_initial_coefficients_win_where_nothing_is_better():
    composition = made(coefficients=0.25)
    run = fit(
        composition, Supervised(), data(), evaluate=lambda model: -float(abs(composition.coefficients - 0.25).sum())
    )
    assert run.best["step"] == 0
    assert torch.equal(composition.coefficients, torch.full_like(composition.coefficients, 0.25))


def test_constraints_hold_after_every_step():
    for constraint, holds in (
        (Constraint(low=0.0, high=0.02), lambda c: (c >= 0).all() and (c <= 0.02).all()),
        (Constraint(low=0.0), lambda c: (c >= 0).all()),
        (Constraint(sum_to_one=True), lambda c: torch.allclose(c.sum(0), torch.ones(c.shape[1]))),
        (
            Constraint(low=0.0, sum_to_one=True),
            lambda c: torch.allclose(c.sum(0), torch.ones(c.shape[1])) and (c >= 0).all(),
        ),
    ):
        composition = made(tasks=3)
        seen = []
        fit(
            composition, Supervised(), data(), constraint=constraint, every=1, keep="last",
            evaluate=lambda model, c=composition, seen=seen: seen.append(c.coefficients.clone()) or 0.0,
        )  # fmt: skip
        assert len(seen) > 4
        assert all(holds(c) for c in seen)


def test_simplex_projection_finds_the_nearest_point():
    point = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected = point.clone()
    Constraint(low=0.0, sum_to_one=True).project_(projected)
    others = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((200, 50)).permute(0, 2, 1)
    assert ((others - point).norm(dim=1) >= (projected - point).norm(dim=0) - 1e-12).all()


def test_frozen_coefficients_stay_and_their_blocks_make_no_gradient():
    composition = made(coefficients=0.3)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 0] = True
    mask[1, 2] = True
    touched = set()
    for name, parameter in composition.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: touched.add(name))
    fit(composition, Supervised(), data(), frozen=mask, penalty=Penalty(0.5, 2))
    assert torch.equal(composition.coefficients[mask], torch.full((3,), 0.3))
    assert (composition.coefficients[~mask] != 0.3).all()
    assert touched == {"0.bias", "3.weight", "3.bias"}


def test_negation_stops_when_control_falls_below_its_floor():
    composition = made(tasks=1)
    objective = Negation(Supervised(), Supervised(), floor=0.95)
    batches = [{"target": a, "control": b} for a, b in zip(data(4), data(4, seed=9), strict=True)]
    metrics = iter([(0.8, 1.0), (0.5, 0.97), (0.4, 0.96), (0.1, 0.90), (0.0, 1.0)])

    def evaluate(model):
        target, control = next(metrics)
        return {"target": target, "control": control}

    run = fit(composition, objective, batches, epochs=9, evaluate=evaluate, optimizer=AdamWSpec(lr=5e-3))
    assert run.stopped == "a metric fell below its floor"
    assert run.best["metrics"] == {"target": 0.4, "control": 0.96}
    assert len(run.evaluations) == 4
    first = run.history[1]["terms"]
    assert run.losses[0] == pytest.approx(first["control"] - first["target"], rel=1e-5)


def test_entropy_falls_without_labels():
    composition = made(coefficients=0.3)
    run = fit(
        composition, Entropy(), [x for x, _ in data()], epochs=8, optimizer=AdamWSpec(0.05, 0.0), schedule="constant"
    )
    assert run.losses[-1] < 0.7 * run.losses[0]


def test_ufm_learns_from_two_views_and_skips_steps_without_a_sure_row():
    composition = made()
    pool = torch.cat([x for x, _ in data(4)])
    objective = UFM([pool], threshold=(0.5, 0.6))

    def batches(epoch):
        for index in objective.index_batches(8, seed=1, epoch=epoch):
            yield {"index": index, "weak": pool[index], "strong": pool[index] + 0.1}

    run = fit(composition, objective, batches, epochs=3, schedule="constant")
    assert objective.threshold == pytest.approx(0.5 + 0.1 * 2 / 3)
    assert run.steps >= 6
    assert run.losses[-1] < run.losses[0]
    before = composition.coefficients.clone()
    unsure = UFM([pool], threshold=(1.5, 1.5))
    run = fit(composition, unsure, lambda epoch: [{"index": torch.arange(8), "weak": pool[:8], "strong": pool[:8]}],
              schedule="constant")  # fmt: skip
    assert [record.get("skipped") for record in run.history] == ["no row counts"]
    assert torch.equal(composition.coefficients, before)


def test_trusted_examples_are_the_most_confident_of_each_predicted_class():
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8], [0.55, 0.45]])
    assert trusted_examples(probabilities, limit=2).tolist() == [True, True, False, True, True, False]
    assert trusted_examples(probabilities[:1]).tolist() == [True]  # N / C rounds to none, and one is taken
    assert trusted_examples(probabilities, compat="released").all()


def test_trusted_rows_make_a_quarter_of_every_batch():
    objective = UFM([torch.zeros(1)])
    objective.trusted = torch.arange(100) < 10
    seen = list(objective.index_batches(16, seed=0))
    assert sorted(i for batch in seen for i in batch.tolist() if i >= 10) == list(range(10, 100))
    assert all((batch < 10).sum() == 4 for batch in seen)
    objective.trusted = torch.ones(20, dtype=torch.bool)
    assert sorted(i for batch in objective.index_batches(8) for i in batch.tolist())[:20]


def test_causal_lm_ignores_padding_and_matches_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(20, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    (term,) = CausalLM().terms(model, {"input_ids": ids, "attention_mask": mask})
    wanted = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(term.total / term.number, wanted)
    assert int(term.number) == 16


# -- resuming ----------------------------------------------------------------------------------------------------------


def interrupted(composition, stop_at, **options):
    def progress(record):
        if record.get("step") == stop_at and "loss" in record:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(composition, Supervised(), data(), progress=progress, **options)


@pytest.mark.parametrize("every", [None, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, every):
    options = {"epochs": 3, "accumulate": 2, "every": every, "checkpoint_every": every, "seed": 5}
    evaluate = lambda c: lambda model: float(-((c.coefficients.sum() - 0.1) ** 2))  # noqa: E731
    whole = made()
    whole.model.train()  # dropout is on: the random numbers have to come back as well
    wanted = fit(whole, Supervised(), data(), evaluate=evaluate(whole), **options)
    half = made()
    half.model.train()
    interrupted(half, 5, evaluate=evaluate(half), checkpoint=tmp_path / "state", **options)
    again = made()
    again.model.train()
    resumed = fit(again, Supervised(), data(), evaluate=evaluate(again), checkpoint=tmp_path / "state", **options)
    assert torch.equal(again.coefficients, whole.coefficients)
    assert resumed.losses == wanted.losses
    assert resumed.best == wanted.best


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint_and_goes_on(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time, torch
            from torch import nn
            from merging.learn.composition import Composition
            from merging.learn.fit import fit
            from merging.learn.objectives import Supervised

            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
            vectors = {t: {n: torch.randn_like(p) for n, p in model.named_parameters()} for t in "ab"}
            batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
            composition = Composition(model, vectors)
            slow = len(sys.argv) > 2

            def progress(record):
                print(record["step"], flush=True)
                time.sleep(0.02 if slow else 0)

            run = fit(composition, Supervised(), batches, epochs=10, checkpoint=sys.argv[1], checkpoint_every=1, progress=progress)
            print("coefficients", composition.coefficients.flatten().tolist(), len(run.losses))
            """
        )
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    state = str(tmp_path / "state")
    process = subprocess.Popen(
        [sys.executable, str(script), state, "slow"], stdout=subprocess.PIPE, text=True, env=environment
    )
    for line in process.stdout:
        if int(line) >= 12:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    process.stdout.close()
    process.wait()
    resumed = subprocess.run(
        [sys.executable, str(script), state], capture_output=True, text=True, env=environment, check=True
    )
    whole = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "other")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
    assert len(resumed.stdout.splitlines()) < 45 < len(whole.stdout.splitlines())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(made(), Supervised(), data(), checkpoint=tmp_path / "state")
    with pytest.raises(MismatchError, match="belongs to another run"):
        fit(made(), Supervised(), data(), checkpoint=tmp_path / "state", seed=1)
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(CorruptFileError, match="not the state of a learning run"):
        fit(made(), Supervised(), data(), checkpoint=tmp_path / "state")


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from torch import nn
            from merging.learn.composition import Composition
            from merging.learn.fit import fit
            from merging.learn.objectives import MultiTask, Supervised, Entropy

            torch.set_num_threads(1)
            if len(sys.argv) > 2:
                torch.distributed.init_process_group("gloo")
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
            vectors = {t: {n: torch.randn_like(p) for n, p in model.named_parameters()} for t in "ab"}
            # 7 rows do not divide by two, and -100 is ignored: the counts differ between ranks
            labels = torch.randint(3, (4, 7))
            labels[:, 5:] = -100
            batches = [
                {"one": (torch.randn(7, 4).double(), labels[i]), "two": torch.randn(6, 4).double()} for i in range(4)
            ]
            composition = Composition(model, vectors)
            run = fit(composition, MultiTask({"one": Supervised(), "two": Entropy()}), batches, epochs=3, accumulate=2)
            if len(sys.argv) < 3 or torch.distributed.get_rank() == 0:
                torch.save((composition.coefficients, run.losses), sys.argv[1])
            if len(sys.argv) > 2:
                torch.distributed.destroy_process_group()
            """
        )
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path / "one")], check=True, env=environment)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path / "two"), "ranks"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, losses = torch.load(tmp_path / "one", weights_only=True)
    two, shared = torch.load(tmp_path / "two", weights_only=True)
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)
    assert shared == pytest.approx(losses, rel=1e-10)


def test_a_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(DataError, match="A batch of 1 rows cannot be shared by 2 processes"):
        shard(torch.zeros(1, 3), 0, 2)
    pieces = [shard({"a": torch.arange(5), "b": (torch.arange(4),)}, r, 2) for r in range(2)]
    assert torch.cat([p["a"] for p in pieces]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([p["b"][0] for p in pieces]).tolist() == [0, 1, 2, 3]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_ends_the_run_by_name():
    batches = data()
    batches[2][0][0, 0] = float("nan")
    composition = made()
    base = {name: p.detach().clone() for name, p in composition.model.named_parameters()}
    with pytest.raises(LearningError, match=r"Step 3: the loss is nan .*not finite: one"):
        fit(composition, MultiTask({"one": Supervised()}), [{"one": b} for b in batches])
    for name, parameter in composition.model.named_parameters():
        assert torch.equal(parameter, base[name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "cosin"}, UsageError, "schedule: 'cosin' is not known. Did you mean 'cosine'"),
        ({"clip_mode": "norm"}, UsageError, "clip_mode: 'norm' is not known"),
        ({"precision": "fp32"}, UsageError, "precision: 'fp32' is not known"),
        ({"keep": "best"}, UsageError, "keep: 'best' needs `evaluate`"),
        ({"accumulate": 0}, UsageError, "accumulate: 0; expected at least 1"),
        ({"batches": []}, DataError, "batches: there are none"),
        ({"batches": iter(data(2)), "steps": 5}, DataError, "there are none any more"),
        ({"batches": iter(data(2))}, UsageError, "cosine needs the number of steps"),
        ({"batches": [torch.zeros(3, 4)]}, DataError, "has no labels"),
        (
            {"batches": [(torch.zeros(2, 4), torch.tensor([1, 7]))]},
            DataError,
            "labels 7 are outside the head, which has 3",
        ),
        (
            {"batches": [(torch.zeros(2, 4), torch.tensor([[1], [0]]))]},
            DataError,
            r"labels of shape \[2, 1\] and torch.int64 for \[2\] predictions",
        ),
        (
            {"batches": [(torch.zeros(2, 4), torch.tensor([1.0, 0.0]))]},
            DataError,
            "and torch.float32 for .* expected one whole class number each",
        ),
        ({"evaluate": lambda model: float("nan")}, LearningError, "evaluate returned"),
        ({"frozen": torch.ones(2, 4, dtype=torch.bool)}, UsageError, "every coefficient is frozen"),
        ({"frozen": torch.ones(2, 3, dtype=torch.bool)}, UsageError, r"frozen: torch.bool of shape \[2, 3\]"),
    ],
)
def test_wrong_calls_are_refused(options, error, message):
    options = {"batches": data(2), **options}
    with pytest.raises(error, match=message):
        fit(made(), Supervised(), options.pop("batches"), **options)


def test_a_head_inside_the_composed_weights_is_refused():
    composition = made()
    inner = composition.model[3]
    objective = MultiTask({"first": Supervised(), "second": Supervised(head=inner)})
    with pytest.raises(LearningError, match=r"second: its head is 3\.weight, which the task vectors change"):
        fit(composition, objective, [{"first": b} for b in data()])
    with pytest.raises(LearningError, match="control: its head is"):
        fit(composition, Negation(Supervised(), Supervised(head=inner)), data())


def test_wrong_constraints_and_penalties_are_refused():
    with pytest.raises(UsageError, match="low 1 is above high 0"):
        Constraint(low=1, high=0)
    with pytest.raises(UsageError, match="sum_to_one goes alone"):
        Constraint(low=-1.0, sum_to_one=True)
    with pytest.raises(UsageError, match="penalty: gamma -1, p 1"):
        Penalty(gamma=-1)
    with pytest.raises(UsageError, match="weights: 'a' is not a task"):
        MultiTask({"b": Supervised()}, {"a": 1.0})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_nearly_the_same(precision):
    exact, mixed = made(), made()
    fit(exact, Supervised(), data())
    run = fit(mixed, Supervised(), data(), precision=precision)
    assert all("loss" in record for record in run.history)
    assert float((exact.coefficients - mixed.coefficients).norm() / exact.coefficients.norm()) < 0.1


def test_accuracy_counts_one_label_for_each_prediction():
    from merging.learn.objectives import accuracy

    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    inputs = torch.zeros(4, 4)
    for kind in (torch.int64, torch.int32, torch.uint8):
        assert accuracy(model, [(inputs, torch.tensor([1, 1, 0, 2], dtype=kind))]) == 0.5
    with pytest.raises(DataError, match=r"accuracy: labels of shape \[4, 1\]"):
        accuracy(model, [(inputs, torch.tensor([[1], [1], [0], [2]]))])
