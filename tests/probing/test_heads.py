"""Assemblies and heads against what they say they compute."""

from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.probing.frozen_features import Assembler, Assembly, list_parts
from fit3d_ns.probing.heads import DepthBins, DPTHead, LinearDepthHead, SegmentationHead
from tests.probing.probe_backbones import create_features


@pytest.mark.parametrize("assembly", get_args(Assembly))
def test_assembler__each_strategy_by_hand(assembly) -> None:
    features = create_features(0, parts=len(list_parts(assembly)), layers=2)
    torch.manual_seed(1)
    assembler = Assembler(assembly, 5)
    first, second = features.maps[:, 0, -1], features.maps[:, -1, -1]
    joined = torch.cat([first, second], dim=-1)
    if assembly == "linear":
        assert assembler.fusion is not None
        joined = joined @ assembler.fusion.weight.T + assembler.fusion.bias
    expected = {"original": first, "finetuned": first, "add": first + second}.get(assembly, joined)
    result = assembler(features)
    torch.testing.assert_close(result.permute(0, 2, 3, 1), expected)
    assert result.shape[1] == assembler.out_dim == (10 if assembly in ("concat", "duplicate") else 5)
    assert (sum(parameter.numel() for parameter in assembler.parameters()) > 0) == (assembly == "linear")


def test_assembler__class_token_of_the_original_by_default() -> None:
    features = create_features(1, parts=2)
    torch.testing.assert_close(Assembler("concat", 5).select_class_token(features), features.class_tokens[:, 0, 0])
    finetuned = Assembler("concat", 5, "finetuned").select_class_token(features)
    torch.testing.assert_close(finetuned, features.class_tokens[:, 1, 0])
    alone = Assembler("finetuned", 5)
    assert list_parts("finetuned") == ("finetuned",) and alone.class_dim == 5
    assert Assembler("concat", 5, "none").select_class_token(features).shape == (2, 0)
    with pytest.raises(ValueError, match="class token of the finetuned backbone"):
        Assembler("original", 5, "finetuned")


@pytest.mark.parametrize("assembly", ["original", "concat", "linear"])
def test_depth_head__upsampling_before_or_after_the_linear_layer_is_the_same(assembly) -> None:
    """The public code concatenates tokens and class token, upsamples four times, then applies a 1x1 convolution."""
    features = create_features(2, parts=len(list_parts(assembly)))
    torch.manual_seed(0)
    head = LinearDepthHead(Assembler(assembly, 5), DepthBins(0.1, 9.0, num_bins=16)).eval()
    assert head.class_layer is not None
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    tokens = head.assembler(features)
    class_map = features.class_tokens[:, 0, 0][:, :, None, None].expand(-1, -1, 3, 4)
    together = torch.cat([tokens, class_map], dim=1)
    upsampled = F.interpolate(together, scale_factor=4, mode="bilinear", align_corners=False)
    weight = torch.cat([head.token_layer.weight, head.class_layer.weight], dim=1)[:, :, None, None]
    logits = F.conv2d(upsampled, weight, head.token_layer.bias)
    shares = logits.relu() + 0.1
    shares = shares / shares.sum(dim=1, keepdim=True)
    expected = (shares * torch.linspace(0.1, 9.0, 16)[:, None, None]).sum(dim=1)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)


def test_segmentation_head__is_batch_norm_and_a_linear_layer() -> None:
    features = create_features(3, parts=2)
    head = SegmentationHead(Assembler("concat", 5, "none"), 7)
    maps = head[0](features)
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
    normalized = (maps - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    expected = torch.einsum("bchw,kc->bkhw", normalized, head[-1].weight[:, :, 0, 0])
    torch.testing.assert_close(head.train()(features), expected, rtol=1e-4, atol=1e-5)
    names = {name for name, _ in head.named_parameters()}
    assert names == {"1.weight", "1.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("assembly", ["original", "concat"])
@pytest.mark.parametrize("size", [(3, 4), (5, 7)])
def test_dpt_head__reads_every_layer_and_gives_depth_in_range(assembly, size) -> None:
    parts = len(list_parts(assembly))
    features = create_features(4, parts=parts, layers=4, h=size[0], w=size[1])
    torch.manual_seed(0)
    head = DPTHead(Assembler(assembly, 5), DepthBins(0.5, 4.0, num_bins=8), fused_dim=8)
    maps = features.maps.clone().requires_grad_()
    depth = head(type(features)(maps, features.class_tokens))
    assert depth.shape == (2, 8 * size[0], 8 * size[1])
    assert bool(((depth >= 0.5) & (depth <= 4.0)).all())
    depth.sum().backward()
    assert maps.grad is not None
    reached = maps.grad.abs().sum(dim=(0, 3, 4, 5))
    assert bool((reached > 0).all()), "part and layer without influence"
    assert all(parameter.grad is not None for parameter in head.parameters())
