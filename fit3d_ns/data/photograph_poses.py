"""`find_poses`: cameras for photographs that have none, by COLMAP's incremental mapping (pycolmap), on the CPU.

Photographs lie in `images`, or in the folder itself; models are written to `sparse/<number>` beside them, where
`read_colmap` looks. Photographs of one size are taken to come from one camera. Up to `LARGEST_EXHAUSTIVE` of them every
pair is matched; of more, each with the `NUM_NEIGHBOURS` that follow it by name, as on a walk or in a video.
"""

import shutil
import tempfile
from pathlib import Path

from fit3d_ns.data.colmap import find_photographs
from fit3d_ns.data.images import list_images, read_image_header
from fit3d_ns.utils.progress import create_progress, notice, track

LARGEST_EXHAUSTIVE = 80
"""More photographs have too many pairs for minutes."""
NUM_NEIGHBOURS = 15
LONGEST_SIDE, NUM_KEYPOINTS = 1600, 4096
"""Of the pictures in which keypoints are looked for, and how many of those are kept."""


def find_poses(folder: Path, overwrite: bool = False) -> tuple[int, int]:
    """Writes the models of a folder; returns how many photographs the largest one registered, and of how many.

    ValueError where there are fewer than three photographs, models already that it may not `overwrite`, or none could
    be made.
    """
    import pycolmap

    root = find_photographs(folder)
    names = [path.relative_to(root).as_posix() for path in list_images(root)]
    if len(names) < 3:
        raise ValueError(f"{root} has {len(names)} photographs; poses need three at least, better thirty.")
    models = folder / "sparse"
    if models.exists() and not overwrite:
        raise ValueError(f"{models} is there already: cameras are known; --overwrite finds them again.")
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    headers = [read_image_header(root / name) for name in names]
    is_one_size = len({(header.width, header.height) for header in headers}) == 1
    mode = pycolmap.CameraMode.SINGLE if is_one_size else pycolmap.CameraMode.AUTO
    extraction, mapping = pycolmap.FeatureExtractionOptions(), pycolmap.IncrementalPipelineOptions()
    extraction.max_image_size, extraction.sift.max_num_features = LONGEST_SIDE, NUM_KEYPOINTS
    mapping.random_seed = 0
    with tempfile.TemporaryDirectory(dir=folder) as work:
        database = Path(work) / "database.db"
        for name in track(names, f"Keypoints of {folder.name}"):
            pycolmap.extract_features(database, root, [name], mode, extraction_options=extraction)
        is_exhaustive = len(names) <= LARGEST_EXHAUSTIVE
        notice(f"Matching {'every pair' if is_exhaustive else f'each with the {NUM_NEIGHBOURS} that follow'} ...")
        if is_exhaustive:
            pycolmap.match_exhaustive(database)
        else:
            pairing = pycolmap.SequentialPairingOptions()
            pairing.overlap, pairing.quadratic_overlap = NUM_NEIGHBOURS, False
            pycolmap.match_sequential(database, pairing_options=pairing)
        with create_progress() as bar:
            task = bar.add_task(f"Cameras of {folder.name}", total=len(names), note="")
            found = pycolmap.incremental_mapping(
                database, root, Path(work), mapping, next_image_callback=lambda: bar.advance(task)
            )
        if not found:
            raise ValueError(f"No two photographs of {root} could be connected; take more, with more overlap.")
        if models.exists():
            shutil.rmtree(models)
        for number, model in found.items():
            (models / str(number)).mkdir(parents=True)
            model.write(models / str(number))
    return max(model.num_reg_images() for model in found.values()), len(names)
