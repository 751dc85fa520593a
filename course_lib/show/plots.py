"""Figures for the lessons: one theme, heatmaps over photographs, grids, curves; each with alternative text.

    plots.theme()
    plots.show(plots.grid(photographs, names, heatmaps=heat, boxes=truth, predicted=boxes), alt="Four birds ...")

Functions return a Figure that pyplot knows nothing of, so that nothing leaks and nothing is shown twice. Colours are
safe for colour-blind readers, and nothing is told by colour alone.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import seaborn
from IPython.display import display
from jaxtyping import UInt8
from matplotlib import colormaps, patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy import ndarray
from PIL import Image
from torch import Tensor

from course_lib.evaluate.segmentation import IGNORE

Array = Tensor | ndarray
Numbers = Array | Sequence[float | int]
Each = Array | Sequence  # one entry for each image
PALETTE = seaborn.color_palette("colorblind")
# Of classes: each was chosen as far as possible from those before it and from the grey of ignored pixels, as seen by
# the usual eye and by readers without red or green cones (OKLab; Machado et al., 2009).
CLASS_COLOURS = [
    to_rgb(f"#{code}")
    for code in "aa0055 0000ff 00ff00 ff55ff 80ffff 009500 006a95 6a00aa 2a5500 ff4055 "
    "ffbfaa aabf15 aa55d4 aabfff aaff95 ff95d4 6a95ea d400aa 404080 40bf80".split()
]
LABEL_COLOURS = [CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)] for label in range(IGNORE)] + [(0.6, 0.6, 0.6)]
GREY = "0.35"
HALO = {"linewidth": 1.8, "path_effects": [patheffects.withStroke(linewidth=4, foreground="black")]}
BOXES = {
    "ground truth": {"color": "white", "linestyle": "-", **HALO},
    "predicted": {"color": PALETTE[9], "linestyle": (0, (4, 2)), **HALO},
}
VERDICTS = {  # of a ranked image: sign, word, its frame
    True: ("✓", "correct", {"color": PALETTE[2], "linestyle": "-", "linewidth": 3}),
    False: ("✗", "wrong", {"color": PALETTE[3], "linestyle": (0, (2, 1)), "linewidth": 3}),
}


def theme() -> None:
    """Sets the look of all figures: seaborn's white grid, a colour-blind palette, cividis for images."""
    seaborn.set_theme(
        style="whitegrid",
        palette="colorblind",
        rc={
            "image.cmap": "cividis",
            "figure.figsize": (6.4, 3.8),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.titlesize": "large",
            "grid.color": "0.9",
        },
    )


def show(figure: Figure, alt: str) -> None:
    """Shows a figure with a description that screen readers, web pages and logs carry along.

    Args:
        alt: what is to be seen and what follows from it, in a sentence or two.
    """
    display({"text/html": image_tag(figure, alt), "text/plain": f"[figure] {alt}"}, raw=True)


def image_tag(figure: Figure, alt: str, attributes: str = "") -> str:
    """The figure as an HTML `<img>`, embedded as WebP, lossless unless that is much larger (photographs); closes it."""
    if not alt.strip():
        raise ValueError(
            "Every figure needs alternative text, but alt is empty. Say what is to be seen and what follows from it."
        )
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")  # a figure from elsewhere: nothing is cut off
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    files = []
    for options in ({"lossless": True}, {"quality": 75}):
        file = io.BytesIO()
        pixels.save(file, "webp", **options)
        files.append(file.getvalue())
    exact, close = files
    data = base64.b64encode(exact if len(exact) < 2 * len(close) else close).decode()
    return (
        f'<img alt="{escape(alt)}" width="{pixels.width}" style="max-width:100%;height:auto" {attributes}'
        f'src="data:image/webp;base64,{data}">'
    )


def overlay(image: Array, heatmap: Array) -> UInt8[ndarray, "H W 3"]:
    """The image in grey under its heatmap in colour: black is low, purple and orange lie between, yellow is high.

    Only the heatmap has colour, so that a red motorcycle is not taken for a hot one.

    Args:
        image: (H, W, 3) or (3, H, W), uint8 or float in 0..1.
        heatmap: (H, W) in 0..1, as `maps.heatmap` gives it.
    """
    image, heatmap = _rgb(image), _array(heatmap)
    if heatmap.shape != image.shape[:2]:
        raise ValueError(
            f"A heatmap of the image's size {image.shape[:2]} was expected, but {heatmap.shape} came. "
            f"maps.heatmap(map, size={image.shape[:2]}) gives one."
        )
    if not (heatmap.min() >= 0 and heatmap.max() <= 1):
        raise ValueError(
            f"A heatmap in 0..1 was expected, but values from {heatmap.min():.3g} to {heatmap.max():.3g} came. "
            "Raw maps go through maps.heatmap first."
        )
    grey = image @ np.array([0.299, 0.587, 0.114])
    colours = colormaps["inferno"](heatmap.astype(np.float32))[..., :3] * 255
    return ((grey[..., None] + colours) / 2).round().astype(np.uint8)


