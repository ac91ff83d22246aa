"""The GPU kernel against the plain loop: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from evosweep.compressors import compensate
from evosweep.compressors.compensate import ColumnRules
from evosweep.compressors.grid import Grid, GridTable

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(32, 70), (20, 8), (1, 33)])
def test_the_kernel_equals_the_plain_loop(columns: int, rows: int, rounds: bool, masks: bool) -> None:
    from evosweep.compressors import kernels

    draws = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, rows, generator=draws)
    whole = (0.1 * torch.randn(columns + 3, columns + 3, generator=draws)).triu() + torch.eye(columns + 3)
    grid = Grid.of(weight.T, top=torch.tensor([3.0, 15.0]).repeat(rows)[:rows], symmetric=False)
    mask = torch.rand(columns, rows, generator=draws) > 0.5
    found = []
    for device in ("cpu", DEVICE):
        span = weight.clone().to(device)
        codes = torch.zeros(columns, rows, dtype=torch.uint8, device=device)
        errors = torch.full_like(span, float("nan"))
        factor = whole.to(device)[3:, 3:]
        moved = Grid(*(values.to(device) for values in (grid.scale, grid.zero, grid.top)))
        rules = ColumnRules(moved if rounds else None, codes if rounds else None, mask.to(device) if masks else None)
        if len(found) == 0:
            compensate.finalize_columns(span, errors, factor, rules)
        else:
            kernels.finalize_columns(span, errors, factor, grid=rules.grid, codes=rules.codes, mask=rules.mask)
        found.append([tensor.cpu() for tensor in (span, errors, codes)])
    for plain, kernel in zip(*found, strict=True):
        assert torch.allclose(plain.float(), kernel.float(), atol=1e-5)


def test_the_kernel_takes_each_column_s_own_grid() -> None:
    from evosweep.compressors import kernels

    draws = torch.Generator().manual_seed(4)
    weight = torch.randn(20, 37, generator=draws)
    factor = ((0.1 * torch.randn(20, 20, generator=draws)).triu() + torch.eye(20)).to(DEVICE)
    scales = 0.2 + torch.rand(3, 37, generator=draws)
    zeros = torch.randint(0, 8, (3, 37), generator=draws).float()
    groups = torch.randint(0, 3, (20,), generator=draws)
    found = []
    for device in ("cpu", DEVICE):
        span = weight.clone().to(device)
        codes = torch.zeros(20, 37, dtype=torch.uint8, device=device)
        errors = torch.full_like(span, float("nan"))
        grid = GridTable(*(part.to(device) for part in (scales, zeros, torch.full((37,), 7.0), groups)))
        if len(found) == 0:
            compensate.finalize_columns(span, errors, factor.cpu(), ColumnRules(grid, codes))
        else:
            kernels.finalize_columns(span, errors, factor, grid=grid, codes=codes)
        found.append([tensor.cpu() for tensor in (span, errors, codes)])
    for plain, kernel in zip(*found, strict=True):
        assert torch.allclose(plain.float(), kernel.float(), atol=1e-5)


def test_kernels_that_fail_are_replaced_by_the_plain_loop_with_a_warning(monkeypatch, caplog) -> None:
    from evosweep.compressors import kernels

    find = compensate.working_kernels.__wrapped__
    assert find(torch.device(DEVICE)) is kernels
    monkeypatch.setattr(kernels, "finalize_columns", lambda *_: (_ for _ in ()).throw(RuntimeError("no C compiler")))
    assert find(torch.device(DEVICE)) is None
    assert "Triton does not work here (RuntimeError)" in caplog.text


@pytest.mark.parametrize(("columns", "rows"), [(32, 70), (20, 8), (1, 33)])
def test_the_kernel_of_entropy_coded_steps_equals_the_plain_loop(columns: int, rows: int) -> None:
    from evosweep.compressors import entropy_kernel
    from evosweep.compressors.entropy_steps import REACH, StepRules, finalize_steps

    draws = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, rows, generator=draws)
    weight[0, 0] = 1e6
    whole = (0.1 * torch.randn(columns + 3, columns + 3, generator=draws)).triu() + torch.eye(columns + 3)
    drawn = StepRules(*(torch.rand(size, generator=draws) + 0.01 for size in (rows, rows, columns)))
    plain = weight.clone()
    plain_errors = torch.empty_like(plain)
    finalize_steps(plain, plain_errors, whole[3:, 3:], drawn)
    span = weight.clone().to(DEVICE)
    errors = torch.full_like(span, float("nan"))
    moved = {name: values.to(DEVICE) for name, values in vars(drawn).items()}
    entropy_kernel.finalize_steps(span, errors, whole.to(DEVICE)[3:, 3:], **moved, reach=REACH)
    same = torch.isclose(plain, span.cpu(), atol=1e-5).all(dim=0)  # rows without a tie that is rounded otherwise
    assert same.float().mean() > 0.95
    assert torch.allclose(plain_errors[:, same], errors.cpu()[:, same], rtol=1e-4, atol=1e-4)
    assert float(plain[0, 0]) == pytest.approx(REACH * float(drawn.scale[0]))
