"""Reads pictures with one class each, as torchvision's `ImageFolder` and ImageNet's folders have them.

    <root>/
      train/<class>/*.jpg
      val/<class>/*.jpg          or test/<class>/*.jpg

Classes are numbered in the order of their folder names; both parts must have the same folders.
"""

from functools import partial
from pathlib import Path

from fit3d_ns.data.images import list_images, load_image
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet, LabelledSplit, ProbeTask


def read_image_folder(root: Path, split: LabelledSplit, task: ProbeTask) -> LabelledSet:
    """Reads one part; a root whose folders are classes gives all its pictures to either.

    Raises:
        ValueError: A part or class is missing or empty, or another task than classification.
    """
    if task != "classification":
        raise ValueError(f"{root} has folders of classes only, no labels for {task}; give another data set.")
    parts = ("train",) if split == "train" else ("val", "test")
    top = next((root / part for part in parts if (root / part).is_dir()), root)
    if top == root and any((root / part).is_dir() for part in ("train", "val", "test")):
        raise ValueError(f"{root} has no {' or '.join(part + '/' for part in parts)} beside its other part; add it.")
    classes = sorted(child.name for child in top.iterdir() if child.is_dir()) if top.is_dir() else []
    if not classes:
        raise ValueError(f"{top} has no folders; expected one folder of pictures per class.")
    frames: list[LabelledFrame] = []
    for index, name in enumerate(classes):
        paths = list_images(top / name)
        if not paths:
            raise ValueError(f"Class folder {top / name} holds no pictures; remove it or fill it.")
        frames += [
            LabelledFrame(
                name=path.relative_to(top).as_posix(),
                load_image=partial(load_image, path),
                class_index=index,
                files=(path,),
            )
            for path in paths
        ]
    return LabelledSet(root.name, frames, tuple(classes))
