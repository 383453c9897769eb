"""Zeros inside matrices against closed forms, and SparseGPT's solution against direct
least squares.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.specs.methods.options import Masks
from rayprune.specs.methods.sparse import SparseOptions
from rayprune.workers.numerics.linalg import WIDE, inverse_root
from rayprune.workers.numerics.sparsity import eliminate_, smallest_gone, sparsify
from rayprune.workers.numerics.statistics import GramStatistic, RowsStatistic, Statistic
from tests.helpers import SCRATCH, correlated, some


def masks(**options: Any) -> Masks:
    return SparseOptions.model_validate(options).masks


def statistic(z_TF: Tensor, kind: type[Statistic] = GramStatistic) -> Statistic:
    result = kind.empty(z_TF.shape[1], SCRATCH)
    result.update(z_TF)
    return result.finished()


def eliminated(gram_FF: Tensor, weight_DF: Tensor, how: Masks) -> tuple[Tensor, Tensor]:
    """The matrix afterwards, and which weights went."""
    weight_FD = weight_DF.T.clone()
    gone_FD = eliminate_(weight_FD, inverse_root(gram_FF, 0.0, SCRATCH), how)
    return weight_FD.T, gone_FD.T


def refitted(gram_FF: Tensor, weight_F: Tensor, now_F: Tensor, first: int) -> Tensor:
    """The inputs from `first` on that make up best for what those before have become."""
    behind, before = slice(first, None), slice(0, first)
    lost = gram_FF[behind, before] @ (weight_F[before] - now_F[before])
    solved: Tensor = torch.linalg.solve(gram_FF[behind, behind], lost)
    return weight_F[behind] + solved


def test_the_root_of_the_inverse_is_upper_triangular() -> None:
    z_TF, _ = correlated(60, 9, 1)
    gram_FF = z_TF.T @ z_TF
    rows = inverse_root(gram_FF, 0.5, SCRATCH)
    root_FF = torch.cat([rows(slice(0, 4)), rows(slice(4, 9))]).triu()
    expected = torch.linalg.inv(gram_FF + 0.5 * torch.eye(9, dtype=WIDE))
    torch.testing.assert_close(root_FF.T @ root_FF, expected)
    with pytest.raises(ModelError, match="Gram matrix of 2 columns is singular"):
        inverse_root(torch.ones(2, 2, dtype=WIDE), 0.0, SCRATCH)


@pytest.mark.parametrize("pattern", some(["2:4", "4:8", "unstructured"], "2:4", "unstructured"))
def test_weights_behind_are_the_least_squares_solution_at_every_input(pattern: str) -> None:
    """Every weight is, when its turn comes, what a direct solution for all that was done before
    says; those that go then are the cheapest.
    """
    z_TF, weight_DF = correlated(80, 136, 5)  # more than one block, the second one a small one
    z_TF = torch.cat([z_TF, correlated(90, 136, 1, seed=1)[0]])
    gram_FF, how = z_TF.T @ z_TF, masks(pattern=pattern)
    found_DF, gone_DF = eliminated(gram_FF, weight_DF, how)
    for before_F, now_F, gone_F in zip(weight_DF, found_DF, gone_DF, strict=True):
        for j in range(0, 136, 5):
            own = refitted(gram_FF, before_F, now_F, j)[0]
            torch.testing.assert_close(now_F[j], own * ~gone_F[j], rtol=1e-6, atol=1e-9)
        if how.group:
            turn = refitted(gram_FF, before_F, now_F, 8)[: how.group]
            inverse = torch.linalg.inv(gram_FF[8:, 8:])
            # the inputs of a group are freed one by one, from its first on
            root = torch.linalg.cholesky(inverse, upper=True).diagonal()[: how.group]
            worth = (turn / root).square()
            expected = worth.argsort()[: how.group // 2].sort().values
            assert gone_F[8 : 8 + how.group].nonzero().flatten().tolist() == expected.tolist()
    if how.group:
        assert bool((gone_DF.view(5, -1, how.group).sum(2) == how.group // 2).all())
    else:
        assert [int(part.sum()) for part in gone_DF.split(128, dim=1)] == [320, 20]


def test_it_is_exact_where_the_weights_that_go_come_first() -> None:
    z_TF, weight_DF = correlated(50, 4, 6)
    weight_DF[:, :2] *= 1e-3
    gram_FF = z_TF.T @ z_TF
    found_DF, gone_DF = eliminated(gram_FF, weight_DF, masks(pattern="2:4"))
    assert gone_DF.nonzero()[:, 1].tolist() == [0, 1] * 6
    direct = torch.linalg.lstsq(z_TF[:, 2:], z_TF @ weight_DF.T).solution.T
    torch.testing.assert_close(found_DF[:, 2:], direct)


def test_without_correlation_it_is_wandas_choice_and_changes_nothing() -> None:
    _, weight_DF = correlated(1, 16, 7)
    energy_F = torch.linspace(0.1, 9, 16, dtype=WIDE)
    found_DF, gone_DF = eliminated(torch.diag(energy_F), weight_DF, masks(pattern="4:8"))
    expected = smallest_gone(weight_DF, energy_F.sqrt(), masks(pattern="4:8", score="wanda"))
    assert torch.equal(gone_DF, expected)
    torch.testing.assert_close(found_DF, weight_DF.masked_fill(gone_DF, 0.0))


@pytest.mark.parametrize("turned", [False, True])
def test_what_goes_by_magnitude_and_by_wanda(turned: bool) -> None:
    """A matrix that lies transposed, as GPT-2's do, is no other matrix."""
    weight_DF = torch.tensor([[1.0, -2.0, 3.0, -4.0], [8.0, 5.0, 5.0, 5.0]])
    weight_DF = weight_DF.T.contiguous().T if turned else weight_DF
    norms_F, ones_F = torch.tensor([8.0, 1.0, 1.0, 1.0], dtype=WIDE), torch.ones(4, dtype=WIDE)

    def gone(importance_F: Tensor, **options: Any) -> list[list[int]]:
        found = smallest_gone(weight_DF, importance_F, masks(**options))
        return [row.nonzero().flatten().tolist() for row in found]

    assert gone(ones_F, score="magnitude") == [[0, 1], [1, 2]], "of equals the first"
    assert gone(norms_F, score="wanda") == [[1, 2], [1, 2]]
    everywhere: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5}
    assert gone(ones_F, score="magnitude", **everywhere) == [[0, 1, 2, 3], []], "the whole matrix"
    assert gone(norms_F, score="wanda", **everywhere) == [[1, 2], [1, 2]], "every output"
    everywhere["sparsity"] = 0.25
    assert gone(norms_F, score="wanda", **everywhere) == [[1], [1]]


