"""FiT3D in a hundred lines: photographs of a room -> tokens -> lift -> render -> fine-tune -> compare.

    python docs/examples/fit3d_in_100_lines.py [FOLDER]      a minute on a CPU; the picture is FOLDER/fit3d.png

The commands do the same with more care: features are solved by least squares and have a decoder instead of
being averaged, many scenes teach, and rooms that were never seen judge.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs
from fit3d_ns.analysis.pca import apply_pca, fit_pca, map_to_colours
from fit3d_ns.analysis.pictures import compose_panel, save_picture, upscale
from fit3d_ns.features import create_token_model
from fit3d_ns.lifting.sources import PlyConfig
from fit3d_ns.lifting.surfaces import SurfaceConfig, read_surface_source
from fit3d_ns.rasterization import backproject_features, rasterize_features
from fit3d_ns.scene import View, create_depth_view, read_at_tokens
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes

is_notebook = "__file__" not in globals()
folder = Path(sys.argv[1] if len(sys.argv) > 1 and not is_notebook else "fit3d_in_100_lines")
torch.manual_seed(0)

# 1. A room: photographs, cameras, depth; and Gaussians on its surfaces, which stay as they are from here on.
synthesize_scenes(SynthesisConfig(folder / "rooms", num_scenes=1, num_frames=24, width=160, height=120))
source = read_surface_source(folder / "rooms" / "room_00", "depth", SurfaceConfig(), PlyConfig())
gaussians, capture = source.gaussians.activate(), source.capture
train, test = capture.select("train"), capture.select("test")
images = {view.name: capture.load_image(view).permute(2, 0, 1)[None].float() / 255 for view in capture.views}
print(f"{len(train)} photographs to train on, {len(test)} held out, {len(gaussians)} Gaussians")

# 2. Tokens: one vector for each patch of 8x8 pixels.
vit = create_token_model("toy_rooms_vit")


@torch.no_grad()
def tokenise(views: list[View]) -> dict[str, Tensor]:
    return {view.name: vit(images[view.name]).maps[0] for view in views}  # [h, w, E]


original = tokenise(capture.views)

# 3. Lift: a Gaussian's feature is the mean of what the pixels that it shows in say, weighted by how much of them it is.
projections = {view.name: gaussians.project(view.camera) for view in capture.views}
embed_dim = original[train[0].name].shape[-1]
sums, weights = torch.zeros(len(gaussians), embed_dim), torch.zeros(len(gaussians))
for view in train:
    maps = upscale(original[view.name], (view.height, view.width))
    weights += backproject_features(maps[None].contiguous(), projections[view.name], add_to=sums)[1]
features = sums / weights.clamp_min(1e-8)[:, None]


# 4. Render: the features of all views, blended into one photograph's patches. Where nothing is, nothing is taught.
def render(view: View) -> tuple[Tensor, Tensor]:
    blended = rasterize_features(torch.cat([features, torch.ones(len(gaussians), 1)], dim=1), projections[view.name])[0]
    tokens = read_at_tokens(blended, original[view.name].shape[:2], "area")
    alphas = tokens[..., -1:]
    return tokens[..., :-1] / alphas.clamp_min(1e-3), alphas[..., 0]


targets = {view.name: render(view) for view in capture.views}

# 5. Fine-tune: from each photograph alone, predict what all photographs of the place say.
optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-4, weight_decay=1e-4)
for step in range(120):
    name = train[int(torch.randint(len(train), ()))].name
    target, alphas = targets[name]
    error = (vit(images[name]).maps[0] - target).abs().mean(dim=-1)  # L1, as the paper's
    loss = (error * alphas).sum() / alphas.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}, loss {loss.item():.3f}")
finetuned = tokenise(capture.views)

# 6. Compare, on photographs that were held out: is a point of the room found again in another view?
pairs, depths = create_pairs(len(test)), [create_depth_view(capture, view, None) for view in test]
for label, tokens in {"original": original, "fine-tuned": finetuned}.items():
    maps = [tokens[view.name] for view in test]
    metrics = compute_consistency(maps, depths, pairs, ConsistencyConfig())
    print(f"{label:10}  recall within 10 px {metrics['recall_10px']:.3f}, cosine {metrics['centred_cosine']:.3f}")

# 7. Look: photograph, original, fine-tuned and lifted; a feature has one colour everywhere.
rows = []
basis = fit_pca(torch.cat([original[view.name].flatten(0, 1) for view in train]), 3)
for view in test[:2]:
    lifted = rasterize_features(features, projections[view.name])[0]
    drawn = [upscale(maps[view.name], lifted.shape[:2]) for maps in (original, finetuned)]
    colours = [map_to_colours(apply_pca(maps, basis), basis) for maps in (*drawn, lifted)]
    rows.append([images[view.name][0].permute(1, 2, 0), *colours])
save_picture(compose_panel(rows, ["photograph", "original", "fine-tuned", "lifted"]), folder / "fit3d.png")
print(f"Look at {folder / 'fit3d.png'}")
