"""`LiftState`: everything a lift has accumulated so far, so that an interrupted one goes on where it was.

A lift is a row of named *passes* over the views. The state holds which pass is under way and how many of its views are
in the sums, and all sums, as tensors; it is written between two views, so a resumed lift does the same additions in
the same order as one that was never interrupted.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.scene.gaussians import ActivatedGaussians
from fit3d_ns.utils.files import hash_bytes, write_atomically

_FORMAT = "fit3d-lift-state-1"


@dataclass
class LiftState:
    """Sums of a lift under way; with `tensors` empty, one that has not begun."""

    identity: dict[str, str]
    """What the sums belong to; a file with another identity is refused."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """All sums and solver vectors by name."""
    numbers: dict[str, int | float] = field(default_factory=dict)
    """Counters and scalars by name."""
    residuals: list[float] = field(default_factory=list)
    """Relative residual after each pass of the conjugate gradients."""
    current_pass: str = ""
    """Name of the pass under way."""
    next_view: int = 0
    """How many views of the current pass are in the sums."""
    finished: list[str] = field(default_factory=list)
    """Names of the passes that are done."""

    def save(self, path: Path) -> None:
        """Writes the state atomically."""
        content = {
            "format": _FORMAT,
            "identity": self.identity,
            "numbers": self.numbers,
            "residuals": self.residuals,
            "current_pass": self.current_pass,
            "next_view": self.next_view,
            "finished": self.finished,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with write_atomically(path) as temporary:
            save_file(tensors, temporary, metadata={"state": json.dumps(content)})


def load_state(path: Path, identity: dict[str, str], device: torch.device) -> LiftState:
    """Reads the state of an interrupted lift, or starts a new one where there is no file.

    Raises:
        ValueError: The file is no lift state, or it belongs to another backbone, scene or setting.
    """
    path = Path(path)
    if not path.exists():
        return LiftState(identity)
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["state"])
            # `safe_open` is no dictionary: it has `keys()` and nothing to iterate.
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).to(device) for name in names}
        if content["format"] != _FORMAT:
            raise KeyError(content["format"])
    except Exception as error:
        raise ValueError(f"{path} is not the state of a lift; delete it to lift from the start.") from error
    for name, value in identity.items():
        if content["identity"].get(name) != value:
            raise ValueError(
                f"{path} belongs to a lift with another {name} ({content['identity'].get(name)}, not {value}); "
                "finish that lift, or delete the file to start anew."
            )
    return LiftState(
        identity=identity,
        tensors=tensors,
        numbers=content["numbers"],
        residuals=content["residuals"],
        current_pass=content["current_pass"],
        next_view=content["next_view"],
        finished=content["finished"],
    )


def compute_identity(
    gaussians: ActivatedGaussians,
    views: list[LiftView],
    config: LiftConfig,
    backbone: str,
    basis: PcaBasis | None,
    initial: Float[Tensor, "num_gaussians dim"] | None,
) -> dict[str, str]:
    """What the sums of a lift depend on, by the word an error message uses for it."""
    geometry = gaussians.geometry
    cameras = [part for view in views for part in (view.viewmat, view.K)]
    names = json.dumps([(view.name, view.width, view.height) for view in views])
    rendering = json.dumps([gaussians.rasterize_mode, gaussians.eps2d])
    # Where projections are kept and how often the file is written changes no sum.
    settings = {
        name: value for name, value in vars(config).items() if name not in ("cache_memory_mb", "seconds_per_checkpoint")
    }
    given = [] if basis is None else [basis.mean, basis.components]
    given += [] if initial is None else [initial]
    return {
        "backbone": backbone or "unnamed",
        "geometry": hash_bytes(rendering.encode(), *map(_to_bytes, geometry)),
        "set of views": hash_bytes(names.encode(), *map(_to_bytes, cameras)),
        "setting": hash_bytes(json.dumps(settings, sort_keys=True, default=str).encode()),
        "basis or start": hash_bytes(*map(_to_bytes, given)),
    }


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
