"""AdaQuant's own way of learning (Hubara et al., arXiv 2006.10518, equation 2): gradients through the rounding.

W' = W + V, the scales and the zeros are continuous and descend on ‖(W − Q(W'))X‖² with Adam; the rounding's derivative
is taken to be one inside the range of the codes and zero outside.
"""

import torch

from evosweep.compressors.rounding import Learned, Rounding, Target

RATES = {"codes": 0.03, "scale": 1e-3, "zero": 0.01}  # a step: of a code, of the logarithm of a scale, of a code


def learn_by_gradient(rounding: Rounding, target: Target, *, steps: int, learned: Learned) -> Rounding:
    """Return the best codes and grids of some steps, for each row its own best.

    Args:
        rounding: Where to start.
        target: Weights and second moment.
        steps: Of Adam; their size falls linearly to zero.
        learned: What may change.
    """
    gram = target.damped()
    group = rounding.group
    middle = rounding.codes.clone()  # W' in units of codes
    log_scale = rounding.scale.log()
    zero = rounding.zero.clone()
    adam = torch.optim.Adam(
        [
            {"params": [middle], "lr": RATES["codes"]},
            {"params": [log_scale], "lr": RATES["scale"]},
            {"params": [zero], "lr": RATES["zero"]},
        ],
        eps=1e-12,
    )
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    best = rounding.clone()
    least = torch.full_like(rounding.top, torch.inf)
    for _ in range(steps + 1):
        codes = middle.round().clamp_(min=0).minimum(rounding.top)
        now = Rounding(codes, learned.stored(log_scale.exp()), zero.round(), rounding.top)
        difference = target.weight - now.values()
        pull = gram @ difference  # −½ of the derivative by Ŵ
        loss = (difference * pull).sum(dim=0)
        best.take(now, loss < least)
        least = torch.minimum(least, loss)
        by_group = pull.unflatten(0, (-1, group))
        if learned.scales:
            offset = (codes.unflatten(0, (-1, group)) - now.zero[:, None]) * now.scale[:, None]
            log_scale.grad = -(by_group * offset).sum(dim=1)
        if learned.scales and learned.zeros:
            zero.grad = by_group.sum(dim=1) * now.scale
        if learned.rounding:
            inside = (middle > -0.5) & (middle < rounding.top + 0.5)
            middle.grad = torch.where(inside, (by_group * -now.scale[:, None]).flatten(0, 1), 0.0)
        adam.step()
        falling.step()
        zero.clamp_(min=0).copy_(torch.minimum(zero, rounding.top))
    return best
