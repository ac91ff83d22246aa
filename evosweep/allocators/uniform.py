"""The same level everywhere."""

from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem


class Uniform:
    """The highest level that all units can share within the budget."""

    columns = ()

    def allocate(self, problem: Problem) -> Genome:
        """Return it; what it leaves of the budget stays unspent, as users of uniform settings leave it.

        Raises:
            SettingError: Only dropping everything treats all units alike.
        """
        genome = problem.uniform()
        if not problem.cost(genome):
            raise SettingError(
                "sampler", allowed="block_influence, leave_one_out, random or evopress where units are dropped",
                got="uniform",
            )
        return genome
