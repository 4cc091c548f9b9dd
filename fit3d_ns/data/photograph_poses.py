"""`find_poses`: cameras for photographs that have none, by COLMAP's incremental mapping (pycolmap), on the CPU.

Photographs lie in `images`, or in the folder itself; models are written to `sparse/<number>` beside them, where
`read_colmap` looks. Photographs of one size are taken to come from one camera. Up to `LARGEST_EXHAUSTIVE` of them every
pair is matched; of more, each with the `NUM_NEIGHBOURS` that follow it by name, as on a walk or in a video.
"""

import shutil
import tempfile
from pathlib import Path

from fit3d_ns.data.colmap import find_colmap_models, find_photographs
from fit3d_ns.data.images import list_images, read_image_header
from fit3d_ns.utils.progress import create_progress, notice, track

LARGEST_EXHAUSTIVE = 80
"""More photographs have too many pairs for minutes."""
NUM_NEIGHBOURS = 15
LONGEST_SIDE, NUM_KEYPOINTS = 1600, 4096
"""Of the pictures in which keypoints are looked for, and how many of those are kept."""
READABLE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
"""Suffixes of what COLMAP opens for certain; it passes over other files without a word."""


def find_poses(folder: Path, overwrite: bool = False) -> tuple[int, int]:
    """Writes the models of a folder; returns how many photographs the largest one registered, and of how many.

    ValueError where there are fewer than three photographs, one that COLMAP does not read, cameras already that are
    not its own to `overwrite`, or none could be made.
    """
    import pycolmap

    root, models = find_photographs(folder), folder / "sparse"
    names = [path.relative_to(root).as_posix() for path in list_images(root) if path.parent != root / "masks"]
    if len(names) < 3:
        problem = f"has {len(names)} photographs" if folder.is_dir() else "does not exist"
        raise ValueError(f"{root} {problem}; poses need three at least, better thirty.")
    if foreign := [name for name in names if not name.lower().endswith(READABLE)]:
        raise ValueError(f"COLMAP does not read {foreign[0]}; convert the photographs to JPEG.")
    usual = (folder / "transforms.json", folder / "dslr", *find_colmap_models(folder), models)
    known = next((path for path in usual if path.exists()), None)
    if known is not None and not (overwrite and models in (known, known.parent)):
        again = "--overwrite finds them again" if models in (known, known.parent) else "move it away first"
        raise ValueError(f"{known} is there already: cameras are known; {again}.")
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    is_one_size = len({read_image_header(root / name).size for name in names}) == 1
    mode = pycolmap.CameraMode.SINGLE if is_one_size else pycolmap.CameraMode.AUTO
    extraction, mapping = pycolmap.FeatureExtractionOptions(), pycolmap.IncrementalPipelineOptions()
    reader, pairing = pycolmap.ImageReaderOptions(), pycolmap.SequentialPairingOptions()
    extraction.max_image_size, extraction.sift.max_num_features = LONGEST_SIDE, NUM_KEYPOINTS
    mapping.random_seed, pairing.quadratic_overlap = 0, False
    pairing.overlap = len(names) if len(names) <= LARGEST_EXHAUSTIVE else NUM_NEIGHBOURS
    with tempfile.TemporaryDirectory(dir=folder) as work:
        database = Path(work) / "database.db"
        for name in track(names, f"Keypoints of {folder.name}"):
            pycolmap.extract_features(database, root, [name], mode, reader, extraction)
            # Calls know nothing of each other: the first one's camera is named to the others.
            reader.existing_camera_id = 1 if is_one_size else -1
        notice(f"Matching each with the {pairing.overlap} that follow ...")
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
