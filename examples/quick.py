"""A model fitted into the size of uniform 3-bit, from Python: ``python examples/quick.py <model> <text>``."""

import sys

import evosweep

model = evosweep.load(sys.argv[1])
text = evosweep.tokenize(sys.argv[2], model, seq_len=64, calibration=1024, validation=512)
bench = evosweep.build_store(model, text, evosweep.GPTQ(bits=[2, 3, 4, 5, 6], group=64))
problem = evosweep.make_problem(bench, evosweep.Budget(as_uniform=3))
stages = [{"survivors": 2, "tokens": 64}, {"survivors": 1, "tokens": 128}]
result = evosweep.run_search(problem, bench, generations=3, stages=stages)
print(f"kl {result.validation['kl']:.4f} at {result.row()['size_mb']:.2f} MB, {result.tokens} tokens scored")
winner = evosweep.export(result, bench, "winner")
packed = evosweep.load_packed(winner["path"])
