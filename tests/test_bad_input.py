"""Bad input: one clear line, exit code 2, nothing left behind."""

import pytest

from tests.cli import TINY, evosweep, write_corpus


@pytest.fixture(autouse=True)
def corpus(in_tmp):
    write_corpus(in_tmp)
    (in_tmp / "empty.txt").write_text("")
    (in_tmp / "short.txt").write_text("too short")
    (in_tmp / "latin.txt").write_bytes("café ".encode("latin-1") * 100)
    (in_tmp / "folder").mkdir()
    (in_tmp / "linear_free").mkdir()
    return in_tmp


CASES = {
    "misspelt choice": (["sampler=evopres"], "sampler must be one of", "did you mean 'evopress'"),
    "misspelt group": (["smapler=evopress"], "smapler", "did you mean 'sampler'"),
    "misspelt key": (["search.ofspring=4"], "no setting 'search.ofspring'", "did you mean 'search.offspring'"),
    "misspelt top key": (["sead=4"], "no setting 'sead'", "did you mean 'seed'"),
    "unknown experiment": (["+experiment=quikstart"], "experiment must be one of", "did you mean 'quickstart'"),
    "unknown experiment of two": (
        ["+experiment=[sparsity_60,comparee]"],
        "experiment must be one of",
        "did you mean 'compare'",
    ),
    "a multirun by a flag at the end": (["seed=x", "-m"], "seed must be an integer", "(job 1 of 1)"),
    "added unknown key": (["+compressor.grup=8"], "a setting of compressor", "did you mean 'group'"),
    "override that is none": (["search.generations"], "search.generations", ""),
    "budget too small": (
        ["budget=bits_per_weight", "budget.bits_per_weight=1.5"],
        "budget.bits_per_weight must be at least",
        "the most",
    ),
    "budget too small in MB": (
        ["budget=megabytes", "budget.megabytes=0.01"],
        "budget.megabytes must be at least",
        "MB",
    ),
    "budget no number": (["budget=bits_per_weight", "budget.bits_per_weight=lots"], "budget.bits_per_weight", "lots"),
    "two budgets": (["budget.megabytes=10", "budget.as_uniform=3"], "exactly one of", "megabytes"),
    "level that no unit has": (["budget.as_uniform=7"], "budget.as_uniform must be one of 2, 3, 4, 5, 6", "7"),
    "level between two": (["budget.as_uniform=3.5"], "budget.as_uniform must be one of 2, 3, 4, 5, 6", "3.5"),
    "bits out of range": (["compressor.bits=[1,3]"], "compressor.bits", "from 2 to 8"),
    "group that does not divide": (
        ["compressor.group=48"],
        "compressor.group must be null or a divisor of every input width",
        "q_proj",
        "48",
    ),
    "sparsity of 1.2": (
        ["compressor=sparsegpt", "budget=sparsity", "budget.sparsity=1.2"],
        "budget.sparsity",
        "at most 1",
        "1.2",
    ),
    "sparse level of 1.2": (["compressor=wanda", "compressor.sparsity=1.2"], "compressor.sparsity", "1.2"),
    "sparsity that no level reaches": (
        ["compressor=sparsegpt", "budget=sparsity", "budget.sparsity=0.95"],
        "budget.sparsity must be from",
        "window",
    ),
    "sparsity of bit-widths": (["budget=sparsity"], "budget.sparsity must be used with sparse levels", ""),
    "N:M with N not below M": (
        ["compressor=magnitude", "compressor.patterns=['4:2']"],
        "compressor.patterns[0]",
        "0 < N < M",
        "4:2",
    ),
    "M that does not divide": (
        ["compressor=magnitude", "compressor.patterns=['2:5']"],
        "M of patterns must be",
        "q_proj",
        "2:5",
    ),
    "domain that is none": (["data.validation=[cod]"], "data.validation must be one of", "did you mean 'code'"),
    "domain with too few tokens": (
        ["data.validation=[short.txt]"],
        "data.validation: 'short' has",
        "tokens.validation=512 are asked",
    ),
    "unknown task": (["tasks=core", "tasks.names=[hellaswg]"], "tasks.names", "did you mean 'hellaswag'"),
    "task file of another form": (
        ["tasks=core", "tasks.names=[]", "tasks.files=[corpus.jsonl]"],
        "tasks.files: corpus.jsonl, line 1: request must be an object",
        "",
    ),
    "transform that is none": (["transform=rotat"], "transform", "did you mean 'rotate'"),
    "kind of rotation": (["transform=rotate", "transform.kind=hadamar"], "transform.kind must be one of", "'hadamard'"),
    "nothing to rotate": (
        ["transform=rotate", "transform.residual=false", "transform.values=false"],
        "transform.residual must be true where values=false",
        "transform=none",
    ),
    "head that the budget cannot pay for": (
        [
            "transform=rotate",
            "+model.config.tie_word_embeddings=true",
            "budget=megabytes",
            "budget.megabytes=0.09",
        ],
        "budget.megabytes must be at least",
        "transform=rotate unties the head, which adds 0.066 MB",
    ),
    "misspelt granularity": (["drop.granularity=block"], "drop.granularity must be one of", "did you mean 'blocks'"),
    "block to keep that is none": (["drop=blocks", "drop.keep=[7]"], "drop.keep[0]", "7"),
    "more dropped than there is": (
        ["compressor=none", "drop=blocks", "budget=blocks_kept", "budget.blocks_kept=-1"],
        "budget.blocks_kept",
        "-1",
    ),
    "blocks kept where none is dropped": (["budget=blocks_kept"], "budget.blocks_kept must be used where", ""),
    "nothing to choose": (["compressor=none", "budget=megabytes"], "compressor must be something else", ""),
    "uniform dropping": (
        ["compressor=none", "drop=blocks", "budget=blocks_kept", "sampler=uniform"],
        "sampler.allocator must be",
        "leave_one_out",
    ),
    "ranking without dropping": (
        ["sampler=block_influence"],
        "sampler.allocator must be one that chooses levels",
        "drop",
    ),
    "model path that is none": (["model=hf", "model.path=folder"], "model.path", "config.json"),
    "model path left out": (["model=hf"], "model.path must be given", ""),
    "model path misspelt": (["model=hf", "model.path=./foldr"], "model.path", "did you mean 'folder'"),
    "device": (["model.device=gpu"], "model.device must be one of auto, cpu", "did you mean"),
    "dtype": (["model.dtype=float23"], "model.dtype must be one of", "float32"),
    "more calibration tokens than text": (["tokens.calibration=6400000"], "tokens.calibration must be at most", ""),
    "more search tokens than text": (
        ["search.stages=[{survivors:1,tokens:6400000}]"],
        "search.stages[0].tokens must be at most",
        "",
    ),
    "part of a window": (["search.stages=[{survivors:1,tokens:100}]"], "multiple of tokens.seq_len=64", "100"),
    "stages that do not end in one": (["search.stages=[{survivors:2,tokens:64}]"], "search.stages", "fall to 1"),
    "empty text": (["data.path=empty.txt"], "data.path", "no text"),
    "not UTF-8": (["data.path=latin.txt"], "latin.txt is not UTF-8", ""),
    "text that is not there": (["data.path=corpus.json"], "data.path", "did you mean 'corpus.jsonl'"),
    "seed": (["seed=1.5"], "seed must be an integer", "1.5"),
    "seed of the weights": (["model.seed=a"], "model.seed must be an integer", "'a'"),
    "seed as word": (["seed=zero"], "seed must be an integer", "zero"),
    "name that is no file name": (["name=a/b"], "name must be", "a/b"),
    "offspring": (["search.offspring=0"], "search.offspring", "0"),
    "sensitivity tokens": (["sampler=ilp", "evaluate.sensitivity_tokens=6400000"], "evaluate.sensitivity_tokens", ""),
    "evaluate memory": (["evaluate.memory_gb=-1"], "evaluate.memory_gb", "-1"),
    "memory for no candidate": (["evaluate.memory_gb=1e-6"], "evaluate.memory_gb", "1e-06"),
    "a rule by half a name": (["units.fix={q_proj: 4}"], "units.fix[q_proj]", "did you mean 'self_attn.q_proj'"),
    "two targets": (["target.kl=0.1", "target.ppl_ratio=1.1"], "target must be one of", "not several"),
    "a race for two objectives": (["sampler=nsga2_evopress", "search.racing=0.2"], "search.racing must be null", "0.2"),
    "no start": (["sampler.start=nowhere.json"], "sampler.start must", "nowhere.json cannot be read"),
    "a start that is text": (["sampler.start=corpus.jsonl"], "sampler.start must", "corpus.jsonl"),
    "shares of offspring beyond all": (
        ["sampler=nsga2_evopress", "sampler.resize=0.9"],
        "sampler.cross must be a number from 0 to 0.1, which resize=0.9 leaves, got 0.2",
        "",
    ),
    "a target and a group of budgets": (["target.kl=0.1", "budget=megabytes"], "target must", "'budget=megabytes'"),
    "a target and a budget added": (["target.kl=0.1", "++budget.as_uniform=3"], "target must", "budget.as_uniform=3"),
    "tokens of a target's searches": (["target.kl=0.1", "budget.others=-1"], "budget.others must be", "-1"),
    "a start of another kind": (
        ["sampler.start=[1]"],
        "sampler.start",
        "an allocation.json, an allocator or a list of such",
    ),
    "offload": (["model.offload=maybe"], "model.offload", "'maybe'"),
    "compile": (["evaluate.compile=1"], "evaluate.compile", "got 1"),
    "racing": (["search.racing=2"], "search.racing", "2"),
    "surrogate": (["search.surrogate=1.5"], "search.surrogate", "1.5"),
    "top-k": (["fitness=topk_kl", "fitness.k=0"], "fitness.k", "0"),
    "batch tokens": (["store.batch_tokens=0"], "store.batch_tokens", "0"),
    "export tokens": (["export.check_tokens=none"], "export.check_tokens", "none"),
    "curvature of what has no weight": (["sampler=hawq_v2", "drop=sublayers"], "sampler.allocator.harm", "hawq_v2"),
    "gradients of what has no weight": (["sampler=fisher", "drop=sublayers"], "sampler.allocator.harm", "fisher"),
    "an order of what has no weight": (["sampler=hawq", "drop=sublayers"], "harm must", "'hawq'"),
    "a curvature that is none": (["sampler=hawq", "sampler.allocator.curvature=trase"], "curvature must", "'trace'"),
    "a bench of another form": (
        ["sampler=emq", "evaluate.mq_bench=corpus.jsonl"],
        "evaluate.mq_bench must",
        "corpus.jsonl is no bench of scored allocations",
    ),
    "groups that interact": (
        ["sampler=inter_layer", "sampler.allocator.group=block"],
        "sampler.allocator.group must be one of blocks, kinds",
        "did you mean 'blocks'",
    ),
    "a text to report on that is not there": (
        ["data.validation=[corpus.json]"],
        "data.validation: there is no file corpus.json",
        "did you mean 'corpus.jsonl'",
    ),
    "several seeds": (["seed=[0,1]"], "seed must be an integer, got [0, 1]", "-m seed=0,1"),
    "several seeds without -m": (
        ["seed=0,1"],
        "seed must be one value, or several runs (-m seed=0,1), got '0,1'",
        "",
    ),
    "a list that does not end": (
        ["search.stages=[{survivors:1,tokens:64]"],
        "search.stages must be a value whose brackets are closed",
        "[{survivors:1,tokens:64]",
    ),
    "a key in quotes": (
        ['units.min={"*": 4}'],
        "units.min must be a mapping whose keys stand without quotes",
        "in a shell: 'units.min={*: 4}'",
    ),
    "an entry without quotes": (
        ["units.exclude=[model.layers[0].*]"],
        "units.exclude must be a list whose entries are quoted",
        """in a shell: 'units.exclude=["model.layers[0].*"]'""",
    ),
    "no bench": (["sampler=emq", "evaluate.mq_bench=nowhere.json"], "evaluate.mq_bench", "'nowhere.json'"),
    "parents": (["sampler.population_size=0"], "sampler.population_size", "0"),
    "a text as journal": (["storage.path=corpus.jsonl"], "storage.path must be a journal file", "something else"),
    "zeros where the format has none": (
        ["export=compressed_tensors", "export.engine=transformers"],
        "export must be one of",
        "symmetric=true",
    ),
    "a level for each of what vLLM fuses": (
        ["export=compressed_tensors", "compressor.symmetric=true"],
        "export must be used with tied layers",
        "units.tie=fused",
    ),
    "a tie of nothing": (["units.tie=[self_attn.qproj]"], "units.tie must be", "did you mean 'self_attn.q_proj'"),
    "a tie misspelled": (["units.tie=fusd"], "units.tie must be one of none, fused", "did you mean 'fused'"),
    "launcher": (
        ["hydra/launcher=jobleb"],
        "hydra/launcher must be one of basic, joblib, submitit_local, submitit_slurm, got",
        "mean 'joblib'",
    ),
    "what is recorded": (["storage.record=elite"], "storage.record must be one of", "did you mean 'elites'"),
    "in a multirun": (["-m", "seed=0,x"], "seed must be an integer", "'x'"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_nothing_left(case: str, corpus, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, *expected = CASES[case]
    before = sorted(path.name for path in corpus.iterdir())
    head = [] if case == "in a multirun" else TINY
    code = evosweep(*head, *arguments, *(TINY if case == "in a multirun" else []), "tracking=none")
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    assert all(text in errors[0] for text in expected), errors
    if case != "in a multirun":  # its other job is a good one
        assert sorted(path.name for path in corpus.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["storage.path=mlflow.db"], "storage.path must be a file of its own, got 'mlflow.db'"),
        (["tracking.model=all"], "tracking.model must be one of weights, none"),
        (["tracking.model=weights", "export=none"], "tracking.model must be one of none, got 'weights'"),
        (["tracking.uri=runs"], "tracking.uri must be an MLflow tracking URI that can be written"),
    ],
)
def test_a_tracker_that_cannot_be_used_leaves_nothing(corpus, capsys, arguments, expected: str) -> None:
    before = sorted(path.name for path in corpus.iterdir())
    assert evosweep(*TINY, *arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and expected in errors[0], errors
    assert sorted(path.name for path in corpus.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=mix", "data.shares={corpus.jsonl: 0.5, wikipedia: 0.3}"], "data.shares must be shares that sum to 1"),
        (["data=mix", "data.shares={corpus.jsonl: 0.5, empty.txt: 0.5}"], "data.shares: empty.txt has no text in it"),
        (["data=questions", "data.template=chat"], "the model's tokenizer has no chat template"),
        (
            ["data=mix", "data.shares={chats: 1}", "data.sources={chat: {_target_: evosweep.data.text.TextFiles}}"],
            "data.sources",
        ),
        (
            [
                "data=mix",
                "data.shares={own: 0.5, empty.txt: 0.5}",
                "data.sources={own: {_target_: evosweep.data.text.TextFiles, path: corpus.jsonl}}",
            ],
            "data.shares: empty.txt has no text in it",  # so the own source was read
        ),
        (["data=code", "data.folder=folder"], "data.folder: there is no Python source in folder"),
        (["data=questions", "data.name=math"], "did you mean 'maths'"),
    ],
)
def test_other_texts_that_cannot_be_used(corpus, capsys, arguments: list[str], expected: str) -> None:
    others = [text for text in TINY if not text.startswith("data")]
    assert evosweep(*others, *arguments, "tracking=none") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and expected in error


def test_a_misspelt_command_names_the_nearest(corpus, capsys) -> None:
    assert evosweep("expor", "runs/x") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert (
        error == "error: 'expor' must be a command (did you mean 'export'?), or a setting and its value, as in seed=1"
    )
