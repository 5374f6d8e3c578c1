"""Task vectors of comparable length."""

from torch import Tensor

from merging.method import Number, merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.moments import sums
from taskvec.plan import Plan, Report, formula


@merge_method("equalize", paper="arXiv:2505.16148", role="preprocess", passes=2)
def equalize(deltas: Deltas, *, norm_power: Number = -1.0) -> Plan:
    """Scale each task vector by a power of its norm, so that none drowns the others.

    Args:
        norm_power: p in w_t = ‖τ_t‖^p / mean_s ‖τ_s‖^p. -1 gives all the same length, their harmonic mean (NAN); 0
            changes nothing; a positive power favours the long ones (FroM, arXiv:2506.02478).

    Norms are the whole model's, or each tensor's with `statistics: tensor`. A task vector of zero stays zero and does
    not count in the mean. Passes: 1 for the norms, 1 to merge.
    """

    @formula("energies", least=0.0, shape=(len(deltas.tasks),))
    def energies(tile: Tile) -> Tensor:
        return tile.stack.double().square().sum(1)

    squares = yield from sums(energies)
    norms = squares.sqrt().tolist()
    powers = [norm**norm_power if norm > 0 else 0.0 for norm in norms]
    there = [power for power in powers if power > 0]
    mean = sum(there) / len(there) if there else 1.0
    factors = [power / mean for power in powers]
    yield Report({"norm": dict(zip(deltas.tasks, norms)), "factor": dict(zip(deltas.tasks, factors))})

    @formula("factors", factors=factors)
    def kernel(tile: Tile) -> Tensor:
        stack = tile.stack.clone()
        for row, factor in zip(stack, factors):
            row.mul_(factor)
        return stack

    return kernel
