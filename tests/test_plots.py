"""Figures: every one is described, none leaks, and what is drawn is where it belongs."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from skimage import data

from course_lib.show import plots

PHOTO = data.chelsea()[:224, 100:324]  # 224 224 3


def pixels(tag: str) -> np.ndarray:
    """The picture that an <img> holds."""
    file = io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', tag)[1]))
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.fixture(autouse=True)
def no_figure_leaks():
    assert not plt.get_fignums()
    yield
    assert not plt.get_fignums()


def test_show_gives_the_description_to_pages_and_logs(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: shown.append(bundle))
    plots.show(plots.grid([PHOTO]), alt='A cat & its "eyes"')
    assert 'alt="A cat &amp; its &quot;eyes&quot;"' in shown[0]["text/html"]
    assert shown[0]["text/plain"] == '[figure] A cat & its "eyes"'


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_description_is_refused(alt):
    with pytest.raises(ValueError, match="alternative text"):
        plots.show(plots.grid([PHOTO]), alt=alt)


def test_pyplot_figures_are_closed_and_not_cut_off():
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.set_ylabel("a label that would stick out", fontsize=5)
    tag = plots.image_tag(figure, "a plot")
    assert pixels(tag).shape == (100, 200, 3)
    assert (pixels(tag)[:, 0] == 255).all()  # the margin is white: nothing was clipped there


def test_pictures_are_small_and_lines_are_lossless():
    photo = plots.image_tag(plots.grid([PHOTO] * 8, title="Eight cats"), "cats")
    assert len(photo) < 150_000
    with plt.rc_context():
        for look in (lambda: None, plots.theme):
            look()
            flat = Figure((2, 2))
            flat.subplots().plot([0, 1], color="black")
            canvas = pixels(plots.image_tag(flat, "a line"))
            again = np.asarray(flat.canvas.buffer_rgba())[..., :3]
            assert np.array_equal(canvas, again)


def test_theme_sets_a_uniform_map_and_a_safe_palette():
    with plt.rc_context():
        plots.theme()
        assert plt.rcParams["image.cmap"] == "cividis"
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"][0] == plots.PALETTE[0]


# overlay --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(4, 6), st.integers(0, 99))
def test_overlay_blends_grey_and_colour_pixel_by_pixel(h, w, seed):
    random = np.random.default_rng(seed)
    image, heat = random.integers(0, 256, (h, w, 3), dtype=np.uint8), random.random((h, w), dtype=np.float32)
    found = plots.overlay(image, heat)
    assert found.dtype == np.uint8 and found.shape == (h, w, 3)
    for y in range(h):
        for x in range(w):
            r, g, b = image[y, x].astype(float)
            grey, colour = 0.299 * r + 0.587 * g + 0.114 * b, 255 * np.array(colormaps["inferno"](heat[y, x])[:3])
            np.testing.assert_allclose(found[y, x], 0.5 * grey + 0.5 * colour, atol=0.51)


def test_images_come_in_any_usual_form():
    heat = np.linspace(0, 1, 224 * 224, dtype=np.float32).reshape(224, 224)
    tensor = torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)
    expected = plots.overlay(PHOTO, heat)
    floats = tensor / 255
    for image in (tensor, tensor.permute(1, 2, 0), floats, floats.double().numpy(), floats.clone().requires_grad_()):
        assert np.array_equal(plots.overlay(image, torch.from_numpy(heat)), expected)


@pytest.mark.parametrize(
    "image, sentence",
    [
        (np.zeros((4, 5)), "RGB image"),
        (np.zeros((1, 3, 4, 5)), "Pick one image of a batch"),
        (np.zeros((4, 5, 4), np.uint8), "RGB image"),
        (np.full((4, 5, 3), 2.0), "floats in 0..1"),
        (np.full((4, 5, 3), np.nan), "floats in 0..1"),
        (np.zeros((4, 5, 3), np.int64), "int64"),
    ],
)
def test_other_images_are_refused_with_a_sentence(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        plots.grid([image])


def test_heatmaps_of_another_size_or_range_are_refused():
    with pytest.raises(ValueError, match=r"maps.heatmap\(map, size=\(224, 224\)\)"):
        plots.overlay(PHOTO, np.zeros((7, 7)))
    with pytest.raises(ValueError, match=r"Raw maps go through maps\.heatmap"):
        plots.overlay(PHOTO, np.full((224, 224), -1.0))


# grid -----------------------------------------------------------------------------------------------------------------


def test_boxes_lie_around_their_pixels_and_differ_without_colour():
    figure = plots.grid(
        [PHOTO], boxes=[torch.tensor([10, 20, 30, 60])], predicted=torch.tensor([[[0, 0, 0, 0], [5, 6, 7, 8]]])
    )
    truth, predicted = figure.axes[0].patches  # the box of zeros is not drawn
    assert truth.get_bbox().bounds == (9.5, 19.5, 20, 40)
    assert predicted.get_bbox().bounds == (4.5, 5.5, 2, 2)
    assert truth.get_linestyle() == "-" and predicted.get_linestyle() != "-"
    assert [text.get_text() for text in figure.legends[0].texts] == ["ground truth", "predicted"]


def test_a_grid_holds_each_image_once_and_leaves_the_rest_blank():
    images = torch.rand(5, 3, 8, 6)
    figure = plots.grid(images, [f"image {i}" for i in range(5)], columns=3, title="Five")
    assert [axes.get_title() for axes in figure.axes] == [f"image {i}" for i in range(5)] + [""]
    assert [len(axes.images) for axes in figure.axes] == [1] * 5 + [0]
    assert not figure.legends


def test_masks_tint_their_pixels_only_and_name_the_classes_that_occur():
    mask = np.zeros((224, 224), np.uint8)
    mask[:50], mask[50:60] = 2, 255
    figure = plots.grid([PHOTO, PHOTO], masks=[mask, None], classes=["background", "dog", "cat"])
    tinted, plain = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert np.array_equal(plain, PHOTO) and np.array_equal(tinted[60:], PHOTO[60:])
    np.testing.assert_allclose(
        tinted[0, 0], 0.35 * PHOTO[0, 0] + 0.65 * 255 * np.array(plots.CLASS_COLOURS[1]), atol=0.51
    )
    assert [text.get_text() for text in figure.legends[0].texts] == ["cat", "ignored"]
    with pytest.raises(ValueError, match="mask of the image's size"):
        plots.grid([PHOTO], masks=[mask[:9]])


@pytest.mark.parametrize("name", ["titles", "heatmaps", "boxes", "predicted", "masks"])
def test_a_list_of_another_length_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has 1 entries for 2 images"):
        plots.grid([PHOTO, PHOTO], **{name: ["a"] if name == "titles" else [None]})


def test_titles_and_legends_stay_inside_the_figure():
    figure = plots.grid(
        [PHOTO] * 3,
        ["a", "b", "c"],
        boxes=[[1, 1, 9, 9]] * 3,
        predicted=[[2, 2, 8, 8]] * 3,
        title="A finding that needs more than one line, since it says what is to be seen and also why it is so",
    )
    plots.image_tag(figure, "cats")
    renderer, whole = figure.canvas.get_renderer(), figure.bbox
    for part in (*figure.legends, figure._suptitle, *(axes.title for axes in figure.axes)):
        box = part.get_window_extent(renderer)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 + 1


# curve ----------------------------------------------------------------------------------------------------------------


def test_curves_differ_without_colour_and_mark_their_best_point():
    figure = plots.curve(
        [0, 1, 2, 3],
        {"CAM": [1, 5, 2, float("nan")], "Dist-CAM": torch.tensor([1, 2, 3, 4])},
        "threshold",
        "accuracy (%)",
        "Better",
        best=True,
        baselines={"centre box": 2.5},
    )
    first, second, baseline = figure.axes[0].lines
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_markevery() == [1] and second.get_markevery() == [3]
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == ["CAM: 5 at 1", "Dist-CAM: 4 at 3"]
    assert set(baseline.get_ydata()) == {2.5}
    assert figure.axes[0].texts[0].get_text() == "centre box 2.5"


def test_a_legend_shows_no_mark_that_the_curve_has_not():
    (line,) = plots.curve([0, 1], {"CAM": [1, 5]}, "epoch", "loss", "Falls").axes[0].lines
    assert not line.get_marker()


def test_a_curve_of_another_length_is_refused():
    with pytest.raises(ValueError, match="'CAM' has 2 values for 3"):
        plots.curve([0, 1, 2], {"CAM": [1, 2]}, "x", "y", "title")


# rank list ------------------------------------------------------------------------------------------------------------

PORTRAIT, LANDSCAPE = PHOTO[:128, :64], PHOTO[:60, :120]


@pytest.mark.parametrize("image", [PORTRAIT, LANDSCAPE, torch.rand(3, 50, 50)])
def test_a_rank_list_frames_each_answer_and_puts_its_map_under_it(image):
    size = image.shape[1:] if isinstance(image, torch.Tensor) else image.shape[:2]
    heat = torch.rand(4, *size)
    figure = plots.rank_list(
        image,
        [image] * 3,
        torch.tensor([False, True, False]),
        torch.tensor([0.1, 0.25, 1 / 3]),
        probe_heatmap=heat[0],
        heatmaps=heat[1:],
        names=["owl", "wren", "finch"],
        probe_name="wren",
        title="The first right answer is at rank 2",
    )
    top = [axes for axes in figure.axes if axes.get_title(loc="center")]
    assert [axes.get_title(loc="center") for axes in top] == [
        "probe\nwren",
        "✗ 1 · 0.1\nowl",
        "✓ 2 · 0.25\nwren",
        "✗ 3 · 0.333\nfinch",
    ]
    frames = [axes.patches[0] for axes in top[1:]]
    assert not top[0].patches and all(frame.get_bbox().bounds == (-0.5, -0.5, size[1], size[0]) for frame in frames)
    styles, colours = [frame.get_linestyle() for frame in frames], [frame.get_edgecolor() for frame in frames]
    assert styles[0] == styles[2] != styles[1] and colours[0] == colours[2] != colours[1]  # not by colour alone
    drawn = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    assert len(drawn) == 8
    for index, overlaid in enumerate(axes for axes in figure.axes if axes.images and axes not in top):
        expected = plots.overlay(image, heat[index])
        assert np.array_equal(np.asarray(overlaid.images[0].get_array()), expected)
    wide, high = figure.get_size_inches()
    assert (wide > high) or size[0] > size[1]
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels == ["✓ correct", "✗ wrong", "above each: rank · distance"]


def test_a_rank_list_without_maps_has_one_row_and_keeps_everything_inside():
    figure = plots.rank_list(
        PORTRAIT,
        [PORTRAIT, LANDSCAPE] * 3,
        [True] * 6,
        np.arange(6) / 7,
        title="A finding that needs more than one line, since it says what is to be seen and why it is so",
    )
    plots.image_tag(figure, "a rank list")
    assert len([axes for axes in figure.axes if axes.images]) == 7
    renderer, whole = figure.canvas.get_renderer(), figure.bbox
    for part in (*figure.legends, figure._suptitle, *(axes.title for axes in figure.axes)):
        box = part.get_window_extent(renderer)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 + 1


def test_only_the_probe_may_have_a_map():
    figure = plots.rank_list(LANDSCAPE, [LANDSCAPE] * 2, [True, False], [0.1, 0.2], probe_heatmap=np.zeros((60, 120)))
    assert len([axes for axes in figure.axes if axes.images]) == 4  # probe, two answers, and one map


def test_the_description_of_a_rank_list_tells_every_verdict():
    assert plots.rank_list_alt("a wren", torch.tensor([False, True]), [0.1, 0.25]) == (
        "Rank list of a wren, nearest first: 1 wrong at 0.1, 2 correct at 0.25."
    )


def test_a_rank_list_that_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="distances has 1 entries for 2 gallery images"):
        plots.rank_list(PHOTO, [PHOTO] * 2, [True, True], [0.1])
    with pytest.raises(ValueError, match="gallery is empty"):
        plots.rank_list(PHOTO, [], [], [])


# Linear RGB as seen without red or green cones (Machado et al., 2009, severity 1), and OKLab of linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
OPPONENTS = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def least_distance(colours, vision):
    """Of the two colours that look most alike, in OKLab, where black and white are 1 apart."""
    colours = np.array(colours)
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(np.clip(linear @ np.transpose(VISIONS[vision]), 0, 1) @ np.transpose(CONES)) @ np.transpose(OPPONENTS)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1)
    return apart[np.triu_indices(len(colours), 1)].min()


@pytest.mark.parametrize("vision", VISIONS)
def test_classes_have_colours_that_can_be_told_apart(vision):
    """Six creatures, twelve groups of photographs, twenty classes of VOC; the last is the grey of ignored pixels."""
    grey = plots.LABEL_COLOURS[255]
    for count, wanted in (6, 0.1), (12, 0.09), (20, 0.055):
        assert least_distance([*plots.CLASS_COLOURS[:count], grey], vision) > wanted * (2 if vision == "usual" else 1)


def test_near_twins_are_noticed():
    """Green and brown of seaborn's palette, two greens for whoever has no red cones."""
    assert least_distance([plots.PALETTE[2], plots.PALETTE[5]], "no red cones") < 0.04
