"""Dense CRF: as the package that made the published numbers, sums over all pairs, and a lattice in plain loops."""

import inspect
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib.wsss import crf, permutohedral
from course_lib.wsss.crf import CRF_SETTINGS, crf_kernel, dense_crf, mean_field, unary_from_labels, unary_from_scores
from course_lib.wsss.permutohedral import lattice

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "china.jpg", "flower.jpg")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def photograph(name, height=120, width=160):
    """From the middle of a photograph that comes with scikit-image or scikit-learn, at half its size."""
    import skimage.data
    import sklearn.datasets

    load = sklearn.datasets.load_sample_image if name.endswith(".jpg") else lambda name: getattr(skimage.data, name)()
    image = torch.tensor(load(name)[::2, ::2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width].contiguous()


def smooth_scores(classes, height, width, seed=0):
    """Probabilities in blobs, as networks of a low resolution give them."""
    coarse = draw(1, classes, 8, 10, seed=seed, dtype=torch.float32)
    return F.interpolate(2 * coarse, (height, width), mode="bicubic")[0].softmax(0)


# the package ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip(
        "pydensecrf.densecrf", reason="pydensecrf2 is not installed here: pip install pydensecrf2, where it builds"
    )


def by_package(package, image, unary, settings):
    height, width = image.shape[:2]
    peer = package.DenseCRF2D(width, height, len(unary))
    peer.setUnaryEnergy(unary.flatten(1).numpy().copy())
    peer.addPairwiseGaussian(sxy=settings.get("gaussian_sxy", 3.0), compat=settings.get("gaussian_weight", 3.0))
    peer.addPairwiseBilateral(
        sxy=settings["bilateral_sxy"],
        srgb=settings["bilateral_srgb"],
        rgbim=image.numpy(),
        compat=settings["bilateral_weight"],
    )
    return torch.from_numpy(np.array(peer.inference(settings["iterations"]), copy=True)).view(unary.shape)


def agreement(found, expected):
    return (found.argmax(0) == expected.argmax(0)).double().mean().item()


