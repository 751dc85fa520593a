"""Second views: torchvision as a twin, flips without a trace, and what is learned if a network turns with them."""

import inspect
from dataclasses import replace
from math import cos, radians, sin

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from course_lib import prototypes, wsss
from course_lib.data.voc import Voc
from course_lib.worlds import minis, tagged
from course_lib.wsss import View, contrast, learner, seam, views
from course_lib.wsss.cam_net import Architecture, build
from course_lib.wsss.contrast import ContrastConfig, contrast_loss, contrast_terms
from course_lib.wsss.learner import TaggedImages, TagLearner, train, training_images
from course_lib.wsss.recipes import recipe
from course_lib.wsss.seam import seam_loss, with_background
from course_lib.wsss.views import Transformation, Warp, resize

pytestmark = pytest.mark.figures

CODE, PAPER = ContrastConfig.code(), ContrastConfig.paper()
TABLE7 = {
    "flip": Transformation(flip=True),
    "rotation": Transformation(rotation=20.0),
    "translation": Transformation(translation=16.0),
    "all": Transformation(flip=True, rotation=20.0, translation=60.0),
}
CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(transformation, images=3, seed=0):
    torch.manual_seed(seed)
    return transformation.draw(images, CPU)


def one(angle=0.0, right=0.0, down=0.0, flip=False):
    """The same for one image; angle in degrees, shifts in halves of the side."""
    return Warp(torch.tensor([flip]), torch.tensor([[radians(angle)], [right], [down]]))


# the drawing ----------------------------------------------------------------------------------------------------------


def test_without_a_transformation_nothing_is_drawn():
    state = torch.get_rng_state()
    assert Transformation().draw(3, CPU) is None and torch.equal(torch.get_rng_state(), state)


def test_what_is_drawn():
    flip, rigid = drawn(TABLE7["all"], 4000)
    angle, shift = rigid[0] * 180 / torch.pi, rigid[1:] * 447 / 2
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert 19.9 < angle.max() <= 20 and -20 <= angle.min() < -19.9 and abs(angle.mean()) < 1
    torch.testing.assert_close(shift.abs(), torch.full((2, 4000), 60.0))
    quarters = [
        ((shift[0] > 0) == right) & ((shift[1] > 0) == down) for right in (False, True) for down in (False, True)
    ]
    assert all(quarter.float().mean().item() == pytest.approx(0.25, abs=0.05) for quarter in quarters)
    assert drawn(TABLE7["flip"]).rigid is None and not drawn(TABLE7["rotation"], 100).flip.any()
    assert not drawn(TABLE7["rotation"]).rigid[1:].any() and not drawn(TABLE7["translation"]).rigid[0].any()


# the moving -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 9999),
    st.integers(4, 20),
    st.floats(-170, 170),
    st.floats(-0.5, 0.5),
    st.floats(-0.5, 0.5),
    st.booleans(),
)
def test_it_is_the_affine_transformation_of_torchvision(seed, side, angle, right, down, flip):
    maps, warp = draw(1, 2, side, side, seed=seed), one(angle, right, down, flip)
    half = (side - 1) / 2
    expected = transforms.affine(maps, angle, [right * half, down * half], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)
    inside = warp.inside(side)
    torch.testing.assert_close(warp(maps, side), (expected.flip(-1) if flip else expected) * inside, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9999), st.integers(2, 9), st.integers(2, 9))
def test_without_motion_it_is_the_resizing(seed, side, size):
    maps = draw(1, 3, side, side, seed=seed)
    torch.testing.assert_close(one()(maps, size), resize(maps, size), rtol=0, atol=1e-5)
    assert one().inside(size).all()
    flipped = Warp(torch.tensor([True]))
    assert torch.equal(flipped(maps, size).flip(-1), resize(maps, size)) and flipped.inside((size, 3)).all()
    turned = one(12.0, 0.1)
    assert torch.equal(turned._replace(flip=torch.tensor([True]))(maps, size).flip(-1), turned(maps, size))
    assert torch.equal(Warp(torch.tensor([False]))(maps, side), maps)


def test_a_constant_map_shows_what_is_outside():
    ones = torch.ones(1, 1, 448, 448)
    for direction in (1, -1):
        shifted = one(0.0, direction * 32 / 447, 32 / 447)(ones, 448)
        rows, columns = slice(16, None), slice(16, None) if direction > 0 else slice(None, -16)
        assert shifted.sum() == 432**2 and shifted[..., rows, columns].all(), "16 pixels of a view of 448"
    for angle in (-20, 5):
        turned, tilt = one(float(angle))(ones, 448), radians(abs(angle))
        torch.testing.assert_close(turned, one(float(angle)).inside(448).float())
        assert turned.mean().item() == pytest.approx(2 / (1 + cos(tilt) + sin(tilt)), abs=5e-3), (
            "what two squares share"
        )


