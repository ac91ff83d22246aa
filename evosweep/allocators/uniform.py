"""The same level everywhere."""

from evosweep.core.problem import Genome, Problem


class Uniform:
    """The highest level that all units can share within the budget."""

    columns = ()

    def allocate(self, problem: Problem) -> Genome:
        """Return it; what it leaves of the budget stays unspent, as users of uniform settings leave it."""
        return problem.uniform()
