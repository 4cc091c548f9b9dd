"""`Photographs`: pictures of anything else, on which the trained backbone has to give the original's tokens.

What rooms teach need not hold in the street. A share of other photographs among the images keeps what was known there:
learning without forgetting (Li and Hoiem, ECCV 2016), of tokens instead of class scores.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.images import list_images, load_image, read_image_header
from fit3d_ns.finetuning.draws import ImageWindow
from fit3d_ns.finetuning.optimization import AnchorConfig
from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.selection import create_generator


class Photographs:
    """Which photographs join a draw of the scenes, cut to the size of their images; functions of seed and position."""

    def __init__(self, config: AnchorConfig, size: tuple[int, int], seed: int):
        """`size` is width and height in pixels. ValueError for a folder without photographs, or with damaged ones."""
        found = {folder: list_images(folder) for folder in config.photographs}
        for folder, paths in found.items():
            if not paths:
                raise ValueError(f"--photographs: there are no photographs in {folder}; name a folder of images.")
        self.paths = list({path.resolve(): path for paths in found.values() for path in paths}.values())
        for path in self.paths:
            read_image_header(path)
        self._per_draw = config.photograph_share / (1.0 - config.photograph_share) if self.paths else 0.0
        self._size, self._seed = size, seed

    @property
    def hash(self) -> str:
        """Their number and the hash of their names and files' sizes."""
        return f"{len(self.paths)} {hash_bytes(*(f'{path.name} {path.stat().st_size}' for path in self.paths))}"

    def load(self, position: int) -> Float[Tensor, "number 3 height width"]:
        """Those that join the draw at a position, RGB in [0, 1]. ValueError names one that is damaged."""
        # Rounded so that any number of draws together has the share.
        number = int(self._per_draw * (position + 1)) - int(self._per_draw * position)
        generator = create_generator(self._seed, "photographs", position)
        width, height = self._size
        chosen = []
        for place, x, y in torch.rand(number, 3, generator=generator, dtype=torch.float64).tolist():
            image = load_image(self.paths[int(place * len(self.paths))], upright=True)
            factor = min(image.shape[1] / width, image.shape[0] / height)
            cut = max(round(width * factor), 1), max(round(height * factor), 1)
            left, top = round(x * (image.shape[1] - cut[0])), round(y * (image.shape[0] - cut[1]))
            # (h, w, 3) -> (3, h, w)
            image = image[top : top + cut[1], left : left + cut[0]].permute(2, 0, 1).float() / 255.0
            chosen.append(ImageWindow(0, 0, *cut, width, height).apply_to_map(image))
        return torch.stack(chosen) if chosen else torch.empty(0, 3, height, width)