@settings(deadline=None, max_examples=15)
@given(st.floats(-30, 30), st.floats(-0.3, 0.3), st.integers(3, 20), st.integers(3, 20))
def test_one_transformation_fits_all_grids(angle, right, side, other):
    """A ramp stays a ramp: bilinear sampling of it is exact on any grid."""
    ramps = [torch.linspace(-1, 1, n)[:, None] + 2 * torch.linspace(-1, 1, n) for n in (side, other)]
    moved = [one(angle, right)(ramp[None, None], 16) for ramp in ramps]
    torch.testing.assert_close(*moved, rtol=0, atol=1e-5)


def test_images_and_precision():
    warp = one(15.0, 0.2)
    maps = draw(1, 2, 9, 9)
    expected = warp(maps, 6)
    assert expected.dtype == torch.float64 and warp(maps.bfloat16(), 6).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(warp(maps, 6), expected) and torch.equal(warp(maps.float(), 6), warp(maps.float(), 6))
    net = build(Architecture("seam+p2p", ("background", "a"), "small", neck=8))
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = net.prepare(images, size=16, warp=warp)
    torch.testing.assert_close(prepared["trunk"], warp(net.trunk.normalise(images), 16))
    outside = ~warp.inside(16)
    assert outside.any() and not (prepared["trunk"] * outside).any(), "outside is the mean colour"


# what is learned from -------------------------------------------------------------------------------------------------


def equivariant(warp, images=3, classes=5, seed=0):
    """Views of a network whose maps and embeddings turn with the image, on its own grids; outside lies anything."""
    whole = [
        F.interpolate(draw(images, channels, 6, 6, seed=seed + channels), (24, 24), mode="bicubic")
        for channels in (classes, classes + 1, 7)
    ]
    inside = warp.inside(16)
    shown = [
        torch.where(inside, warp(maps, 16), 3 + draw(images, maps.shape[1], 16, 16, seed=seed + 9)) for maps in whole
    ]
    one, two = (View(cam, refined[:, 1:], embeddings.relu() + 0.01) for cam, refined, embeddings in (whole, shown))
    # The ReLU of an embedding comes before it is moved.
    two = two._replace(embeddings=torch.where(inside, warp(one.embeddings, 16), two.embeddings))
    tags = torch.ones(images, classes - 1, dtype=torch.float64)
    noise = torch.rand(images, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return one, two, tags, torch.stack((noise, noise))


@pytest.mark.parametrize("name", TABLE7)
def test_a_network_that_turns_with_its_images_has_nothing_to_regularise(name):
    warp = drawn(TABLE7[name])
    one, two, tags, noise = equivariant(warp)
    assert seam_loss(one, two, tags, 24, 16, warp)["equivariance"] < 1e-6
    assert seam_loss(one, two, tags, 24, 16)["equivariance"] > 0.02, (
        "compared where they do not lie on each other, they differ"
    )
    for config in (CODE, PAPER):
        for term in contrast_terms(one, two, tags, config, noise, warp).values():
            torch.testing.assert_close(*term)  # both views say the same

    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 24, dtype=torch.float64)] * 2, indexing="ij")
    disc = (2 - 3 * (x**2 + y**2).sqrt()).clamp(0, 1).expand(3, 1, 24, 24)
    one = View(*[with_background(torch.cat((disc, disc), 1))] * 2)
    two = View(*[torch.where(warp.inside(16), warp(one.cam, 16), 3.0)] * 2)
    assert seam_loss(one, two, tags[:, :1], 24, 16, warp)["cross-equivariance"] < 1e-3
    assert seam_loss(one, two, tags[:, :1], 24, 16)["cross-equivariance"] > 0.01 or name == "flip"


@pytest.mark.parametrize("config", [CODE, PAPER, replace(CODE, mine_pixels=False)], ids=["code", "paper", "all pixels"])
def test_what_lies_outside_takes_no_part(config):
    warp = drawn(TABLE7["all"])
    one, two, tags, noise = equivariant(warp)
    two = View(*(part + 0.1 * draw(*part.shape, seed=5).abs() for part in two))
    leaf = View(*(part.detach().requires_grad_() for part in two))
    outside = (~warp.inside(16)).double()
    other = View(*(part + outside * 5 * draw(*part.shape, seed=77) for part in two))

    def terms(view):
        found = {**seam_loss(one, view, tags, 24, 16, warp), **contrast_terms(one, view, tags, config, noise, warp)}
        return {
            name: found[name]
            for name in ("equivariance", "cross-equivariance", "cross-prototype", "cross-cam", "intra")
        }

    found = terms(leaf)
    torch.testing.assert_close(found, terms(other))
    gradients = torch.autograd.grad(sum(term.sum() for term in found.values()), leaf)
    assert outside.any() and all(gradient.any() and not (gradient * outside).any() for gradient in gradients)


