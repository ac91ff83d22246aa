"""The same level everywhere."""

from evosweep.core.errors import SettingError
from evosweep.core.problem import Genome, Problem


class Uniform:
    """The highest level that all units can share within the budget."""

    columns = ()

    def check(self, problem: Problem) -> None:
        """Raise a SettingError where only dropping everything treats all units alike."""
        if not problem.cost(problem.uniform()):
            raise SettingError(
                "",
                owner=self,
                allowed="block_influence, leave_one_out, random or evopress where units are dropped",
                got="uniform",
            )

    def allocate(self, problem: Problem) -> Genome:
        """Return it; what it leaves of the budget stays unspent, as users of uniform settings leave it."""
        return problem.uniform()
