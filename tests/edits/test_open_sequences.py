"""Edits that are optimised together: those that are done leave the batch, and nobody's result depends on the others."""

import pytest
import torch
from torch.testing import assert_close

from merging.edits.optimise import Optimisation, Sequence_, Tail, find_residuals, losses
from merging.edits.site import Site

LONG = Sequence_((11, 12, 13, 14, 22, 31, 40, 41), (7, 8), triggers=2)
SHORT = Sequence_((15, 12), (8,))
MIDDLE = Sequence_((11, 12, 13, 24), (5,))
SOON = Optimisation(steps=40, stop=1.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gptj", "phi3"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_sequence_is_optimised_as_if_it_were_alone(family, layer, tiny):
    site = Site.find(tiny(family), layer)
    together = find_residuals(site, [LONG, SHORT, MIDDLE], SOON)
    alone = [find_residuals(site, [one], SOON)[0] for one in (LONG, SHORT, MIDDLE)]
    assert len({found.steps for found in alone}) > 1  # they do leave at different times
    for one, other in zip(together, alone):
        assert (one.steps, one.greedy) == (other.steps, other.greedy)
        assert one.loss_before == pytest.approx(other.loss_before, rel=1e-4)
        assert one.loss == pytest.approx(other.loss, rel=2e-2, abs=1e-3)
        assert_close(one.residual, other.residual, rtol=5e-2, atol=5e-3 * float(other.residual.norm()))


def test_what_is_found_gives_the_loss_that_is_said(tiny):
    model = tiny("llama")
    site = Site.find(model, 1)
    for sequence, found in zip((SHORT, MIDDLE), find_residuals(site, [SHORT, MIDDLE], SOON)):
        place = len(sequence.prompt) - 1

        def change(output, residual=found.residual, place=place):
            return torch.cat([output[:, :place], output[:, place : place + 1] + residual, output[:, place + 1 :]], 1)

        with site.adding(change):
            ((loss, greedy),) = losses(model, [sequence])
        assert found.greedy
        assert greedy
        assert loss == pytest.approx(found.loss, rel=1e-3)


def test_rows_that_are_done_are_not_computed_any_more(tiny, monkeypatch):
    sizes = []
    logits = Tail.logits

    def counted(tail):
        sizes.append(tuple(tail.ids.shape))
        return logits(tail)

    monkeypatch.setattr(Tail, "logits", counted)
    found = find_residuals(Site.find(tiny("llama"), 1), [LONG, SHORT, MIDDLE], SOON)
    assert sizes[0] == (3, len(LONG.ids))
    for step, (rows, length) in enumerate(sizes):
        still = [one for one, own in zip((LONG, SHORT, MIDDLE), found) if own.steps >= step]
        assert rows == len(still)
        assert length == max(len(one.ids) for one in still)


def test_the_step_is_that_of_adam():
    from merging.edits.optimise import _Open

    generator = torch.Generator().manual_seed(0)
    now = _Open.of([SHORT, LONG], 6, torch.device("cpu"))
    theirs = torch.zeros(3, 6, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.3)
    for step in range(1, 8):
        gradient = torch.randn(3, 6, generator=generator)
        theirs.grad = gradient.clone()
        adam.step()
        now.adam(gradient, step, 0.3)
    assert_close(now.moves, theirs.detach(), rtol=1e-5, atol=1e-6)
    kept = now.only(torch.tensor([False, True]))
    assert torch.equal(kept.moves, now.moves[1:])
    assert torch.equal(kept.square, now.square[1:])
    assert kept.at[0].tolist() == [0, 0]
    assert kept.owners.tolist() == [0, 0]
