"""Gaussians as stored: conversion, selection, and what cannot be kept."""

import pytest
import torch

from fit3d_ns.scene import Gaussians


def make_raw(num_gaussians=6):
    generator = torch.Generator().manual_seed(2)
    return {
        "means": torch.randn(num_gaussians, 3, generator=generator),
        "quats": torch.randn(num_gaussians, 4, generator=generator),
        "log_scales": torch.randn(num_gaussians, 3, generator=generator),
        "opacity_logits": torch.randn(num_gaussians, generator=generator),
        "sh_dc": torch.randn(num_gaussians, 3, generator=generator),
        "features": torch.randn(num_gaussians, 4, generator=generator),
    }


def test_from_raw__rounds_to_half_and_activates():
    raw = make_raw()
    gaussians = Gaussians.from_raw(**raw)
    activated = gaussians.activate()
    # Half precision has 11 significant bits.
    torch.testing.assert_close(activated.scales.log(), raw["log_scales"], rtol=2**-11, atol=1e-3)
    torch.testing.assert_close(activated.opacities, torch.sigmoid(raw["opacity_logits"]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(activated.quats.norm(dim=1), torch.ones(6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gaussians.features.float(), raw["features"], rtol=2**-11, atol=1e-6)
    assert torch.equal(gaussians.means, raw["means"])


def test_from_raw__unknown_by_products_are_zero_and_counts_saturate():
    gaussians = Gaussians.from_raw(**make_raw())
    assert not gaussians.blend_weight.any() and not gaussians.feature_variance.any()
    counts = torch.tensor([0, 1, 70000, 65535, 2, 3])
    counted = Gaussians.from_raw(**make_raw(), num_views=counts)
    assert counted.num_views.dtype == torch.uint16
    assert counted.num_views.int().tolist() == [0, 1, 65535, 65535, 2, 3]


def test_select__keeps_rows_of_every_field():
    raw = make_raw()
    gaussians = Gaussians.from_raw(**raw, num_views=torch.arange(6), sh_rest=torch.arange(54.0).reshape(6, 3, 3))
    keep = torch.tensor([True, False, False, True, True, False])
    selected = gaussians.select(keep)
    assert selected.num_gaussians == 3
    assert selected.num_views.tolist() == [0, 3, 4]
    assert torch.equal(selected.means, raw["means"][keep])
    assert torch.equal(selected.sh_rest[1], gaussians.sh_rest[3])
    assert selected.sh_degree == 1


def test_from_raw__drops_nan_infinite_too_large_and_zero_rotation():
    raw = make_raw(7)
    raw["means"][0, 1] = torch.nan
    raw["opacity_logits"][1] = torch.inf
    raw["features"][2, 3] = 1e6
    raw["quats"][3] = 0.0
    raw["means"][4] = 1e6
    # Can be stored, but its exponential is infinite.
    raw["log_scales"][5] = 500.0
    assert torch.equal(Gaussians.from_raw(**raw, drop_invalid=True).means, raw["means"][[4, 6]])
    with pytest.raises(ValueError, match="`means` of 1 Gaussians is NaN"):
        Gaussians.from_raw(**raw)


def test_errors__number_of_coefficients():
    with pytest.raises(ValueError, match="4 further spherical harmonics coefficients belong to no degree"):
        Gaussians.from_raw(**make_raw(), sh_rest=torch.zeros(6, 4, 3))
