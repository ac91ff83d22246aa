"""Parts of a search as trials of an Optuna study of their own, so that every storage of Optuna can share them out.

A part that waits is a trial in state WAITING. Claiming it sets RUNNING, which the storage grants to one process alone;
COMPLETE and FAIL are final, and a storage refuses to change such a trial. Those three are all that the protocol needs.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from evosweep.search.sharing import DONE, RUNNING, VOID, WAITING, Entry, Part

SUFFIX = " (parts)"  # behind the study's name
SEARCH = "search"  # attribute of the study: what a worker must know of the search
WORKER = "worker "  # before the name of a worker, as an attribute of the study
PART = "part"  # attributes of a trial
HOLDER = "holder"
BEAT = "beat"
RESULT = "result"
REASON = "reason"
STATES = {TrialState.WAITING: WAITING, TrialState.RUNNING: RUNNING, TrialState.COMPLETE: DONE}
UNFINISHED = (TrialState.WAITING, TrialState.RUNNING)


class StudyQueue:
    """The queue of one search; see ``evosweep.search.sharing.WorkQueue``.

    Args:
        storage: Of the search's study.
        study: Name of that study; the parts are in another one beside it.
        create: Whether to make it if it is not there.

    Raises:
        KeyError: It is not there.
    """

    def __init__(self, *, storage: BaseStorage, study: str, create: bool = False) -> None:
        self.storage = storage
        self.name = study + SUFFIX
        if create:
            try:
                self._study = storage.create_new_study([StudyDirection.MINIMIZE], self.name)
                return
            except DuplicatedStudyError:
                pass
        self._study = storage.get_study_id_from_name(self.name)

    @property
    def search(self) -> Mapping[str, Any] | None:
        """What the search has written about itself; None before that, and when it is over."""
        found: Mapping[str, Any] | None = self._attributes().get(SEARCH)
        return found

    def _attributes(self) -> dict[str, Any]:
        """Return the attributes of the study; none of a closed queue."""
        try:
            return self.storage.get_study_user_attrs(self._study)
        except KeyError:
            return {}

    def describe(self, search: Mapping[str, Any]) -> None:
        """Write what a worker must know of the search, JSON values."""
        self.storage.set_study_user_attr(self._study, SEARCH, dict(search))

    def publish(self, part: Part) -> int:
        """Add a part that waits; return its ticket."""
        trial = create_trial(state=TrialState.WAITING, user_attrs={PART: part.dump()})
        return self.storage.create_new_trial(self._study, template_trial=trial)

    def unfinished(self) -> list[Entry]:
        """Return the entries that wait or run, in the order in which they were published; none of a closed queue."""
        return self._entries(UNFINISHED)

    def known(self) -> list[Entry]:
        """Return all entries."""
        return self._entries(None)

    def _entries(self, states: tuple[TrialState, ...] | None) -> list[Entry]:
        try:
            trials = self.storage.get_all_trials(self._study, deepcopy=False, states=states)
        except KeyError:
            return []
        return [_entry(trial) for trial in trials if PART in trial.user_attrs]

    def entry(self, ticket: int) -> Entry:
        """Return one entry."""
        return _entry(self.storage.get_trial(ticket))

    def claim(self, ticket: int) -> bool:
        """Take a part that waits; return False if another process has it."""
        try:
            return self.storage.set_trial_state_values(ticket, TrialState.RUNNING)
        except (UpdateFinishedTrialError, KeyError):
            return False

    def beat(self, ticket: int, holder: str, beat: int) -> bool:
        """Write a sign of life, the holder's name at first; return False if the part is not the caller's any more.

        Args:
            ticket: Of the part.
            holder: Name of the process that scores it.
            beat: 0, 1, 2 ...
        """
        return self._written(ticket, BEAT if beat else HOLDER, beat or holder)

    def finish(self, ticket: int, result: Mapping[str, Any]) -> bool:
        """Deliver a result; return False if it comes too late, and is dropped.

        The part is done when the result is there; that its trial is complete follows a moment later.
        """
        return self._written(ticket, RESULT, dict(result)) and self._ended(ticket, TrialState.COMPLETE)

    def void(self, ticket: int, reason: str) -> bool:
        """End a claim without a result; return False if the part is done or void already."""
        return self._written(ticket, REASON, reason) and self._ended(ticket, TrialState.FAIL)

    def _written(self, ticket: int, key: str, value: Any) -> bool:
        try:
            self.storage.set_trial_user_attr(ticket, key, value)
        except (UpdateFinishedTrialError, KeyError):
            return False
        return True

    def _ended(self, ticket: int, state: TrialState) -> bool:
        try:
            return self.storage.set_trial_state_values(ticket, state)
        except (UpdateFinishedTrialError, KeyError):
            return False

    def join(self, worker: str) -> None:
        """Add a worker to those that have joined; does nothing where the search is over."""
        with suppress(KeyError):
            self.storage.set_study_user_attr(self._study, WORKER + worker, True)

    def leave(self, worker: str) -> None:
        """Remove a worker; does nothing where the search is over."""
        if not self.closed():
            with suppress(KeyError):
                self.storage.set_study_user_attr(self._study, WORKER + worker, False)

    def workers(self) -> list[str]:
        """Return the names of the workers that have joined and not left."""
        found = self._attributes().items()
        return [key.removeprefix(WORKER) for key, here in found if key.startswith(WORKER) and here]

    def closed(self) -> bool:
        """Return whether the search is over: its parts are removed then."""
        try:
            self.storage.get_study_name_from_id(self._study)
        except KeyError:
            return True
        return False

    def close(self) -> None:
        """End the search for all workers: remove the parts."""
        self.storage.delete_study(self._study)


def _entry(trial: FrozenTrial) -> Entry:
    attributes = trial.user_attrs
    state = STATES.get(trial.state, VOID)
    return Entry(
        ticket=trial._trial_id,
        part=Part.load(attributes[PART]),
        state=DONE if state == RUNNING and RESULT in attributes else state,
        holder=attributes.get(HOLDER, ""),
        beat=attributes.get(BEAT, 0),
        result=attributes.get(RESULT),
        reason=attributes.get(REASON, ""),
    )
