"""`write_story`: one page that tells what happened from a capture to a fine-tuned backbone, with a verdict.

FOLDER/index.html       the page; it needs only the pictures beside it
       room.png         photographs of the capture
       features.png     two views of the same corner: photograph, original, fine-tuned and lifted, in one basis
       depth.png        depth read from frozen features beside the truth, where it was probed
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from fit3d_ns.analysis.correspondence import create_grid_points, find_covisible, measure_rotation
from fit3d_ns.analysis.pictures import compose_panel, save_picture
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.report.feature_figure import FeatureFigureConfig, save_feature_figure
from fit3d_ns.report.prediction_figure import read_predictions, save_prediction_figure
from fit3d_ns.report.token_columns import load_figure_images, open_scenes
from fit3d_ns.scene import FeatureScene, PosedCapture, View, create_depth_view, load_scene
from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.results import load_result
from fit3d_ns.utils.selection import select_evenly

MEASURES = {
    "depth": ("rmse", "Error of depth that a linear layer reads from the features", "m", False),
    "recall": ("recall_10px", "Points found again in another view, within 10 pixels", "%", True),
    "consistency": ("centred_cosine", "How alike a point looks from two views (0 = chance, 1 = the same)", "", True),
}
"""Of a comparison: name in the record, words, unit, and whether more is better."""
SAME = 0.02
"""Relative changes below this count neither way: other seeds differ by as much."""
_ANGLES = (20.0, 60.0)
"""Degrees between two views that show one corner from two sides."""
_TRIED_VIEWS = 24


@dataclass(frozen=True)
class Comparison:
    """A measurement by the original and by the fine-tuned backbone."""

    measure: str
    """One of `MEASURES`."""
    original: Path
    """Record of fit3d-probe."""
    finetuned: Path
    where: str
    """On what, in words: "in a room that neither step has seen"."""

    @property
    def values(self) -> tuple[float, float]:
        """Original and fine-tuned, in the unit of `MEASURES`."""
        name, _, unit, _ = MEASURES[self.measure]
        before, after = (float(load_result(path).metrics[name]) for path in (self.original, self.finetuned))
        factor = 100.0 if unit == "%" else 1.0
        return factor * before, factor * after

    @property
    def shown(self) -> tuple[str, str]:
        """`values` as text."""
        before, after = (
            f"{value:.1f}" if MEASURES[self.measure][2] == "%" else f"{value:.3f}" for value in self.values
        )
        return before, after

    @property
    def gain(self) -> float:
        """Relative change towards the better: 0.1 is better by a tenth."""
        before, after = self.values
        change = (after - before) / max(abs(before), 1e-9)
        return change if MEASURES[self.measure][3] else -change

    @property
    def verdict(self) -> str:
        """In words."""
        words = f"{abs(self.gain):.1%} {'better' if self.gain > 0 else 'worse'}"
        return f"about the same, {words}" if abs(self.gain) < SAME else words


@dataclass(frozen=True)
class Story:
    """What the page tells; nothing is measured here."""

    title: str
    scene: Path
    """The lifted scene that is shown."""
    comparisons: Sequence[Comparison]
    predictions: Sequence[Path]
    """Folders of depth predictions, the original's first; empty where depth was not probed."""
    stages: Sequence[tuple[str, float, str]]
    """Words, seconds, and the command line of each step."""
    next_commands: Sequence[tuple[str, str]]
    """Words and command line."""
    notes: Sequence[str] = ()
    """What a reader has to know about the figures."""


def write_story(story: Story, backbones: ComparedBackbones, folder: Path, device: str = "cpu") -> Path:
    """Draws the pictures and writes the page; returns its path. `backbones` are the original and the fine-tuned one."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_corner(story.scene, backbones, folder / "features.png", device)
    scene_index = open_scenes([story.scene], device=device)
    capture = load_scene(story.scene, device).capture()
    shown = load_figure_images([view.frame.image_path for view in select_evenly(find_whole(capture), 4)], scene_index)
    save_picture(compose_panel([[image.image for image in shown]]), folder / "room.png")
    if story.predictions:
        save_prediction_figure(read_predictions(story.predictions), folder / "depth.png", max_frames=2)
    path = folder / "index.html"
    with write_atomically(path) as temporary:
        temporary.write_text(_write_html(story), encoding="utf-8")
    return path


def draw_corner(scene_path: Path, backbones: ComparedBackbones, path: Path, device: str = "cpu") -> None:
    """Writes a feature figure of two views of one corner, in one basis, the lifted scene's features included."""
    scene_index = open_scenes([scene_path], device=device)
    views = choose_corner(load_scene(scene_path, device))
    images = load_figure_images([view.frame.image_path for view in views], scene_index)
    save_feature_figure(
        images, [backbones], path, FeatureFigureConfig(sharing="backbone"), has_scenes=True, device=device
    )


