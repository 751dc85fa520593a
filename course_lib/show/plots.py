"""Figures for the lessons: one theme, heatmaps over photographs, grids, curves; each with alternative text.

    plots.theme()
    plots.show(plots.grid(photographs, names, heatmaps=heat, boxes=truth, predicted=boxes), alt="Four birds; the box ...")

Functions return a Figure that pyplot knows nothing of, so that nothing leaks and nothing is shown twice. Colours are safe
for colour-blind readers, and nothing is told by colour alone.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
import seaborn
from IPython.display import display
from jaxtyping import Shaped, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy import ndarray
from PIL import Image
from torch import Tensor

Array = Tensor | ndarray
Numbers = Tensor | ndarray | Sequence[float | int]
IGNORE = 255  # the label that no class has
PALETTE = seaborn.color_palette("colorblind")
CLASSES = [colour for colour in PALETTE if len(set(colour)) > 1]  # its grey is that of ignored pixels
GREY = "0.35"
BOXES = {  # kind -> colour, line style, colour of the halo
    "ground truth": ("white", "-", "black"),
    "predicted": (PALETTE[9], (0, (4, 2)), "black"),
}
VERDICTS = {
    True: ("✓", "correct", PALETTE[2], "-"),
    False: ("✗", "wrong", PALETTE[3], (0, (2, 1))),
}  # of a ranked image


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
    tag = image_tag(figure, alt)
    display({"text/html": tag, "text/plain": f"[figure] {alt}"}, raw=True)


def image_tag(figure: Figure, alt: str, attributes: str = "") -> str:
    """The figure as an HTML `<img>`, embedded as WebP, lossless unless that is much larger (photographs are); closes it."""
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
    exact, close = _webp(pixels, lossless=True), _webp(pixels, quality=75)
    data = base64.b64encode(exact if len(exact) < 2 * len(close) else close).decode()
    return (
        f'<img alt="{escape(alt)}" width="{pixels.width}" style="max-width:100%;height:auto" {attributes}'
        f'src="data:image/webp;base64,{data}">'
    )


def _webp(pixels: Image.Image, **options: bool | int) -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, "webp", **options)
    return buffer.getvalue()


def overlay(image: Array, heatmap: Array, alpha: float = 0.5) -> UInt8[ndarray, "H W 3"]:
    """The image in grey under its heatmap in colour: black is low, purple and orange lie between, yellow is high.

    Only the heatmap has colour, so that a red motorcycle is not taken for a hot one.

    Args:
        image: (H, W, 3) or (3, H, W), uint8 or float in 0..1.
        heatmap: (H, W) in 0..1, as `maps.heatmap` gives it.
        alpha: share of the heatmap, 0..1.
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
    return ((1 - alpha) * grey[..., None] + alpha * colours).round().astype(np.uint8)


