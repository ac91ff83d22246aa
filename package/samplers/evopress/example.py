"""Thirty layers of two sizes, four bit-widths, at most what three bits everywhere cost."""

import optuna
import optunahub

hub = optunahub.load_local_module("samplers/evopress", registry_root="package")

units = tuple(
    hub.Unit(
        name=f"blocks.{n // 3}.linear_{n % 3}",
        numel=size,
        block=n // 3,
        levels=tuple(hub.Level(f"{bits}bit", cost=bits * size) for bits in (2, 3, 4, 5)),
    )
    for n, size in enumerate((1024, 1024, 4096) * 10)
)
problem = hub.Problem(units=units, budget=sum(3 * unit.numel for unit in units))


def objective(trial: optuna.Trial) -> float:
    allocation = hub.suggest_allocation(trial, problem)
    value = hub.known_value(trial, problem)  # the same allocation again need not be scored again
    if value is not None:
        return value
    # Early layers are the sensitive ones in this made-up model.
    return sum(unit.numel * 4.0 ** -int(allocation[unit.name][0]) / (1 + unit.block) for unit in units)


optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(sampler=hub.EvoPressSampler(problem, offspring=16, seed=0))
study.optimize(objective, n_trials=600)
print(f"uniform {study.trials[0].value:.1f}, found {study.best_value:.1f}: {study.best_trial.constraints}")