def choose_corner(scene: FeatureScene) -> list[View]:
    """The two views that share most of what they see, among those that look at it from clearly different sides."""
    capture = scene.capture()
    views = select_evenly(find_whole(capture), _TRIED_VIEWS)
    depth_views = [create_depth_view(capture, view, lambda: scene) for view in views]
    best, chosen = -1.0, [views[0], views[-1]]
    for first, view in enumerate(depth_views):
        points = create_grid_points(*view.size, (12, 16))
        for second in range(first + 1, len(views)):
            other = depth_views[second]
            if not _ANGLES[0] <= float(measure_rotation(view.camera_to_world, other.camera_to_world)) <= _ANGLES[1]:
                continue
            shared = len(find_covisible(view, other, points)[0]) / len(points)
            if shared > best:
                best, chosen = shared, [views[first], views[second]]
    return chosen


def find_whole(capture: PosedCapture) -> list[View]:
    """Views of which nothing is masked, if there are several: hidden parts of photographs explain nothing."""
    whole = [view for view in capture.views if bool(capture.load_valid_mask(view).all())]
    return whole if len(whole) > 1 else list(capture.views)


def describe_comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    """One line each: words, original, arrow, fine-tuned, verdict."""
    lines = []
    for item in comparisons:
        _, words, unit, _ = MEASURES[item.measure]
        lines.append(f"{words}: {' → '.join(item.shown)}{' ' if unit else ''}{unit} ({item.verdict})")
    return lines


def summarise(comparisons: Sequence[Comparison]) -> str:
    """The verdict over all of them, in one sentence."""
    better = sum(item.gain >= SAME for item in comparisons)
    worse = sum(item.gain <= -SAME for item in comparisons)
    if better == len(comparisons):
        return "Fine-tuning helped in every measure."
    helped = f"Fine-tuning helped in {better} of {len(comparisons)} measures"
    if better and not worse:
        return f"{helped}; the others are within {SAME:.0%}, which one run cannot tell apart."
    if better:
        return f"{helped} and cost something in {worse}."
    return "Fine-tuning did not help here; more steps and more scenes usually do."


def _keep_words(line: str) -> str:
    """A command line that breaks between its words, not after the dashes in them."""
    return " ".join(f"<span>{html.escape(word)}</span>" for word in line.split())


def _write_html(story: Story) -> str:
    rows = []
    for item in story.comparisons:
        _, words, unit, more = MEASURES[item.measure]
        before, after = item.shown
        kind = "same" if abs(item.gain) < SAME else "good" if item.gain > 0 else "bad"
        label = f"{words}{f' ({unit})' if unit else ''}, {'more' if more else 'less'} is better"
        rows.append(
            f"<tr><td>{html.escape(label)}<br><small>{html.escape(item.where)}</small></td>"
            f"<td class=number>{before}</td><td>→</td><td class=number><b>{after}</b></td>"
            f"<td class={kind}>{html.escape(item.verdict)}</td></tr>"
        )
    total = sum(seconds for _, seconds, _ in story.stages)
    stages = "".join(
        f"<tr><td>{html.escape(words)}</td><td class=number>{seconds:.0f} s</td>"
        f"<td><code>{_keep_words(line)}</code></td></tr>"
        for words, seconds, line in story.stages
    )
    following = "".join(
        f"<li>{html.escape(words)}<pre>{html.escape(line)}</pre></li>" for words, line in story.next_commands
    )
    depth = (
        "<h2>Depth, read from frozen features</h2><p>One linear layer was trained on each backbone's features in the "
        "rooms that were lifted; this is another room. Left to right: photograph, what the original's features say, "
        "what the fine-tuned ones say, the truth, and both errors.</p>"
        + '<a class=picture href="depth.png"><img src="depth.png" alt="depth"></a>'
        if story.predictions
        else ""
    )
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in story.notes)
    return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=html.escape(story.title), verdict=html.escape(summarise(story.comparisons)), notes=notes,
        rows="".join(rows), depth=depth, stages=stages, total=f"{total:.0f}", following=following,
    )  # fmt: skip