def grid(
    images: Each,
    titles: Each | None = None,
    *,
    heatmaps: Each | None = None,
    boxes: Each | None = None,
    predicted: Each | None = None,
    masks: Each | None = None,
    classes: Sequence[str] | None = None,
    columns: int = 4,
    title: str | None = None,
    side: float = 2.3,
) -> Figure:
    """A grid of images, each with its heatmap, boxes and mask if there are any.

    Args:
        images: each (H, W, 3) or (3, H, W), uint8 or float in 0..1.
        titles: one for each image.
        heatmaps: each (H, W) in 0..1. Here and below, None leaves an image as it is.
        boxes: ground truth, each (4,) or (n, 4) in pixels, x0 y0 x1 y1 with x1, y1 one past the last pixel: solid
            lines.
        predicted: boxes in the same form: dashed lines. A box of zeros is no box.
        masks: each (H, W), label images: 0 is background, 255 is ignored (grey).
        classes: names of the labels, in their order, for a legend of those that occur.
        title: states the finding, over the whole figure.
        side: width of an image on the page, in inches.
    """
    images = [_rgb(image) for image in images]
    given = {"titles": titles, "heatmaps": heatmaps, "boxes": boxes, "predicted": predicted, "masks": masks}
    given = {name: _each(name, entries, len(images), "images") for name, entries in given.items()}
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    ratio = max(image.shape[0] / image.shape[1] for image in images)
    lines = max(0 if text is None else text.count("\n") + 1 for text in given["titles"])
    size = columns * side, rows * (side * ratio + 0.22 * lines) + 0.4 * bool(title)
    figure = Figure(size, layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    legend, present = {}, set()
    for axes, image, text, heatmap, *kinds, mask in zip(panels, images, *given.values()):
        if heatmap is not None:
            image = overlay(image, heatmap)
        if mask is not None:
            image = _tint(image, _array(mask))
            present.update(np.unique(mask).tolist())
        axes.imshow(image)
        for (kind, style), corners in zip(BOXES.items(), kinds):
            if corners is not None:
                legend[kind] = Line2D([], [], **style)
                for x0, y0, x1, y1 in _array(corners).reshape(-1, 4):
                    if x1 > x0 and y1 > y0:  # -0.5: pixel 0 reaches from -0.5 to 0.5
                        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, **style))
        axes.set_title(text or "", fontsize="small", pad=3, loc="center")
    if classes is not None:
        for label in sorted(present - {0}):
            legend["ignored" if label == IGNORE else classes[label]] = Patch(facecolor=LABEL_COLOURS[label])
    abreast = max(1, int(columns * side / 1.5))
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(legend) // abreast))
    return _around(figure, title, legend, abreast)


def rank_list(
    probe: Array,
    gallery: Each,
    correct: Numbers,
    distances: Numbers,
    *,
    probe_heatmap: Array | None = None,
    heatmaps: Each | None = None,
    names: Sequence[str] | None = None,
    probe_name: str = "",
    title: str | None = None,
) -> Figure:
    """A probe and the gallery images that answer it, nearest first, each framed as correct or wrong; maps underneath.

    What must not be compared with the probe (itself; junk and its own camera in re-identification) is left out before,
    as `metric_learning.rules.ranked` does it. `rank_list_alt` describes the figure.

    Args:
        probe, gallery: images (H, W, 3) or (3, H, W), uint8 or float in 0..1; portrait or landscape.
        correct: whether each gallery image is of the probe's class or identity.
        distances: one for each gallery image, in its title.
        probe_heatmap, heatmaps: of the probe and of each gallery image, (H, W) in 0..1: drawn over them in a second
            row, which stays empty where there is none.
        names: a line more for each title, such as the class.
        probe_name: the same for the probe.
        title: states the finding, over the whole figure.
    """
    images = [_rgb(image) for image in (probe, *gallery)]
    given = {"correct": correct, "distances": distances, "heatmaps": heatmaps, "names": names}
    given = {name: _each(name, entries, len(gallery), "gallery images") for name, entries in given.items()}
    if not given["correct"]:
        raise ValueError(
            "A rank list needs at least one gallery image, but gallery is empty. A probe for which nothing is "
            "kept is left out of the evaluation, too."
        )
    heat = [probe_heatmap, *given["heatmaps"]]
    rows = 2 if any(map is not None for map in heat) else 1
    ratio = max(image.shape[0] / image.shape[1] for image in images)
    lines = 2 if names or probe_name else 1
    width = 1.3 / ratio**0.5  # of an image on the page: all have one area
    height = rows * width * ratio + 0.22 * lines + 0.3 + 0.3 * bool(title)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    figure = Figure(((len(images) + 0.25) * width, height), layout=layout)
    ratios = [1, 0.25, *[1] * len(gallery)]  # the second column keeps the probe apart
    panels = figure.subplots(rows, len(ratios), squeeze=False, width_ratios=ratios)
    for axes in panels.flat:
        axes.set_axis_off()
        axes.set_anchor("N")
    columns = np.delete(panels, 1, 1).T
    legend, names = {}, [probe_name, *(names or [""] * len(gallery))]
    for rank, (column, image, map, name) in enumerate(zip(columns, images, heat, names)):
        for axes, drawn in zip(column, [image] if map is None else [image, overlay(image, map)]):
            axes.imshow(drawn)
        heading, colour = "probe", "black"
        if rank:
            sign, verdict, style = VERDICTS[bool(correct[rank - 1])]
            heading, colour = f"{sign} {rank} · {float(distances[rank - 1]):.3g}", style["color"]
            height, width, _ = image.shape
            column[0].add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, clip_on=False, **style))
            legend[f"{sign} {verdict}"] = Line2D([], [], **style)
        text = f"{heading}\n{name}" if lines == 2 else heading
        column[0].set_title(text, fontsize="small", pad=4, loc="center", color=colour)
    legend = dict(sorted(legend.items())) | {"above each: rank · distance": Line2D([], [], linestyle="none")}
    return _around(figure, title, legend, 3)


