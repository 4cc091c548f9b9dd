"""Trains `toy_rooms_vit`, the small ViT that ships with the package, from scratch on synthetic rooms alone.

Every training photograph shows a room of its own, so the model never sees two views of one thing. The rooms are drawn
from other random numbers than those of `fit3d-synthesize`: no seed of that command makes one of them.

    python scripts/train_toy_backbone.py --output-dir runs/toy_rooms_vit

renders the photographs (about 0.4 s each on one core) into `<output-dir>/photographs`, trains, and writes a backbone
folder to `<output-dir>/toy_rooms_vit`. It goes on where it was interrupted.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from fit3d_ns.features.backbones import create_timm_model
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.synthetic.rooms import CLASSES, View, build_room, render_room, trace_rays, walk_through
from fit3d_ns.utils.files import write_atomically, write_json
from fit3d_ns.utils.progress import create_progress, notice
from fit3d_ns.utils.selection import create_generator, derive_seed, seed_everything

WIDTH, HEIGHT, PATCH = 320, 240, 8
CHUNK = 50
"""Photographs of a file."""
FIRST_PHOTOGRAPHS = 500
"""Training begins with these; every second step adds one."""
ARCHITECTURE = "vit_large_patch14_224"
"""timm's name of a plain ViT that has no published weights; `MODEL_ARGS` change all of its sizes."""
MODEL_ARGS = {
    "img_size": [HEIGHT // 2, WIDTH // 2],
    "patch_size": PATCH,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}
"""The position embedding has 15x20 places, which timm interpolates to the grid of the image."""
MEAN = STD = (0.5, 0.5, 0.5)
STEPS_PER_SAVE = 100


@dataclass(frozen=True)
class TrainingConfig:
    """Where, and for how long."""

    output_dir: Path
    """Folder for photographs, checkpoint and the trained backbone; a folder with a checkpoint goes on from there."""
    num_photographs: int = 1250
    """Rooms to photograph, one photograph each; a multiple of 50."""
    num_steps: int = 2500
    """Optimisation steps; the learning rate is constant, and falls to zero over the last quarter."""
    num_pairs: int = 4
    """Photographs of a step, of which two crops of 160x120 pixels each are seen; full-frame steps see a quarter."""
    learning_rate: float = 1e-3
    """After a warm-up of 100 steps."""
    seed: int = 0
    """Of rooms, weights, crops and colours."""


@dataclass(frozen=True)
class Crops:
    """What a step sees: `views` crops, two of each photograph after one another."""

    images: Tensor
    """[views, 3, height, width], in [0, 1]."""
    boxes: Tensor
    """[views, 4]: left, top, width and height as shares of the whole (perhaps mirrored) photograph."""
    positions: Tensor
    """[views, 4]: the boxes whose position embeddings the patches get."""
    labels: Tensor
    """[views, 2h, 2w]: class of each quarter of a patch."""
    objects: Tensor
    """[views, 2h, 2w]: piece of each quarter of a patch."""


class Pretraining(nn.Module):
    """The backbone with the heads it is trained by; heads are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: nn.Module = create_timm_model(ARCHITECTURE, tuple(sorted(MODEL_ARGS.items())))
        dim, num_classes = MODEL_ARGS["embed_dim"], len(CLASSES)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.classes = nn.Linear(dim, 4 * num_classes)
        self.presence = nn.Linear(dim, num_classes)
        self.objects = nn.Linear(dim, 64)
        self.places = nn.Linear(dim, 96)
        self.colours = nn.Linear(dim, 4 * 4 * 3)

    def forward(self, crops: Crops, is_masked: Tensor, compares_tokens: bool) -> dict[str, Tensor]:
        """The losses of a step; `is_masked` [views, h*w] is true for patches that the backbone does not see.

        With `compares_tokens`, places are compared by the tokens themselves, as they are used, and not by a head's.
        """
        tokens = self._embed(crops, is_masked)
        class_token, patches = tokens[:, 0], tokens[:, 1:]
        views, (h, w) = len(patches), (size // PATCH for size in crops.images.shape[-2:])
        # (views, h*w, 4*c) -> (views, h, w, 2, 2, c) -> (views, c, 2h, 2w)
        logits = self.classes(patches).float().reshape(views, h, w, 2, 2, -1)
        logits = logits.permute(0, 5, 1, 3, 2, 4).reshape(views, -1, 2 * h, 2 * w)
        presence = F.one_hot(crops.labels.flatten(1), len(CLASSES)).amax(dim=1).float()
        colours = F.avg_pool2d(crops.images, PATCH // 4)
        # (views, 3, 4h, 4w) -> (views, h*w, 4*4*3)
        colours = colours.reshape(views, 3, h, 4, w, 4).permute(0, 2, 4, 3, 5, 1).reshape(views, h * w, -1)
        places = patches if compares_tokens else self.places(patches)
        return {
            "classes": F.cross_entropy(logits, crops.labels, label_smoothing=0.05),
            "presence": F.binary_cross_entropy_with_logits(self.presence(class_token).float(), presence),
            "objects": self._contrast_objects(self.objects(patches).float(), crops.objects),
            "places": self._contrast_places(places.float().reshape(views, h, w, -1), crops.boxes),
            "colours": 4.0 * F.smooth_l1_loss(self.colours(patches).float(), colours, beta=0.1),
        }

    def _embed(self, crops: Crops, is_masked: Tensor) -> Tensor:
        """Tokens [views, 1 + h*w, dim] of crops; position embeddings go with `crops.positions`."""
        model = self.backbone
        tokens = model.patch_embed((crops.images - 0.5) / 0.5)
        _, h, w, dim = tokens.shape
        tokens = torch.where(is_masked.reshape(-1, h, w, 1), self.mask_token.to(tokens.dtype), tokens)
        rows, columns = (MODEL_ARGS["img_size"][0] // PATCH, MODEL_ARGS["img_size"][1] // PATCH)
        table = model.pos_embed[:, 1:].reshape(1, rows, columns, dim).permute(0, 3, 1, 2)
        table = table.expand(len(tokens), -1, -1, -1)
        places = F.grid_sample(
            table, _find_centres(crops.positions, h, w), "bicubic", "reflection", align_corners=False
        )
        tokens = (tokens + places.permute(0, 2, 3, 1)).flatten(1, 2)
        class_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return model.norm(model.blocks(torch.cat([class_token, tokens], dim=1)))

    @staticmethod
    def _contrast_objects(embeddings: Tensor, objects: Tensor) -> Tensor:
        """Patches of a piece are alike and unlike all others of the photograph, in both of its crops at once."""
        quarters = objects.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        # A patch on a border belongs to no piece.
        ids = torch.where((quarters == quarters[..., :1]).all(dim=-1), quarters[..., 0], -1)
        losses = []
        for pair_ids, pair in zip(ids.chunk(len(ids) // 2), embeddings.chunk(len(ids) // 2), strict=True):
            chosen = (pair_ids.flatten() >= 0).nonzero()[:, 0]
            chosen = chosen[:: max(1, len(chosen) // 512)]
            found, unit = pair_ids.flatten()[chosen], F.normalize(pair.flatten(0, 1)[chosen], dim=-1)
            logits = (unit @ unit.T / 0.1).fill_diagonal_(-1e4)
            same = (found[:, None] == found).float().fill_diagonal_(0.0)
            counts = same.sum(dim=1)
            alike = (same * logits.log_softmax(dim=1)).sum(dim=1) / counts.clamp(min=1.0)
            # Small pieces count as much as large ones.
            weights = (counts > 0).float() / (counts + 1.0).sqrt()
            losses.append(-(weights * alike).sum() / weights.sum().clamp(min=1e-6))
        return torch.stack(losses).mean()

    @staticmethod
    def _contrast_places(embeddings: Tensor, boxes: Tensor) -> Tensor:
        """A place of a photograph is alike in both of its crops, and unlike its other places."""
        _, h, w, _ = embeddings.shape
        centres, others = _find_centres(boxes[0::2], h, w), boxes[1::2, None, None]
        # Where the first crop's patches lie in the second, from -1 to 1.
        inside = ((centres + 1.0) / 2.0 - others[..., :2]) / others[..., 2:] * 2.0 - 1.0
        maps = embeddings[1::2].permute(0, 3, 1, 2)
        partners = F.grid_sample(maps, inside, align_corners=False).permute(0, 2, 3, 1)
        is_seen = (inside.abs() < 1.0).all(dim=-1)
        losses = []
        for first, second, seen in zip(embeddings[0::2], partners, is_seen, strict=True):
            # Neighbours are hardly strangers: every second patch of every second row.
            first, second, seen = (values[::2, ::2] for values in (first, second, seen))
            if seen.sum() >= 8:
                logits = F.normalize(first[seen], dim=-1) @ F.normalize(second[seen], dim=-1).T / 0.1
                target = torch.arange(len(logits))
                losses.append(0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)))
        return torch.stack(losses).mean() if losses else embeddings.sum() * 0.0


def main(config: TrainingConfig) -> None:
    """Renders what is missing, then trains from the last checkpoint on."""
    photographs = Photographs(config.output_dir / "photographs", config.seed)
    seed_everything(config.seed)
    model = Pretraining()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    checkpoint, first, seconds = config.output_dir / "checkpoint.pt", 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    start, sums = time.perf_counter() - seconds, {}
    with create_progress() as progress:
        bar = progress.add_task("Training", total=config.num_steps, completed=first, note="")
        for step in range(first, config.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(
                    (step + 1) / 100, 1.0, (config.num_steps - step) / (0.25 * config.num_steps)
                )
            generator, is_late = create_generator(config.seed, "step", step), step >= 0.6 * config.num_steps
            photographs.grow(min(config.num_photographs, FIRST_PHOTOGRAPHS + step // 2))
            crops = draw_crops(photographs, config.num_pairs, step % 4 == 3, is_late, generator)
            num_patches = crops.labels.shape[1] * crops.labels.shape[2] // 4
            is_masked = torch.rand(len(crops.images), num_patches, generator=generator) < 0.15
            # Only every second step hides patches: in use none are hidden.
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(crops, is_masked & (step % 2 == 0), is_late)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            sums = {name: sums.get(name, 0.0) + loss.item() for name, loss in losses.items()}
            progress.advance(bar)
            if (step + 1) % STEPS_PER_SAVE == 0 or step + 1 == config.num_steps:
                seconds = time.perf_counter() - start
                means = {name: total / ((step % STEPS_PER_SAVE) + 1) for name, total in sums.items()}
                left = (config.num_steps - step - 1) * seconds / (step + 1)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
                notice(f"step {step + 1} of {config.num_steps}: {shown}; {seconds:.0f} s, {left:.0f} s left")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                with write_atomically(checkpoint) as temporary:
                    torch.save({**state, "step": step + 1, "seconds": seconds}, temporary)
                save_folder(config.output_dir / "toy_rooms_vit", model.backbone.state_dict())
                sums = {}


def save_folder(folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes a backbone folder that timm loads, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "model.safetensors") as temporary:
        tensors = {name: tensor.detach().half().contiguous() for name, tensor in weights.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    model_args = {**MODEL_ARGS, "num_classes": 0, "dynamic_img_size": True}
    published = {
        "license": "apache-2.0",
        "input_size": [3, HEIGHT, WIDTH],
        "first_conv": "patch_embed.proj",
        "mean": list(MEAN),
        "std": list(STD),
        "num_classes": 0,
        "fixed_input_size": False,
        "tag": "toy_rooms",
        "custom_load": False,
    }
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "num_features": MODEL_ARGS["embed_dim"]}
    write_json(folder / "config.json", {**config, "model_args": model_args, "pretrained_cfg": published})


class Photographs:
    """Renders and loads photographs when they are first needed; another process may render ahead into the folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.number = folder, seed, 0
        self._chunks: list[list[Tensor]] = []

    def grow(self, number: int) -> None:
        """Makes `number` photographs available, rounded down to whole files."""
        for chunk in range(len(self._chunks), number // CHUNK):
            with np.load(render_chunk(self.folder, chunk, self.seed)) as part:
                self._chunks.append([torch.from_numpy(part[kind]) for kind in ("images", "labels", "objects")])
        self.number = len(self._chunks) * CHUNK

    def get(self, index: int) -> list[Tensor]:
        """Colours [h, w, 3], classes and pieces [h, w] of one."""
        return [values[index % CHUNK] for values in self._chunks[index // CHUNK]]


def draw_crops(
    photographs: "Photographs", num_pairs: int, is_full: bool, is_moved: bool, generator: torch.Generator
) -> Crops:
    """Two crops of each of some photographs; with `is_full`, of nearly whole photographs of a quarter of them.

    With `is_moved`, the second crop of each has the position embedding of another part of the photograph, so that
    places are known by what is there and not by where in the photograph they lie.
    """
    num_pairs, scale = (max(1, num_pairs // 4), 1) if is_full else (num_pairs, 2)
    height, width = HEIGHT // scale, WIDTH // scale
    views, boxes, classes, pieces = [], [], [], []
    for index in torch.randint(photographs.number, (num_pairs,), generator=generator).tolist():
        is_mirrored = torch.rand((), generator=generator) < 0.5
        whole = [values.flip(1) if is_mirrored else values for values in photographs.get(index)]
        for _ in range(2):
            smallest = 0.8 if is_full else 0.42
            size = smallest + (1.0 - smallest) * torch.rand((), generator=generator)
            box = torch.cat([(1.0 - size) * torch.rand(2, generator=generator), size.expand(2)])
            boxes.append(box)
            colours = whole[0].permute(2, 0, 1)[None].float() / 255.0
            grid = _find_centres(box[None], height, width)
            if not is_full and size > 0.75:
                # Otherwise colours would alias.
                colours = F.avg_pool2d(colours, 2)
            views.append(change_colours(F.grid_sample(colours, grid, align_corners=False)[0], generator))
            grid = _find_centres(box[None], 2 * height // PATCH, 2 * width // PATCH)
            for values, kept in ((whole[1], classes), (whole[2], pieces)):
                kept.append(F.grid_sample(values[None, None].float(), grid, "nearest", align_corners=False)[0, 0])
    found = torch.stack(boxes)
    positions = found.clone()
    if is_moved:
        positions[1::2, :2] = torch.rand(num_pairs, 2, generator=generator) * (1.6 - found[1::2, 2:]) - 0.3
    return Crops(torch.stack(views), found, positions, torch.stack(classes).long(), torch.stack(pieces).long())


def change_colours(image: Tensor, generator: torch.Generator) -> Tensor:
    """Another exposure, contrast, white balance and saturation, at times grey, blurred or noisy; image [3, h, w]."""
    draws = torch.rand(12, generator=generator)
    gains = torch.exp(0.35 * (draws[:3] - 0.5))[:, None, None] * torch.exp(0.7 * (draws[3] - 0.5))
    image = (image * gains).clamp(1e-4, 1.0) ** torch.exp(0.7 * (draws[4] - 0.5))
    image = image.mean() + (image - image.mean()) * (0.6 + 0.6 * draws[5])
    grey = image.mean(dim=0, keepdim=True)
    image = grey + (image - grey) * (0.0 if draws[6] < 0.08 else 0.3 + 1.0 * draws[7])
    if draws[8] < 0.25:
        image = F.avg_pool2d(image[None], 3, 1, 1, count_include_pad=False)[0]
    if draws[9] < 0.4:
        image = image + 0.06 * draws[10] * torch.randn(image.shape, generator=generator)
    return image.clamp(0.0, 1.0)


def _find_centres(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """Centres [views, rows, columns, 2] of a grid's cells in photographs that reach from -1 to 1, x first."""
    x, y = ((torch.arange(number) + 0.5) / number for number in (columns, rows))
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return (boxes[:, None, None, :2] + boxes[:, None, None, 2:] * cells) * 2.0 - 1.0


def render_chunk(folder: Path, chunk: int, seed: int) -> Path:
    """Renders a file of photographs unless it is there: colours, classes and objects of each pixel, all 8-bit."""
    path = folder / f"{chunk:04d}.npz"
    if not path.is_file():
        photographs = [photograph_room(derive_seed(seed, "toy_rooms_vit", chunk * CHUNK + k)) for k in range(CHUNK)]
        images, labels, objects = (np.stack(kind) for kind in zip(*photographs, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, images=images, labels=labels, objects=objects)
    return path


def photograph_room(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One photograph of a room of its own: colours (h, w, 3), classes (h, w) and solids of one kind (h, w), 8-bit."""
    numbers = np.random.default_rng(seed)
    room = build_room(numbers)
    pose = walk_through(room.size, 1, start=numbers.uniform(0.0, 2.0 * math.pi))[0]
    # Cameras differ in what they see and how they are held.
    yaw, pitch, roll = numbers.normal(0.0, (0.5, 0.15, 0.05))
    pose = torch.from_numpy(_turn(yaw, pitch, roll, pose.double().numpy())).float()
    focal = 0.5 * WIDTH / math.tan(math.radians(numbers.uniform(24.0, 40.0)))
    lens = Lens(focal, focal, 0.5 * WIDTH, 0.5 * HEIGHT, WIDTH, HEIGHT, "pinhole", ())
    view = render_room(room, pose, lens)
    return view.image.numpy(), view.labels.numpy(), _find_objects(room.solids, pose[:, 3].numpy(), view)


def _turn(yaw: float, pitch: float, roll: float, pose: np.ndarray) -> np.ndarray:
    """Turns a pose in place: about the vertical, then about its own x and z axes; radians."""

    def rotate(angle: float, axis: int) -> np.ndarray:
        matrix, others = np.eye(3), [index for index in range(3) if index != axis]
        cosine, sine = math.cos(angle), math.sin(angle)
        matrix[np.ix_(others, others)] = [[cosine, -sine], [sine, cosine]]
        return matrix

    axes = rotate(yaw, 2) @ pose[:, :3] @ rotate(pitch, 0) @ rotate(roll, 2)
    return np.concatenate([axes, pose[:, 3:]], axis=1)


def _find_objects(solids: list, origin: np.ndarray, view: View) -> np.ndarray:
    """A number for each piece in view; solids of one class that follow each other at one yaw are a piece."""
    keys = [(solid.label, round(solid.yaw, 3)) for solid in solids]
    # Walls, each a solid, are pieces of their own.
    starts = [index == 0 or key != keys[index - 1] or key[0] == "wall" for index, key in enumerate(keys)]
    pieces = np.cumsum(starts)
    rays = (view.points.reshape(-1, 3).numpy() - origin).T
    _, indices = trace_rays(solids, origin, np.ascontiguousarray(rays))
    return pieces[indices].reshape(view.labels.shape).astype(np.uint8)


if __name__ == "__main__":
    main(tyro.cli(TrainingConfig, description=__doc__))