@pytest.mark.parametrize("settings", ["seam", "p2p", "deeplab-v2", "p2p-eps", "walk"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_labels_are_those_of_the_package(package, name, settings):
    image = photograph(name)
    unary = unary_from_scores(smooth_scores(21, *image.shape[:2], seed=len(name)))
    expected = by_package(package, image, unary, CRF_SETTINGS[settings])
    found = dense_crf(image, unary, **CRF_SETTINGS[settings])
    print(f"labels {agreement(found, expected):.6f}, largest difference {(found - expected).abs().max():.1e}")
    assert agreement(found, expected) >= 0.999
    assert agreement(-unary, expected) < 0.999  # the CRF does something


@pytest.mark.parametrize("iterations", [1, 10])
@pytest.mark.parametrize("settings", ["seam", "p2p", "deeplab-v2"])
def test_hard_labels_too(package, settings, iterations):
    image = photograph("chelsea")
    labels = smooth_scores(21, *image.shape[:2]).argmax(0)
    unary, settings = unary_from_labels(labels, 21), CRF_SETTINGS[settings] | {"iterations": iterations}
    assert agreement(dense_crf(image, unary, **settings), by_package(package, image, unary, settings)) >= 0.999


@pytest.mark.parametrize("side", [1, 2, 40])
def test_a_constant_image_as_in_the_package(package, side):
    image = torch.full((side, 2 * side, 3), 7, dtype=torch.uint8)
    unary = draw(3, side, 2 * side, dtype=torch.float32).abs()
    expected = by_package(package, image, unary, CRF_SETTINGS["seam"])
    torch.testing.assert_close(dense_crf(image, unary), expected, rtol=0, atol=1e-4)


def test_unaries_are_those_of_the_package(package):
    from pydensecrf import utils

    scores, labels = smooth_scores(5, 12, 16), smooth_scores(5, 12, 16).argmax(0)
    expected = torch.from_numpy(utils.unary_from_softmax(scores.numpy()))
    torch.testing.assert_close(unary_from_scores(scores).flatten(1), expected)
    expected = torch.from_numpy(utils.unary_from_labels(labels.numpy(), 5, 0.7, zero_unsure=False))
    torch.testing.assert_close(unary_from_labels(labels, 5).flatten(1), expected)


# sums over all pairs of pixels ----------------------------------------------------------------------------------------


def gaussians(image, sxy, srgb):
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].reshape(2, -1) / sxy
    points = [x, y] if srgb is None else [x, y, *(image.reshape(-1, 3).T.numpy() / srgb)]
    return np.exp(-0.5 * sum((axis[:, None] - axis[None]) ** 2 for axis in points))


def by_pairs(image, unary, settings):
    """Mean field with exact Gaussians of all pairs of pixels."""
    energy, kernels = -unary.double().flatten(1).T.numpy(), []
    for sxy, srgb, weight in (
        (settings.get("gaussian_sxy", 3.0), None, settings.get("gaussian_weight", 3.0)),
        (settings["bilateral_sxy"], settings["bilateral_srgb"], settings["bilateral_weight"]),
    ):
        kernel = gaussians(image, sxy, srgb)
        norm = kernel.sum(1) ** -0.5
        kernels.append(weight * norm[:, None] * kernel * norm)

    def softmax(energy):
        energy = np.exp(energy - energy.max(1, keepdims=True))
        return energy / energy.sum(1, keepdims=True)

    belief = softmax(energy)
    for _ in range(settings["iterations"]):
        belief = softmax(energy + sum(kernel @ belief for kernel in kernels))
    return torch.from_numpy(belief.T.copy()).view(unary.shape)


@pytest.mark.figures
@pytest.mark.parametrize("iterations", [1, 10])
@pytest.mark.parametrize("settings", ["seam", "p2p", "deeplab-v2"])
def test_the_lattice_comes_near_exact_gaussians(settings, iterations):
    image = photograph("astronaut", 28, 36)
    unary = unary_from_scores(smooth_scores(4, 28, 36))
    settings = CRF_SETTINGS[settings] | {"iterations": iterations}
    expected, found = by_pairs(image, unary, settings), dense_crf(image, unary, **settings).double()
    before = (unary.neg().softmax(0) - expected).abs().mean()
    assert agreement(found, expected) > 0.95
    assert (found - expected).abs().mean() < 0.25 * before


def test_filters_are_gaussians_on_average():
    """Responses to impulses at many places of a grid, moved onto each other."""
    side, reach, sd = 61, 12, 4.0
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    made = lattice(torch.stack((x, y)).flatten(1) / sd)
    places = [(row, column) for row in range(24, 37, 2) for column in range(24, 37, 2)]
    impulses = torch.zeros(side, side, len(places), dtype=torch.float64)
    for number, (row, column) in enumerate(places):
        impulses[row, column, number] = 1
    answers = made.filter(impulses.flatten(0, 1)).view(side, side, -1)
    windows = [
        answers[row - reach : row + reach + 1, column - reach : column + reach + 1, number]
        for number, (row, column) in enumerate(places)
    ]
    mean = torch.stack(windows).mean(0)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sd) ** 2)
    expected = line[:, None] * line
    ratio = mean.sum() / expected.sum()
    assert (mean / ratio - expected).abs().max() < 0.12
    variance = (mean.sum(0) * torch.arange(-reach, reach + 1) ** 2).sum() / mean.sum()
    assert variance.item() == pytest.approx(sd**2, rel=0.1)


# the lattice in plain loops -------------------------------------------------------------------------------------------


def by_loops(points, values):
    """The filter of Adams et al. with a dictionary of vertices and barycentric coordinates from linear equations."""
    d, n = points.shape
    basis = np.zeros((d + 1, d))  # orthonormal vectors in the plane of sum 0
    for axis in range(d):
        basis[: axis + 1, axis], basis[axis + 1, axis] = 1, -axis - 1
    embedded = (basis / np.linalg.norm(basis, axis=0)) @ points * math.sqrt(2 / 3) * (d + 1)
    splat, corners = defaultdict(float), []
    for i in range(n):
        position = embedded[:, i]
        nearest = np.round(position / (d + 1)).astype(int)
        while (excess := nearest.sum()) != 0:  # the coordinate that this moves least out of the way
            rest = position / (d + 1) - nearest
            nearest[rest.argmin() if excess > 0 else rest.argmax()] -= np.sign(excess)
        order = np.argsort(-(position - nearest * (d + 1)), kind="stable")  # axes from the largest rest to the least
        vertices = []
        for remainder in range(d + 1):
            vertex = nearest * (d + 1) + remainder
            vertex[order[d + 1 - remainder :]] -= d + 1
            assert vertex.sum() == 0 and len(set(vertex % (d + 1))) == 1
            vertices.append(tuple(vertex.tolist()))
        system = np.vstack((np.array(vertices).T, np.ones(d + 1)))
        weights = np.linalg.lstsq(system, np.append(position, 1), rcond=None)[0]
        assert weights.min() > -1e-9  # the point lies inside
        corners.append(list(zip(vertices, weights)))
        for vertex, weight in corners[-1]:
            splat[vertex] = splat[vertex] + weight * values[i]
    for axis in range(d + 1):
        step, blurred = np.full(d + 1, -1), {}
        step[axis] = d
        for vertex, value in splat.items():
            near = [tuple((np.array(vertex) + sign * step).tolist()) for sign in (1, -1)]
            blurred[vertex] = value + sum(splat[key] for key in near if key in splat) / 2
        splat = blurred
    return np.array([sum(weight * splat[vertex] for vertex, weight in corner) for corner in corners])


