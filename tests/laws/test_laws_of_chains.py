"""Laws of every chain preprocess, method, postprocess that makes sense: task order, scaling, tiles and threads.

Which chains make sense: steps go with methods on differences to a base. Every pair of a preprocess and a method is tried,
each with the postprocess methods in turn, so that every pair of two roles comes about.
"""

import itertools

import pytest
import torch

from merging import merge_stacks
from merging.method import methods
from taskvec.sweep import Options

CATALOGUE = methods()
REQUIRED = {
    "nearswap": {"distance": 0.4},
    "lines": {"slope": 0.5},
    "subspace_boosting": {"share": 0.5},
    "wudi": {"steps": 5},
}
# in the catalogue's own laws, with their reasons: what depends on the order of tasks, or does not scale with its input
ORDERED = {"nearswap", "slerp", "nuslerp", "arcee_fusion", "passthrough"}
# a flat spectrum has no directions of its own, so what SVC does to each of them follows the rounding
ILL_POSED = {("iso_c", "svc"), ("iso_cts", "svc")}
NOT_HOMOGENEOUS = {"pcb", "ram", "ramplus_tl", "nearswap", "arcee_fusion", "wudi"}
LAYERS = {"layers.0.w": (6, 9), "layers.1.w": (9, 6), "layers.1.bias": (40_001,), "head.conv": (3, 2, 2)}


def of_role(*roles):
    return [n for n, m in CATALOGUE.items() if m.role in roles and m.data != "statistics" and m.space == "delta"]


PREPROCESS, POSTPROCESS = of_role("preprocess"), of_role("postprocess")
PAIRS = list(itertools.product([None, *PREPROCESS], of_role("combine")))
CHAINS = [(before, name, [None, *POSTPROCESS][at % (len(POSTPROCESS) + 1)]) for at, (before, name) in enumerate(PAIRS)]
# and every preprocess with every postprocess, around the plain sum
CHAINS += [(before, "task_arithmetic", after) for before, after in itertools.product(PREPROCESS, POSTPROCESS)]
CHAINS = sorted(set(CHAINS), key=str)


def step(name):
    return {"method": name, **REQUIRED.get(name, {})}


def run(chain, stacks, **options):
    before, name, after = chain
    generator = torch.Generator().manual_seed(99)
    base = {key: torch.randn(stack.shape[1:], generator=generator) for key, stack in stacks.items()}
    return merge_stacks(
        name,
        stacks,
        base=base,
        preprocess=[step(before)] if before else [],
        postprocess=[step(after)] if after else [],
        **REQUIRED.get(name, {}),
        **options,
    )


def stacks_of(name, scale=1.0):
    least, most = CATALOGUE[name].tasks
    count = max(least, min(3, most or 3))
    generator = torch.Generator().manual_seed(3)
    return {key: scale * torch.randn(count, *shape, generator=generator) for key, shape in LAYERS.items()}


def told(chain):
    return "-".join(part or "none" for part in chain)


@pytest.mark.parametrize("chain", CHAINS, ids=told)
def test_a_chain_keeps_the_laws_of_its_parts(chain):
    stacks = stacks_of(chain[1])
    labels = ["a", "b", "c"][: len(next(iter(stacks.values())))]
    found = run(chain, stacks, tasks=labels)
    for name, value in found.items():
        assert value.shape == stacks[name].shape[1:]
        assert torch.isfinite(value).all()
    assert any(bool(value.any()) for value in found.values())
    # tiles and threads change no bit
    other = run(chain, stacks, tasks=labels, options=Options(tile=1 << 15, workers=3))
    assert all(torch.equal(value, other[name]) for name, value in found.items())
    if chain[1:] in ILL_POSED:
        return
    if not ORDERED & set(chain):
        back = run(chain, {name: stack.flip(0) for name, stack in stacks.items()}, tasks=labels[::-1])
        for name, value in found.items():
            torch.testing.assert_close(back[name], value, atol=1e-4, rtol=1e-4)
    if not NOT_HOMOGENEOUS & set(chain):
        scaled = run(chain, {name: 4 * stack for name, stack in stacks.items()}, tasks=labels)
        for name, value in found.items():
            torch.testing.assert_close(scaled[name], 4 * value, atol=4e-4, rtol=1e-4)
        halved = run(chain, stacks, tasks=labels, scale=0.5)
        if chain[2] is None:
            assert all(torch.equal(0.5 * value, halved[name]) for name, value in found.items())