@pytest.mark.parametrize(
    "config",
    [
        PAPER,
        replace(PAPER, min_max=True, refined=True, class_mean=True, skip_hardest=True),
        replace(PAPER, absent_compete=True, mine_pixels=False, mine_prototypes=False),
    ],
)
def test_contrast_is_that_of_the_pixels_inside(config):
    """The pixels that lie inside, as an image of one row."""
    warp = one(17.0, 0.15, -0.1, True)
    first, second, tags, noise = equivariant(warp, images=1)
    tags[:, 0] = 0
    second = View(*(part + 0.3 * draw(*part.shape, seed=5).abs() for part in second))
    inside = warp.inside(16)[0, 0]

    def row(maps):
        return maps[..., inside][..., None, :]

    rows = [View(*(row(part) for part in view)) for view in warp.align(first, second)]
    found, expected = (
        contrast_terms(first, second, tags, config, noise, warp),
        contrast_terms(*rows, tags, config, row(noise)),
    )
    assert 20 < inside.sum() < 250
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("config", [CODE, PAPER, replace(PAPER, class_mean=True)], ids=["code", "paper", "mix"])
def test_nothing_left_inside(config):
    """Of a grid of 2 x 2 a rotation leaves no pixel."""
    warp = Warp(torch.zeros(3, dtype=torch.bool), torch.tensor([[0.2] * 3, [0.0] * 3, [0.0] * 3]))
    one, two = (View(draw(3, 4, 2, 2), draw(3, 4, 2, 2), draw(3, 5, 2, 2).relu().requires_grad_()) for _ in range(2))
    assert not warp.inside(2).any()
    terms = contrast_loss(one, two, torch.ones(3, 3, dtype=torch.float64), config, torch.rand(2, 3, 2, 2), warp)
    gradients = torch.autograd.grad(sum(terms.values()), two.embeddings)
    assert all(term == 0 for term in terms.values()) and not gradients[0].any()


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return operation(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    with NoWaiting():
        warp = drawn(TABLE7["all"])
        one, two, tags, noise = equivariant(warp)
        seam_loss(one, two, tags, 24, 16, warp)
        contrast_loss(one, two, tags, PAPER, noise, warp)


def test_it_compiles_into_one_graph(monkeypatch):
    for module in (contrast, seam, views, prototypes, wsss):
        for name, own in inspect.getmembers(module, inspect.isfunction):
            if str(own.__module__).startswith("course_lib"):
                monkeypatch.setattr(module, name, inspect.unwrap(own))  # without the shape checks of the tests
    for name, own in inspect.getmembers(Warp, inspect.isfunction):
        monkeypatch.setattr(Warp, name, inspect.unwrap(own))
    warp = drawn(TABLE7["all"])
    one, two, tags, noise = equivariant(warp)

    def step(one, two):
        return {
            **seam.seam_loss(one, two, tags, 24, 16, warp),
            **contrast.contrast_loss(one, two, tags, CODE, noise, warp),
        }

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(one, two), step(one, two))


# training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tagged.RECIPES, "creatures", replace(tagged.RECIPES["creatures"], images={"trainaug": 8, "val": 4})
        )
        patch.setattr(minis, "SCORED", 4)
        return minis.mini_voc(tmp_path_factory.mktemp("data"), "creatures")


def tiny(tree, **changes):
    return recipe(
        **{
            "method": "seam+p2p",
            "backbone": "small",
            "data": str(tree),
            "size": 48,
            "small": 32,
            "epochs": 1,
            "batch_size": 4,
            "neck": 16,
            "contrast_from": 0.0,
        }
        | changes
    )


def test_every_transformation_trains_to_something_else(tree):
    histories = [
        train(tiny(tree, transformation=change), progress=False)[1][0]
        for change in (Transformation(), *TABLE7.values())
    ]
    assert all(len({row[name] for row in histories}) == 5 for name in ("tags", "equivariance", "cross-cam"))
    assert histories[1] | {"seconds": 0} == train(tiny(tree, transformation=TABLE7["flip"]), progress=False)[1][0] | {
        "seconds": 0
    }, "seeds repeat transformations too"


@pytest.mark.parametrize("method", ["seam", "eps+p2p"])
def test_all_methods_with_two_views_learn_from_it(tree, method):
    row = train(tiny(tree, method=method, transformation=TABLE7["all"]), progress=False)[1][0]
    assert all(0 < value < 10 for name, value in row.items() if name != "seconds")


def test_saliency_turns_with_the_view(tree, monkeypatch):
    config, data = tiny(tree, method="eps+p2p", transformation=TABLE7["all"], dropout=0.0), Voc(tree, "trainaug")
    batch = default_collate([TaggedImages(data, config)[i] for i in range(4)])
    trained, seen = TagLearner(build(config.architecture(data.classes)), config).train(), []
    monkeypatch.setattr(learner, "saliency_loss", lambda maps, saliency, tags: seen.append(saliency) or maps.sum() * 0)
    torch.manual_seed(3)
    trained.step(batch)
    expected = drawn(TABLE7["all"], 4, seed=3)(batch["saliency"] / 255, 32)
    assert torch.equal(seen[2], expected) and not torch.equal(expected, resize(batch["saliency"] / 255, 32))


def test_nothing_is_kept_of_transformed_views(tree):
    with pytest.raises(ValueError, match="smaller copies as they are: leave out `kept`"):
        tiny(tree, kept=True, transformation=TABLE7["flip"])
    kept = training_images(tiny(tree, kept=True), progress=False)
    with pytest.raises(ValueError, match="Expected TaggedImages for second views"):
        train(tiny(tree, transformation=TABLE7["flip"]), images=kept, progress=False)
