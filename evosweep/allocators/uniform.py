"""Uniform: the same level for all units."""

from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem


class Uniform:
    """The highest level that all units can share within the budget."""

    name = "uniform"
    holds_limits = True
    columns = ()

    def check(self, problem: Problem) -> None:
        """Raise a SettingError if the only uniform genome within the budget drops every unit."""
        if not problem.cost(problem.uniform()):
            raise SettingError(
                "",
                owner=self,
                allowed="block_influence, leave_one_out, random or evopress where units are dropped",
                got="uniform",
            )

    def allocate(self, problem: Problem) -> Genome:
        """Return the genome with the same level for all units that fits the budget; bits left over are not spent."""
        return problem.uniform()
