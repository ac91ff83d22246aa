import pytest

from evosweep.tracking.naming import distinct_names, run_name, run_params, varied_values


def test_names_say_what_varies_once() -> None:
    varied = {"sampler": "evopress", "seed": "1", "budget.as_uniform": "3", "search.max_flips": "4"}
    name = run_name(model="/models/Qwen2.5-7B", sampler="evopress", budget="as_uniform=3", seed=1, varied=varied)
    assert name == "Qwen2.5-7B evopress as_uniform=3 s1 max_flips=4"
    assert run_name(model="tiny", sampler="ilp", budget="sparsity=0.5", seed=0) == "tiny ilp sparsity=0.5 s0"


def test_a_run_has_six_to_ten_params() -> None:
    groups = ("model", "data", "compressor", "drop", "sampler", "fitness", "search", "export", "tracking", "storage")
    choices = {group: f"{group}_choice" for group in groups} | {"drop": "none", "transform": "rotate"}
    params = run_params(choices=choices, model="tiny", budget="as_uniform=3", seed=4, varied={"search.max_flips": "2"})
    assert params["search.max_flips"] == "2" and params["search"] == "search_choice" and params["seed"] == "4"
    assert (
        params["model"] == "tiny"
        and "drop" not in params
        and params["transform"] == "rotate"
        and 6 <= len(params) <= 10
    )


def test_a_job_s_own_values_of_what_varies() -> None:
    typed = ["model=tiny", "+search.max_flips=3", "seed=1"]
    assert varied_values(typed, ["search.max_flips", "seed", "sampler"]) == {"search.max_flips": "3", "seed": "1"}


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["tiny ilp b=3 s0", "tiny owl b=3 s0"], ["ilp", "owl"]),
        (["tiny ilp b=3 s0", "tiny ilp b=3 s1"], ["ilp s0", "ilp s1"]),
        (["tiny ilp b=3 s0"], ["tiny ilp b=3 s0"]),
    ],
)
def test_tables_leave_out_what_all_names_share(names: list[str], short: list[str]) -> None:
    assert distinct_names(names) == short