@pytest.mark.parametrize("d, spread", [(1, 3), (2, 3), (3, 2), (5, 1), (5, 100), (6, 0.5)])
@pytest.mark.parametrize("seed", range(2))
def test_the_filter_is_that_of_loops_and_a_dictionary(d, spread, seed, monkeypatch):
    points, values = spread * draw(d, 60, seed=seed), draw(60, 3, seed=seed + 1)
    expected = torch.from_numpy(by_loops(points.numpy(), values.numpy()))
    made = lattice(points)
    torch.testing.assert_close(made.filter(values), expected, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(permutohedral, "TOGETHER", 7)
    again = lattice(points)
    assert torch.equal(again.filter(values), made.filter(values))


def test_far_points_need_wide_integers_and_near_ones_do_not():
    for reach, dtype in ((1.0, torch.int32), (1000.0, torch.int64)):
        cell = permutohedral._simplices(torch.tensor([[0.0, reach]] * 5))[0]
        assert permutohedral._packing([cell])[0].dtype == dtype


def test_equal_points_share_their_vertices():
    made = lattice(torch.zeros(2, 5, dtype=torch.float64))
    assert len(made.splat.start) == 3
    torch.testing.assert_close(made.filter(draw(5, 2)).std(0), torch.zeros(2, dtype=torch.float64))


def test_a_scaled_lattice_multiplies_before_and_after():
    made, values = lattice(2 * draw(2, 30)), draw(30, 4, seed=1)
    before, after = draw(30, seed=2), draw(30, seed=3)
    expected = after[:, None] * made.filter(before[:, None] * values)
    torch.testing.assert_close(made.scaled(before, after).filter(values), expected)


@pytest.mark.parametrize("dtype, reach", [(torch.float32, 1e6), (torch.float64, 1e15), (torch.float64, math.nan)])
def test_coordinates_beyond_the_dtype_are_refused(dtype, reach):
    with pytest.raises(ValueError, match="hundredth of a standard deviation, got (1e|nan).* choose larger ones"):
        lattice(torch.tensor([[0.0, reach]], dtype=dtype))


def test_more_vertices_than_integers_are_refused():
    with pytest.raises(ValueError, match=r"fewer than 2\^62 vertices of a lattice, got 6 x .*; choose larger standard"):
        lattice(torch.tensor([[0.0, 1e5]] * 5, dtype=torch.float64))


# mean field -----------------------------------------------------------------------------------------------------------


def test_one_pixel_hears_itself():
    image, unary = torch.tensor([[[10, 20, 30]]], dtype=torch.uint8), draw(3, 1, 1)
    belief = unary.neg().softmax(0)
    for _ in range(4):
        belief = (-unary + (2 + 5) * belief).softmax(0)
    found = dense_crf(image, unary, gaussian_weight=2.0, bilateral_weight=5.0, iterations=4)
    torch.testing.assert_close(found, belief)


def test_one_class_is_certain_and_no_iteration_is_a_softmax():
    image = photograph("coffee", 10, 12)
    assert torch.equal(dense_crf(image, torch.zeros(1, 10, 12)), torch.ones(1, 10, 12))
    unary = draw(4, 10, 12)
    torch.testing.assert_close(dense_crf(image, unary, iterations=0), (-unary).softmax(0))


def test_a_constant_image_is_smoothed():
    image = torch.full((20, 20, 3), 200, dtype=torch.uint8)
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[:, 10:], labels[5, 5] = 1, 1
    found = dense_crf(image, unary_from_labels(labels, 2), **CRF_SETTINGS["seam"] | {"bilateral_weight": 0.0})
    torch.testing.assert_close(found.sum(0), torch.ones(20, 20))
    labels[5, 5] = 0
    assert torch.equal(found.argmax(0), labels)
    even = dense_crf(image, torch.zeros(4, 20, 20))
    torch.testing.assert_close(even, torch.full_like(even, 0.25))


def test_labels_move_to_the_edge_of_the_photograph():
    image = torch.zeros(30, 40, 3, dtype=torch.uint8)
    image[:, 20:] = 200
    labels = torch.zeros(30, 40, dtype=torch.long)
    labels[:, 23:] = 1
    found = dense_crf(image, unary_from_labels(labels, 2))
    assert torch.equal(found.argmax(0), (image[..., 0] > 0).long())


def test_sets_are_computed_each_by_itself():
    image = photograph("rocket", 20, 24)
    scores = smooth_scores(4, 20, 24)
    sets = torch.stack([unary_from_scores(scores**alpha) for alpha in (1, 4, 24)]).view(3, 1, 4, 20, 24)
    found = dense_crf(image, sets)
    assert found.shape == sets.shape and found.is_contiguous()
    for one, unary in zip(found, sets):
        torch.testing.assert_close(one[0], dense_crf(image, unary[0]))


def test_a_result_repeats_to_the_last_bit():
    image, unary = photograph("coffee"), unary_from_scores(smooth_scores(5, 120, 160))
    assert torch.equal(dense_crf(image, unary), dense_crf(image, unary))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_maps(dtype):
    image, scores = photograph("chelsea", 30, 40), smooth_scores(4, 30, 40).to(dtype)
    found = dense_crf(image, unary_from_scores(scores))
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.float(), dense_crf(image, unary_from_scores(scores.float())), rtol=0, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense_crf(image, unary_from_scores(scores)), found)