def grid(
    images: Array | Sequence[Array],
    titles: Sequence[str] | None = None,
    *,
    heatmaps: Array | Sequence[Array | None] | None = None,
    boxes: Array | Sequence[Numbers | None] | None = None,
    predicted: Array | Sequence[Numbers | None] | None = None,
    masks: Array | Sequence[Array | None] | None = None,
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
        boxes: ground truth, each (4,) or (n, 4) in pixels, x0 y0 x1 y1 with x1, y1 one past the last pixel: solid lines.
        predicted: boxes in the same form: dashed lines. A box of zeros is no box.
        masks: each (H, W), label images: 0 is background, 255 is ignored (grey).
        classes: names of the labels, in their order, for a legend of those that occur.
        title: states the finding, over the whole figure.
        side: width of an image on the page, in inches.
    """
    images = [_rgb(image) for image in images]
    given_lists = {"titles": titles, "heatmaps": heatmaps, "boxes": boxes, "predicted": predicted, "masks": masks}
    for name, given in given_lists.items():
        if given is not None and len(given) != len(images):
            raise ValueError(f"{name} has {len(given)} entries for {len(images)} images. Give one for each image.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    ratio = max(image.shape[0] / image.shape[1] for image in images)
    lines = max((text.count("\n") + 1 for text in titles), default=0) if titles else 0
    figure = Figure(
        (columns * side, rows * (side * ratio + 0.22 * lines) + 0.4 * (title is not None)), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    legend, present = {}, set()
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if index >= len(images):
            continue
        image = images[index]
        if heatmaps is not None and heatmaps[index] is not None:
            image = overlay(image, heatmaps[index])
        if masks is not None and masks[index] is not None:
            image, labels = _tint(image, _array(masks[index]))
            present |= set(labels)
        axes.imshow(image, interpolation="antialiased")
        for kind, given in {"ground truth": boxes, "predicted": predicted}.items():
            if given is not None and given[index] is not None:
                legend[kind] = _draw_boxes(axes, _array(given[index]).reshape(-1, 4), kind)
        if titles is not None:
            axes.set_title(titles[index], fontsize="small", pad=3, loc="center")
    if classes is not None:
        for label in sorted(present):
            legend["ignored" if label == IGNORE else classes[label]] = Patch(facecolor=_colour(label))
    if title:
        figure.suptitle(title, fontsize="medium", x=0.01, ha="left", wrap=True)
    if legend:
        abreast = max(1, int(columns * side / 1.5))
        figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(legend) // abreast))
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower center", ncols=abreast, fontsize="small", frameon=False
        )
    return figure


def rank_list(
    probe: Array,
    gallery: Array | Sequence[Array],
    correct: Tensor | ndarray | Sequence[bool],
    distances: Numbers,
    *,
    probe_heatmap: Array | None = None,
    heatmaps: Array | Sequence[Array] | None = None,
    names: Sequence[str] | None = None,
    probe_name: str = "",
    title: str | None = None,
    side: float = 1.3,
) -> Figure:
    """A probe and the gallery images it is answered with, nearest first, each framed as correct or wrong; maps underneath.

    What must not be compared with the probe (itself; junk and its own camera in re-identification) is left out before, as
    `metric_learning.rules.ranked` does it. `rank_list_alt` describes the figure.

    Args:
        probe, gallery: images (H, W, 3) or (3, H, W), uint8 or float in 0..1; portrait or landscape.
        correct: whether each gallery image is of the probe's class or identity.
        distances: one for each gallery image, in its title.
        probe_heatmap, heatmaps: of the probe and of each gallery image, (H, W) in 0..1: drawn over them in a second row.
        names: a line more for each title, such as the class.
        probe_name: the same for the probe.
        title: states the finding, over the whole figure.
        side: of a square image on the page, in inches; others get the same area.
    """
    probe, gallery = _rgb(probe), [_rgb(image) for image in gallery]
    for what, given in {"correct": correct, "distances": distances, "heatmaps": heatmaps, "names": names}.items():
        if given is not None and len(given) != len(gallery):
            raise ValueError(f"{what} has {len(given)} entries for {len(gallery)} gallery images. Give one for each.")
    if not gallery:
        raise ValueError(
            "A rank list needs at least one gallery image, but gallery is empty. A probe for which nothing is "
            "kept is left out of the evaluation, too."
        )
    images = [probe, *gallery]
    shown = [
        images,
        [
            image if heat is None else overlay(image, heat)
            for image, heat in zip(images, [probe_heatmap, *(heatmaps if heatmaps is not None else [])])
        ],
    ]
    shown = shown[: 1 if probe_heatmap is None and heatmaps is None else 2]
    ratio = max(image.shape[0] / image.shape[1] for image in images)
    width, lines = side / ratio**0.5, 1 if names is None and not probe_name else 2
    figure = Figure(
        ((len(images) + 0.25) * width, len(shown) * width * ratio + 0.22 * lines + 0.3 + 0.3 * (title is not None)),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    columns = figure.subplots(
        len(shown), len(images) + 1, squeeze=False, width_ratios=[1, 0.25, *[1] * len(gallery)]
    ).T  # the second one keeps the probe apart
    legend = {}
    for column, (top, *rest) in enumerate(columns):
        for axes in (top, *rest):
            axes.set_axis_off()
            axes.set_anchor("N")
        if column == 1:
            continue
        index = max(0, column - 1)
        for axes, row in zip((top, *rest), shown):
            if index < len(row):
                axes.imshow(row[index], interpolation="antialiased")
        heading, colour = "probe", "black"
        if index:
            sign, verdict, colour, style = VERDICTS[bool(correct[index - 1])]
            heading = f"{sign} {index} · {float(distances[index - 1]):.3g}"
            height, across = images[index].shape[:2]
            frame = Rectangle(
                (-0.5, -0.5), across, height, fill=False, edgecolor=colour, linewidth=3, linestyle=style, clip_on=False
            )
            top.add_patch(frame)
            legend[f"{sign} {verdict}"] = Line2D([], [], color=colour, linewidth=3, linestyle=style)
        name = (probe_name, *(names or [""] * len(gallery)))[index]
        top.set_title(
            f"{heading}\n{name}" if lines == 2 else heading, fontsize="small", pad=4, loc="center", color=colour
        )
    if title:
        figure.suptitle(title, fontsize="medium", x=0.01, ha="left", wrap=True)
    handles = {**dict(sorted(legend.items())), "above each: rank · distance": Line2D([], [], linestyle="none")}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small", frameon=False
    )
    return figure


def rank_list_alt(probe: str, correct: Tensor | ndarray | Sequence[bool], distances: Numbers) -> str:
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
    figure = Figure((6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    x = _array(x)
    for index, (name, y) in enumerate(ys.items()):
        y = _array(y)
        if y.shape != x.shape:
            raise ValueError(f"The curve {name!r} has {y.size} values for {x.size} values of x. Give one for each.")
        colour = PALETTE[index % len(PALETTE)]
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
            linestyle=["-", "--", "-.", ":"][index % 4],
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
    axes.set_title(title, fontsize="medium", loc="left", wrap=True)
    axes.margins(x=0.02, y=0.12)
    if best or len(ys) > 1:
        axes.legend(frameon=False, fontsize="small")
    return figure


def _array(values: Numbers) -> ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _rgb(image: Array) -> UInt8[ndarray, "h w 3"]:
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
    if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"An image of uint8 or of floats in 0..1 was expected, but {image.dtype} from {image.min():.3g} to "
            f"{image.max():.3g} came. Show the image as it was before normalise."
        )
    return (image * 255).round().astype(np.uint8)


def _colour(label: int) -> tuple[float, float, float]:
    return (0.6, 0.6, 0.6) if label == IGNORE else CLASSES[(label - 1) % len(CLASSES)]


def _tint(image: UInt8[ndarray, "H W 3"], mask: ndarray) -> tuple[UInt8[ndarray, "H W 3"], list[int]]:
    """The image with its labelled pixels tinted, and the labels that occur (background is no label)."""
    if mask.shape != image.shape[:2]:
        raise ValueError(f"A mask of the image's size {image.shape[:2]} was expected, but {mask.shape} came.")
    labels = [int(label) for label in np.unique(mask) if label != 0]
    tinted = image.astype(np.float32)
    for label in labels:
        tinted[mask == label] = 0.35 * tinted[mask == label] + 0.65 * 255 * np.array(_colour(label))
    return tinted.round().astype(np.uint8), labels


def _draw_boxes(axes: Axes, boxes: Shaped[ndarray, "n 4"], kind: str) -> Line2D:
    """Draws boxes of one kind and returns the line that stands for them in a legend."""
    colour, style, halo = BOXES[kind]
    around = [effects.withStroke(linewidth=4, foreground=halo)]
    for x0, y0, x1, y1 in boxes:
        if x1 > x0 and y1 > y0:  # -0.5: pixel 0 reaches from -0.5 to 0.5
            axes.add_patch(
                Rectangle(
                    (x0 - 0.5, y0 - 0.5),
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    edgecolor=colour,
                    linewidth=1.8,
                    linestyle=style,
                    path_effects=around,
                )
            )
    return Line2D([], [], color=colour, linewidth=1.8, linestyle=style, path_effects=around)
