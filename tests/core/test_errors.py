import pickle

from evosweep.core.errors import SettingError


def test_an_error_says_the_same_in_another_process() -> None:
    error = SettingError("seed", allowed=["one", "two"], got="twoo", hint="or three")
    same = pickle.loads(pickle.dumps(error))
    assert type(same) is SettingError and str(same) == str(error) and same.setting == "seed"