def test_gradients_end_here_and_the_unary_stays_as_it_was():
    image, unary = photograph("chelsea", 10, 12), draw(3, 10, 12).requires_grad_()
    before = unary.detach().clone()
    assert not dense_crf(image, unary).requires_grad
    assert torch.equal(unary, before)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def test_a_step_neither_waits_for_the_host_nor_loops_over_pixels_and_classes():
    seen = {}
    for sets, classes, height, iterations in ((1, 2, 4, 1), (1, 2, 4, 3), (3, 21, 40, 1), (3, 21, 40, 3)):
        image = photograph("chelsea", height, 2 * height)
        kernels = crf_kernel(image, 3.0, None, 3.0), crf_kernel(image, 80.0, 13.0, 10.0)
        with Operations() as operations:
            mean_field(kernels, torch.rand(sets, classes, height, 2 * height), iterations)
        seen[height, iterations] = operations.names
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.", "masked_select", "unique", "_to_copy")
        assert not [name for name in operations.names if any(wait in name for wait in waits)]
    assert seen[4, 1] == seen[40, 1] and seen[4, 3] == seen[40, 3]
    step = (len(seen[4, 3]) - len(seen[4, 1])) // 2
    assert sum("embedding_bag" in name for name in seen[4, 3]) == 3 * (2 + 3 + 2 + 6)  # splat, blurs, slice
    assert step < 80


def test_a_lattice_is_made_once_for_all_iterations_classes_and_sets(monkeypatch):
    made = []
    monkeypatch.setattr(crf, "lattice", lambda points: made.append(points.shape) or lattice(points))
    dense_crf(photograph("chelsea", 10, 12), torch.rand(3, 5, 10, 12), iterations=4)
    assert made == [(2, 120), (5, 120)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", ["seam", "p2p", "deeplab-v2"])
def test_labels_of_a_gpu_are_those_of_the_cpu(settings):
    image, unary = photograph("coffee"), unary_from_scores(smooth_scores(21, 120, 160))
    expected = dense_crf(image, unary, **CRF_SETTINGS[settings])
    found = dense_crf(image.cuda(), unary.cuda(), **CRF_SETTINGS[settings])
    assert found.is_cuda and agreement(found.cpu(), expected) >= 0.999
    assert torch.equal(found, dense_crf(image.cuda(), unary.cuda(), **CRF_SETTINGS[settings]))


# settings and unaries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [  # Gaussian sxy, weight; bilateral sxy, srgb, weight; iterations
        ("seam", (3, 3, 80, 13, 10, 10)),
        ("walk", (3, 3, 80, 13, 10, 1)),
        ("p2p", (3, 3, 50, 5, 10, 10)),
        ("p2p-affinity", (3, 3, 80, 13, 10, 10)),
        ("p2p-eps", (3, 3, 80, 13, 10, 5)),
        ("irn", (3, 3, 50, 5, 10, 10)),
        ("deeplab", (3, 3, 32, 13, 10, 1)),
        ("deeplab-v2", (1, 3, 67, 3, 4, 10)),
    ],
)
def test_published_settings(name, expected):
    call = inspect.signature(dense_crf).bind(None, None, **CRF_SETTINGS[name])
    call.apply_defaults()
    assert tuple(call.arguments.values())[2:] == expected