@pytest.mark.parametrize("kind", [GramStatistic, RowsStatistic])
@pytest.mark.parametrize("score", ["magnitude", "obs"])
def test_errors_are_those_of_the_outputs(score: str, kind: type[Statistic]) -> None:
    z_TF, weight_DF = correlated(300, 24, 10)
    training_TF, held_out_TF = z_TF[:200], z_TF[200:]
    weights, how = [weight_DF[:3], weight_DF[3:]], masks(score=score)
    parts = statistic(training_TF, kind), statistic(held_out_TF, kind)
    made = sparsify(*parts, weights, how, [WIDE, WIDE])
    fitted = sparsify(  # a fit on the training shards alone
        statistic(training_TF), statistic(0 * training_TF), weights, how, [WIDE, WIDE]
    )
    assert [weight.shape for weight in made.weights] == [(3, 24), (7, 24)]

    def error(z: Tensor, sparse_DF: Tensor) -> float:
        return float(((sparse_DF - weight_DF) @ z.T).norm() / (weight_DF @ z.T).norm())

    sparse_DF = torch.cat(fitted.weights)
    assert made.training_error == pytest.approx(error(training_TF, sparse_DF), rel=1e-5)
    assert made.held_out_error == pytest.approx(error(held_out_TF, sparse_DF), rel=1e-5)
    alone_DF = weight_DF * (sparse_DF != 0)
    assert made.mask_error == pytest.approx(error(held_out_TF, alone_DF), rel=1e-5)
    assert (made.held_out_error < made.mask_error) == (score == "obs")


def test_inputs_that_are_never_there_cost_nothing() -> None:
    z_TF, weight_DF = correlated(100, 8, 3)
    z_TF[:, [0, 3, 5, 6]] = 0
    parts = statistic(z_TF), statistic(z_TF)
    made = sparsify(*parts, [weight_DF], masks(), [torch.bfloat16])
    assert made.held_out_error == pytest.approx(0, abs=1e-6)
    assert made.weights[0].dtype == torch.bfloat16
    nothing = statistic(0 * z_TF), statistic(0 * z_TF)
    assert sparsify(*nothing, [weight_DF], masks(), [WIDE]).held_out_error == 0
