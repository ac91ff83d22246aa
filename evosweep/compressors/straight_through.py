"""AdaQuant's own way of learning (Hubara et al., arXiv 2006.10518, equation 2): gradients through the rounding.

W' = W + V, the scales and the zeros are continuous and descend on ‖(W − Q(W'))X‖² with Adam; the rounding's derivative
is taken to be one inside the range of the codes and zero outside.
"""

import torch

from evosweep.compressors.rounding import Learned, Rounding, Target

MOMENTS = (0.9, 0.999)  # Adam's
EPSILON = 1e-12
RATES = {"codes": 0.03, "scale": 1e-3, "zero": 0.01}  # a step: of a code, of the logarithm of a scale, of a code


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) without autograd's graph, on one tensor.

    Args:
        like: A tensor of the shape of what is learned.
        rate: Size of a step.
    """

    def __init__(self, like: torch.Tensor, *, rate: float) -> None:
        self.rate = rate
        self.mean = torch.zeros_like(like)
        self.square = torch.zeros_like(like)
        self.count = 0

    def step(self, gradient: torch.Tensor, *, share: float) -> torch.Tensor:
        """Return the change to be added, with ``share`` of the full rate."""
        self.count += 1
        first, second = MOMENTS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (self.square / (1 - second**self.count)).sqrt_().add_(EPSILON)
        return (self.mean / size).mul_(-share * self.rate / (1 - first**self.count))


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
    adams = {
        name: Adam(like, rate=RATES[name]) for name, like in (("codes", middle), ("scale", log_scale), ("zero", zero))
    }
    best = rounding.clone()
    least = torch.full_like(rounding.top, torch.inf)
    for step in range(steps + 1):
        codes = middle.round().clamp_(min=0).minimum(rounding.top)
        now = Rounding(codes, learned.stored(log_scale.exp()), zero.round(), rounding.top)
        difference = target.weight - now.values()
        pull = gram @ difference  # −½ of the derivative by Ŵ
        loss = (difference * pull).sum(dim=0)
        best.take(now, loss < least)
        least = torch.minimum(least, loss)
        share = 1 - step / max(1, steps)
        by_group = pull.unflatten(0, (-1, group))
        if learned.scales:
            offset = (codes.unflatten(0, (-1, group)) - now.zero[:, None]) * now.scale[:, None]
            log_scale += adams["scale"].step(-(by_group * offset).sum(dim=1), share=share)
        if learned.scales and learned.zeros:
            zero += adams["zero"].step((by_group.sum(dim=1) * now.scale), share=share)
            zero.clamp_(min=0).copy_(torch.minimum(zero, rounding.top))
        if learned.rounding:
            slope = (by_group * -now.scale[:, None]).flatten(0, 1)
            inside = (middle > -0.5) & (middle < rounding.top + 0.5)
            middle += adams["codes"].step(torch.where(inside, slope, 0.0), share=share)
    return best
