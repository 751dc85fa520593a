"""Dense CRF: labels that follow the edges of the photograph, by mean field over all pairs of pixels.

    E(x) = sum_i U_i(x_i) + sum_{i<j} [x_i != x_j] sum_k w_k n_i K_k(i, j) n_j

    Gaussian    K(i, j) = exp(-|p_i - p_j|^2 / (2 sxy^2))                                    p: x and y, in pixels
    bilateral   K(i, j) = exp(-|p_i - p_j|^2 / (2 sxy^2) - |I_i - I_j|^2 / (2 srgb^2))       I: colours, in 0..255

    Q_i <- softmax(-U_i + sum_k w_k n_i sum_j K_k(i, j) n_j Q_j)          a step of mean field, from Q_i = softmax(-U_i)
    n_i = (sum_j K_k(i, j))^(-1/2)                                        symmetric normalisation, for each kernel

        Krähenbühl & Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NeurIPS 2011

A sum over all j is a filter on a permutohedral lattice (`permutohedral`), which is made once for an image and a kernel.
Where the code that made the published numbers (the package pydensecrf) differs from the paper, we follow the code:
kernels are normalised, and a pixel's message to itself stays in.

    unary = unary_from_scores(scores)                                     a c H W: of one image, such as at a alphas
    labels = dense_crf(image, unary, **CRF_SETTINGS["seam"]).argmax(1)    a H W
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from course_lib.data.voc import IGNORE
from course_lib.prototypes import at_least_float32
from course_lib.wsss.permutohedral import Lattice, lattice

FLOOR = 1e-5  # of scores, before their logarithm
CERTAINTY = 0.7  # probability that a hard label is right, in P2P and IRN

_SOFT = {"bilateral_sxy": 80.0, "bilateral_srgb": 13.0, "bilateral_weight": 10.0, "iterations": 10}
_HARD = _SOFT | {"bilateral_sxy": 50.0, "bilateral_srgb": 5.0}
# What methods have published, with the unary that belongs to it. Where nothing else stands, the Gaussian is 3 / 3.
CRF_SETTINGS = {
    "seam": _SOFT,  # PSA, SEAM, EPS: scores of the tagged classes, and (1 - highest)^alpha for the background
    "walk": _SOFT | {"iterations": 1},  # SEAM: scores after the random walk
    "p2p": _HARD,  # P2P on SEAM, its seeds: labels, background 0.26
    "p2p-affinity": _SOFT,  # P2P on SEAM, for AffinityNet: labels, background (1 - highest)^alpha
    "p2p-eps": _SOFT | {"iterations": 5},  # P2P on EPS, its pseudo masks: scores, alpha 8
    "irn": _HARD,  # IRN: labels, one class for each tag and the background
    "deeplab": _SOFT | {"bilateral_sxy": 32.0, "iterations": 1},  # the networks of P2P: softmax of the mean logits
    "deeplab-v2": {  # EPS, ResNet-101: softmax
        "gaussian_sxy": 1.0,
        "bilateral_sxy": 67.0,
        "bilateral_srgb": 3.0,
        "bilateral_weight": 4.0,
        "iterations": 10,
    },
}


def dense_crf(
    image: UInt8[Tensor, "H W rgb"],
    unary: Float[Tensor, "*sets c h w"],
    *,
    gaussian_sxy: float = 3.0,
    gaussian_weight: float = 3.0,
    bilateral_sxy: float = 80.0,
    bilateral_srgb: float = 13.0,
    bilateral_weight: float = 10.0,
    iterations: int = 10,
) -> Float[Tensor, "*sets c h w"]:
    """Probabilities of the classes at each pixel after some steps of mean field  (Krähenbühl & Koltun).

    Args:
        image: RGB, H W 3.
        unary: negative logarithms of scores, on the grid and the device of the image; any number of sets of the same
            classes, such as those of several alphas, which share the lattices.
        gaussian_sxy, bilateral_sxy: standard deviations in pixels.
        bilateral_srgb: standard deviation in grey levels, of 0..255.
        gaussian_weight, bilateral_weight: of the kernels, w_k.
        iterations: steps; 0 is the softmax of the scores' logarithms.
    Returns:
        float32, or float64 for a unary of float64; without gradient.
    Raises:
        ValueError: an image that is not H W 3 of uint8, a unary of another size or device or with NaN or infinity in
            it, a standard deviation that is not positive or too small for the image.
    """
    if image.dtype != torch.uint8 or image.shape[2:] != (3,) or image.numel() == 0:
        raise ValueError(
            f"Expected an image H W 3 of uint8 with at least one pixel, got {tuple(image.shape)} of {image.dtype}; "
            "move the channels of a tensor 3 H W to the end: image.permute(1, 2, 0)."
        )
    if unary.shape[-2:] != image.shape[:2] or unary.ndim < 3 or unary.numel() == 0 or unary.device != image.device:
        raise ValueError(
            f"Expected a unary c H W, of at least one class, for an image of {tuple(image.shape[:2])} on {image.device}"
            f", got {tuple(unary.shape)} on {unary.device}; bring the scores to the size and the device of the image."
        )
    if not unary.isfinite().all():
        raise ValueError(
            "Expected a unary of finite numbers, got NaN or infinity; keep scores above 0 before their logarithm, as "
            "unary_from_scores does."
        )
    unary = at_least_float32(unary)
    gaussian = crf_kernel(image, gaussian_sxy, None, gaussian_weight, unary.dtype)
    bilateral = crf_kernel(image, bilateral_sxy, bilateral_srgb, bilateral_weight, unary.dtype)
    return mean_field((gaussian, bilateral), unary, iterations)


@torch.no_grad()
def crf_kernel(
    image: UInt8[Tensor, "H W 3"],
    sxy: float,
    srgb: float | None,
    weight: float,
    dtype: torch.dtype = torch.float32,
) -> Lattice:
    """A normalised kernel of all pixels, row by row: its `filter` turns Q_j into w n_i sum_j K(i, j) n_j Q_j.

    Args:
        sxy: standard deviation in pixels.
        srgb: standard deviation in grey levels, of 0..255; None leaves the colours out (the Gaussian kernel).
        weight: w of this kernel.
        dtype: of the values to filter.
    """
    if not (sxy > 0 and (srgb is None or srgb > 0)):
        raise ValueError(f"Expected standard deviations above 0, got sxy {sxy} and srgb {srgb}; choose positive ones.")
    sides = (torch.arange(side, dtype=dtype, device=image.device) for side in image.shape[:2])
    y, x = torch.meshgrid(*sides, indexing="ij")
    points = torch.stack((x, y)).flatten(1) / sxy  # 2 n
    if srgb is not None:
        points = torch.cat((points, image.flatten(0, 1).T / srgb))  # 5 n
    kernel = lattice(points)
    norm = (kernel.filter(points.new_ones(len(points.T), 1))[:, 0] + 1e-20).rsqrt()  # n_i
    return kernel.scaled(norm, weight * norm)


@torch.no_grad()
def mean_field(
    kernels: Sequence[Lattice], unary: Float[Tensor, "*sets c H W"], iterations: int
) -> Float[Tensor, "*sets c H W"]:
    """Probabilities after some steps: Q_i <- softmax(-U_i + messages of all kernels); no step waits for the host.

    Args:
        kernels: one or more of the same image, made for the dtype of the unary (`crf_kernel`).
        unary: finite; each set by itself.
    """
    if iterations < 0:
        raise ValueError(f"Expected 0 iterations or more, got {iterations}; choose for example 10.")
    first, *others = kernels
    shape, classes = unary.shape, unary.shape[-3]
    unary = unary.reshape(-1, shape[-2] * shape[-1]).T.contiguous()  # n sets*c
    belief = (-unary).unflatten(1, (-1, classes)).softmax(2)  # n sets c
    for _ in range(iterations):
        energy = first.filter(belief.flatten(1)).sub_(unary)
        for kernel in others:
            energy += kernel.filter(belief.flatten(1))
        torch.softmax(energy.unflatten(1, (-1, classes)), 2, out=belief)
    return belief.flatten(1).T.contiguous().view(shape)


def unary_from_scores(scores: Float[Tensor, "*sets c H W"]) -> Float[Tensor, "*sets c H W"]:
    """Negative logarithms of scores in 0..1, which are kept above 0.00001. They need not sum to 1, nor are made to."""
    return -at_least_float32(scores).clamp(FLOOR, 1).log()


def unary_from_labels(
    labels: Integer[Tensor, "*sets H W"], num_classes: int, certainty: float = CERTAINTY
) -> Float[Tensor, "*sets c H W"]:
    """Negative logarithms: of the certainty for a pixel's label, and of what is left for each of the other classes.

    Args:
        labels: 0..num_classes - 1, or 255 for a pixel that may be anything.
        num_classes: with the background.
        certainty: probability that a label is right, between 0 and 1.
    Raises:
        ValueError: a label or a certainty out of its range.
    """
    if not 0 < certainty < 1:
        raise ValueError(f"Expected a certainty between 0 and 1, got {certainty}; choose for example {CERTAINTY}.")
    known = labels != IGNORE
    wrong = known & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        raise ValueError(
            f"Expected labels in 0..{num_classes - 1}, or {IGNORE} for unknown, got {labels[wrong][0].item()}; "
            "count the background as a class."
        )
    right = labels.unsqueeze(-3) == torch.arange(num_classes, device=labels.device)[:, None, None]
    others = (1 - certainty) / max(1, num_classes - 1)
    chance = torch.where(right, certainty, torch.where(known.unsqueeze(-3), others, 1 / num_classes))
    return -chance.log()
