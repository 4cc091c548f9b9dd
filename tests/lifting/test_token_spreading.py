import pytest
import torch

from fit3d_ns.lifting.token_spreading import average_over_cells, spread_tokens, sum_over_cells


@pytest.mark.parametrize("size, grid", [((24, 16), (4, 6)), ((23, 17), (4, 6)), ((5, 4), (4, 5))])
def test_sum_over_cells__is_the_adjoint_of_spreading(size, grid):
    width, height = size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(*grid, 3, generator=generator, dtype=torch.float64)
    maps = torch.randn(height, width, 3, generator=generator, dtype=torch.float64)
    left = (spread_tokens(tokens, width, height, "nearest") * maps).sum()
    torch.testing.assert_close(left, (tokens * sum_over_cells(maps, grid)).sum())


def test_average_over_cells__is_a_symmetric_projection():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 9, 11, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(9, 11, generator=generator, dtype=torch.float64)
    weights[:4, :5] = 0.0
    averaged = average_over_cells(first, weights, (3, 4))
    torch.testing.assert_close(average_over_cells(averaged, weights, (3, 4)), averaged)
    left = (second * weights[..., None] * averaged).sum()
    torch.testing.assert_close(left, (average_over_cells(second, weights, (3, 4)) * weights[..., None] * first).sum())


def test_spread_tokens__bilinear_hits_the_token_at_its_centre():
    tokens = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    # Odd patches of 5 pixels have a pixel in their centre.
    spread = spread_tokens(tokens, 30, 20, "bilinear")
    torch.testing.assert_close(spread[2::5, 2::5], tokens)
