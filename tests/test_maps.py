"""Maps: the identity that defines CAM, and heatmaps that are never wrong without a word."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backbones import SPLITTABLE, network

from course_lib import backbones, maps

# cam ------------------------------------------------------------------------------------------------------------------


def cam_in_loops(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The definition, pixel by pixel."""
    b, k, h, w = features.shape
    found = torch.zeros(b, len(weight), h, w, dtype=torch.float64)
    for i in range(b):
        for c in range(len(weight)):
            for y in range(h):
                for x in range(w):
                    found[i, c, y, x] = sum(float(weight[c, j]) * float(features[i, j, y, x]) for j in range(k))
    return found


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99)
)
def test_cam_is_the_definition(b, c, k, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    features, weight = torch.randn(b, k, h, w, generator=generator), torch.randn(c, k, generator=generator)
    torch.testing.assert_close(
        maps.cam(features, weight).double(), cam_in_loops(features, weight), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", SPLITTABLE)
def test_the_mean_of_the_map_plus_the_bias_is_the_logit(name):
    model = network(name).eval()
    features, linear = backbones.split_classifier(model)
    torch.nn.init.normal_(linear.bias)
    side = 224 if name.startswith("swin") else 96
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        logits = maps.cam(features(images), linear.weight).mean((-2, -1)) + linear.bias
        torch.testing.assert_close(logits, model(images), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["torchvision/densenet121", "torchvision/convnext_tiny"])
def test_the_identity_breaks_without_the_relu_and_with_a_norm_after_pooling(name):
    model = network(name).eval()
    linear = model.classifier if name.endswith("121") else model.classifier[2]
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        logits, expected = maps.cam(model.features(images), linear.weight).mean((-2, -1)) + linear.bias, model(images)
    assert (logits - expected).abs().max() > 0.1 * expected.abs().max()


def test_cam_of_chosen_classes_is_a_part_of_all():
    features, weight = torch.randn(2, 8, 3, 3), torch.randn(10, 8)
    torch.testing.assert_close(maps.cam(features, weight[[7, 2]]), maps.cam(features, weight)[:, [7, 2]])


# heatmap --------------------------------------------------------------------------------------------------------------


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def resize_matrix(source: int, target: int) -> np.ndarray:
    """Row i holds the weights of the source pixels for target pixel i; pixels beyond the border repeat the last one."""
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(j, 0), source - 1)] += cubic(centre - j)
    return matrix


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(2, 9), st.integers(9, 40), st.integers(9, 40), st.integers(0, 99))
def test_heatmap_is_bicubic_then_min_max(h, w, height, width, seed):
    raw = torch.randn(h, w, generator=torch.Generator().manual_seed(seed))
    large = resize_matrix(h, height) @ raw.double().numpy() @ resize_matrix(w, width).T
    expected = (large - large.min()) / (large.max() - large.min())
    np.testing.assert_allclose(maps.heatmap(raw, (height, width)).numpy(), expected, atol=2e-5)


@pytest.mark.figures
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99), st.floats(-4, 4))
def test_heatmaps_fill_0_to_1_image_by_image(batch, seed, exponent):
    """A batch equals its images one by one, whatever the scale and offset of a map."""
    raw = torch.randn(*batch, 3, 4, generator=torch.Generator().manual_seed(seed))
    found = maps.heatmap(raw, 20)
    assert found.shape == (*batch, 20, 20) and found.dtype == torch.float32
    for one, alone in zip(found.reshape(-1, 20, 20), raw.reshape(-1, 3, 4), strict=True):
        assert one.min() == 0 and one.max() == 1
        tolerance = 1e-2 if exponent < -2 else 1e-4  # beside the 1, small maps lose digits
        torch.testing.assert_close(one, maps.heatmap(alone * 10**exponent + 1, 20), atol=tolerance, rtol=0)


@pytest.mark.figures
@pytest.mark.parametrize("bad", [0.0, 5.0, float("nan"), float("inf"), -float("inf"), 1e30])
def test_maps_with_nothing_to_show_are_zero_with_one_warning(bad):
    raw = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = maps.heatmap(raw, 9)
    raw[1] = bad  # constant
    if not np.isfinite(bad):
        raw[2, 1, 1] = bad  # one pixel is enough
    with pytest.warns(
        UserWarning, match=f"{2 if not np.isfinite(bad) else 1} of 4 maps are constant or hold NaN"
    ) as caught:
        found = maps.heatmap(raw, 9)
    assert len(caught) == 1
    dead = [1] if np.isfinite(bad) else [1, 2]
    assert (found[dead] == 0).all()
    alive = [i for i in range(4) if i not in dead]
    torch.testing.assert_close(found[alive], expected[alive])


@pytest.mark.figures
@settings(deadline=None, max_examples=40)
@given(
    st.floats(-30, 30), st.sampled_from([-1, 1]), st.integers(1, 14), st.sampled_from([14, 30, 224]), st.integers(0, 99)
)
def test_rounding_noise_on_a_constant_is_no_picture(exponent, sign, side, size, seed):
    """A constant with its last bit unsettled, at any scale: bicubic weights sum to 1 only nearly and add noise."""
    noise = 1.2e-7 * torch.randint(-1, 2, (side, side), generator=torch.Generator().manual_seed(seed))
    with pytest.warns(UserWarning, match="1 of 1 maps are constant"):
        assert not maps.heatmap(sign * 10**exponent * (1 + noise), size).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_out_as_float_without_bands(dtype):
    raw = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = maps.heatmap(raw, 50)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, maps.heatmap(raw.float(), 50), atol=0, rtol=0)


def test_an_empty_batch_and_an_image_size_in_both_forms():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert maps.heatmap(torch.zeros(0, 20, 7, 7), 14).shape == (0, 20, 14, 14)
        raw = torch.randn(1, 2, 7, 7)
        torch.testing.assert_close(maps.heatmap(raw, 14), maps.heatmap(raw, (14, 14)), atol=0, rtol=0)


def test_heatmap_does_not_write_into_the_map():
    raw = torch.randn(2, 3, 3)
    before = raw.clone()
    maps.heatmap(raw, 3)
    assert torch.equal(raw, before)


def test_cam_and_heatmap_compile_into_one_graph():
    cam, heatmap = inspect.unwrap(maps.cam), inspect.unwrap(maps.heatmap)  # without the shape checks of the tests

    def picture(features, weight):
        return heatmap(cam(features, weight), 28)

    features, weight = torch.randn(2, 8, 7, 7), torch.randn(3, 8)
    compiled = torch.compile(picture, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, weight), picture(features, weight))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_a_map_without_area_blames_the_image_not_the_channels(shape):
    with pytest.warns(UserWarning, match=f"A map has {shape[0]} x {shape[1]} pixels: the image is too small") as caught:
        assert not maps.heatmap(torch.full((2, *shape), 3.0), 32).any()
    assert len(caught) == 1 and "dead channels" not in str(caught[0].message)
    with pytest.warns(UserWarning, match="dead channels"):
        maps.heatmap(torch.full((2, 7, 7), 3.0), 32)


def test_a_row_of_pixels_that_differ_is_shown(recwarn):
    assert maps.heatmap(torch.arange(7.0).view(1, 7), 32).max() == 1 and not recwarn