def test_scores_are_floored_and_not_normalised():
    found = unary_from_scores(torch.tensor([0.0, 1e-9, 0.5, 0.7, 1.0, 1.5])[:, None, None])
    expected = [11.512925, 11.512925, 0.6931472, 0.3566749, 0, 0]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))


def test_labels_are_70_percent_certain_and_unknown_ones_not_at_all():
    found = unary_from_labels(torch.tensor([[0, 2, 255]]), 4)
    expected = [[0.7, 0.1, 0.25], [0.1, 0.1, 0.25], [0.1, 0.7, 0.25], [0.1, 0.1, 0.25]]
    torch.testing.assert_close(found[:, 0], -torch.tensor(expected).log())
    assert unary_from_labels(torch.zeros(2, 3, 3, dtype=torch.uint8), 1).shape == (2, 1, 3, 3)


# bad input ------------------------------------------------------------------------------------------------------------

IMAGE, UNARY = torch.zeros(4, 5, 3, dtype=torch.uint8), torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    "image, unary, options, sentence",
    [
        (IMAGE.permute(2, 0, 1), UNARY, {}, "Expected an image H W 3 of uint8 .*, got (3, 4, 5) of torch.uint8; move"),
        (IMAGE.float(), UNARY, {}, "Expected an image H W 3 of uint8 .*, got (4, 5, 3) of torch.float32; move"),
        (IMAGE[:0], UNARY[:, :0], {}, "with at least one pixel, got (0, 5, 3)"),
        (IMAGE, UNARY.mT, {}, "for an image of (4, 5) on cpu, got (2, 5, 4) on cpu; bring the scores to the size"),
        (IMAGE, UNARY[0], {}, "Expected a unary c H W, of at least one class, .*, got (4, 5) on cpu"),
        (IMAGE, UNARY[:0], {}, "of at least one class, .*, got (0, 4, 5) on cpu"),
        (IMAGE, UNARY.to("meta"), {}, "got (2, 4, 5) on meta; bring"),
        (IMAGE, UNARY / 0, {}, "finite numbers, got NaN or infinity; keep scores above 0"),
        (IMAGE, UNARY - torch.tensor(0.0).log(), {}, "finite numbers, got NaN or infinity; keep scores above 0"),
        (
            IMAGE,
            UNARY,
            {"gaussian_sxy": 0.0},
            "Expected standard deviations above 0, got sxy 0.0 and srgb None; choose",
        ),
        (IMAGE, UNARY, {"bilateral_srgb": math.nan}, "above 0, got sxy 80.0 and srgb nan; choose"),
        (IMAGE, UNARY, {"gaussian_sxy": 1e-6}, "a hundredth of a standard deviation, got 4e.06 standard deviations"),
        (IMAGE, UNARY, {"iterations": -1}, "Expected 0 iterations or more, got -1; choose for example 10."),
    ],
)
def test_bad_input_gets_a_sentence(image, unary, options, sentence):
    escaped = sentence.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=escaped):
        inspect.unwrap(dense_crf)(image, unary, **options)


def test_bad_labels_get_a_sentence():
    with pytest.raises(ValueError, match=r"Expected labels in 0\.\.3, or 255 for unknown, got 4; count the background"):
        unary_from_labels(torch.tensor([[0, 4]]), 4)
    for certainty in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"Expected a certainty between 0 and 1, got {certainty}; choose"):
            unary_from_labels(torch.zeros(1, 1, dtype=torch.long), 4, certainty)