def rank_list_alt(probe: str, correct: Numbers, distances: Numbers) -> str:
    """What a rank list shows, in words: what the probe is, and each answer with its rank, verdict and distance."""
    answers = ", ".join(
        f"{rank} {VERDICTS[bool(right)][1]} at {float(distance):.3g}"
        for rank, (right, distance) in enumerate(zip(correct, distances), 1)
    )
    return f"Rank list of {probe}, nearest first: {answers}."


def curve(
    x: Numbers,
    ys: Mapping[str, Numbers],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    best: bool = False,
    baselines: Mapping[str, float | int] | None = None,
) -> Figure:
    """Curves over a common x, told apart by line style as well as by colour.

    Args:
        ys: name of the curve -> its values.
        xlabel, ylabel: with the unit.
        title: states the finding.
        best: marks the highest point of each curve and names it in the legend.
        baselines: name -> value, as grey horizontal lines.
    """
    figure = Figure()  # of the theme's size and layout
    axes = figure.subplots()
    x = _array(x)
    for (name, y), colour, style in zip(ys.items(), cycle(PALETTE), cycle(["-", "--", "-.", ":"])):
        y = _array(y)
        if y.shape != x.shape:
            raise ValueError(f"The curve {name!r} has {y.size} values for {x.size} values of x. Give one for each.")
        mark = []
        if best and not np.isnan(y).all():
            mark = [int(np.nanargmax(y))]
            name = f"{name}: {y[mark[0]]:.3g} at {x[mark[0]]:.3g}"
        axes.plot(
            x,
            y,
            label=name,
            color=colour,
            linewidth=2,
            linestyle=style,
            marker="o" if mark else "",
            markevery=mark,
            markersize=9,
            markeredgecolor="white",
        )
    for name, value in (baselines or {}).items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            f"{name} {value:.3g}",
            (1, value),
            (0, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize="small",
            color=GREY,
            zorder=3,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, wrap=True)
    axes.margins(x=0.02, y=0.12)
    if best or len(ys) > 1:
        axes.legend(frameon=False, fontsize="small")
    return figure


def _array(values):
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _each(name, entries, count, images):
    """What is given for each image; None for each of them if nothing is."""
    if entries is None:
        return [None] * count
    if len(entries) != count:
        raise ValueError(f"{name} has {len(entries)} entries for {count} {images}. Give one for each.")
    return list(entries)


def _rgb(image):  # h w 3
    """The image as bytes with channels last."""
    image = _array(image)
    if image.ndim == 3 and image.shape[-1] != 3 and image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"An RGB image of shape (H, W, 3) or (3, H, W) was expected, but {image.shape} came. "
            "Pick one image of a batch; repeat a grey image three times."
        )
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"An image of uint8 or of floats in 0..1 was expected, but {image.dtype} from {image.min():.3g} to "
            f"{image.max():.3g} came. Show the image as it was before normalise."
        )
    return (image * 255).round().astype(np.uint8)


def _tint(image, mask):  # H W 3, H W
    """The image with its labelled pixels tinted; background is no label."""
    if mask.shape != image.shape[:2]:
        raise ValueError(f"A mask of the image's size {image.shape[:2]} was expected, but {mask.shape} came.")
    tinted = 0.35 * image + 0.65 * 255 * np.array(LABEL_COLOURS)[mask.astype(int)]
    return np.where(mask[..., None] == 0, image, tinted.round()).astype(np.uint8)


def _around(figure, title, handles, columns):
    """The figure with a title above it and a legend below it, if there is something to say."""
    if title:
        figure.suptitle(title, fontsize="medium", x=0.01, ha="left", wrap=True)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small", frameon=False
        )
    return figure
