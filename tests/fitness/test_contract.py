"""The fitnesses that evosweep ships keep their contract."""

from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.fitness.topk_kl import TopKKL
from evosweep.testing import FitnessContract


class TestKL(FitnessContract):
    def make(self) -> Fitness:
        return KL()


class TestPerplexity(FitnessContract):
    zero_for_dense = False

    def make(self) -> Fitness:
        return Perplexity()


class TestTopKKL(FitnessContract):
    def make(self) -> Fitness:
        return TopKKL(k=8)
