"""The GPU kernel against the plain loop: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from evosweep.compressors import compensate
from evosweep.compressors.compensate import Rules
from evosweep.compressors.grid import Grid

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(32, 70), (20, 8), (1, 33)])
def test_settles_as_the_plain_loop_does(columns: int, rows: int, rounds: bool, masks: bool) -> None:
    from evosweep.compressors import kernels

    draws = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, rows, generator=draws)
    whole = (0.1 * torch.randn(columns + 3, columns + 3, generator=draws)).triu() + torch.eye(columns + 3)
    grid = Grid.of(weight.T, top=torch.tensor([3.0, 15.0]).repeat(rows)[:rows], symmetric=False)
    mask = torch.rand(columns, rows, generator=draws) > 0.5
    found = []
    for settle, where in ((compensate.settle, "cpu"), (kernels.settle, DEVICE)):
        part, codes = weight.clone().to(where), torch.zeros(columns, rows, dtype=torch.uint8, device=where)
        errors = torch.full_like(part, float("nan"))
        placed = Grid(*(each.to(where) for each in (grid.scale, grid.zero, grid.top)))
        rules = Rules(placed if rounds else None, codes if rounds else None, mask.to(where) if masks else None)
        settle(part, errors, whole.to(where)[3:, 3:], rules)
        found.append([each.cpu() for each in (part, errors, codes)])
    for plain, kernel in zip(*found, strict=True):
        assert torch.allclose(plain.float(), kernel.float(), atol=1e-5)


def test_kernels_that_run_are_used_and_others_give_way_with_a_word(monkeypatch, caplog) -> None:
    from evosweep.compressors import kernels

    find = compensate.working_kernels.__wrapped__
    assert find(torch.device(DEVICE)) is kernels
    monkeypatch.setattr(kernels, "settle", lambda *_: (_ for _ in ()).throw(RuntimeError("no C compiler")))
    assert find(torch.device(DEVICE)) is None
    assert "Triton does not work here (RuntimeError)" in caplog.text
