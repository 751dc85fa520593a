"""Chimeras: what a body tells is what its level says, parts are exact, and the study counts what it names."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation
from torch import nn

from course_lib.course import studies
from course_lib.data.miniature import fingerprint
from course_lib.data.voc import IGNORE, Voc
from course_lib.worlds import chimeras, creatures, minis
from course_lib.worlds.chimera_figures import part_figures
from course_lib.worlds.chimeras import CHIMERA_BODIES, CHIMERA_HEADS, CHIMERA_LEVELS, CHIMERA_PARTS, chimera
from course_lib.wsss import View, contrast
from course_lib.wsss.cam_net import Architecture, CamNet, build
from course_lib.wsss.contrast import ContrastConfig, contrast_loss, contrast_terms, true_labels
from course_lib.wsss.learner import continued, training_images
from course_lib.wsss.recipes import CHIMERA_CONTRAST, CHIMERA_TRAINING, OWN_PIXELS, recipe
from course_lib.wsss.views import Warp

LEVELS = sorted(CHIMERA_LEVELS.values())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        small = replace(chimeras.CHIMERA_RECIPE, images={"trainaug": 8, "val": 8})
        patch.setattr(chimeras, "CHIMERA_RECIPE", small)
        patch.setattr(minis, "SCORED", 8)
        return minis.mini_voc(tmp_path_factory.mktemp("data"), "chimeras-partly")


# the world ------------------------------------------------------------------------------------------------------------


def hue_of_body(head, body, tells, seed):
    """Which of the five hues of bodies one has: the mean colour of its light pixels, in sixths of a circle."""
    picture, parts = (np.asarray(one, int) for one in chimera(head, body, tells, np.random.default_rng(seed), 48))
    pixels = picture[(parts[..., 2] > 0) & (parts[..., 3] > 0), :3]
    colour = pixels[pixels.max(1) > 120].mean(0)
    hues = [creatures.shade((place + 0.5) / len(CHIMERA_HEADS), 0.6, 1.0) for place in range(len(CHIMERA_HEADS))]
    like = [colour @ hue / np.linalg.norm(colour) / np.linalg.norm(hue) for hue in hues]
    return int(np.argmax(like))


@pytest.mark.parametrize("tells", LEVELS)
def test_share_of_bodies_with_the_hue_of_their_head_is_that_of_the_level(tells):
    count, rng = 120, np.random.default_rng(7)
    heads, bodies = rng.integers(len(CHIMERA_HEADS), size=count), rng.integers(len(CHIMERA_BODIES), size=count)
    hues = [
        hue_of_body(head, body, tells, seed) for seed, (head, body) in enumerate(zip(heads.tolist(), bodies.tolist()))
    ]
    share = np.mean(heads == hues)
    expected = tells + (1 - tells) / len(CHIMERA_HEADS)  # some of those at random have it, too
    assert abs(share - expected) <= 4 * (expected * (1 - expected) / count) ** 0.5
    if tells < 1:
        assert {*hues} == {*range(len(CHIMERA_HEADS))}


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3))
def test_head_and_body_share_nothing_but_the_outline(seed, head, other, body):
    """With another head of the same random numbers, where bodies say nothing, only pixels of the head change."""
    one, parts = chimera(head, body, 0.0, np.random.default_rng(seed), 48)
    two, again = chimera(other, body, 0.0, np.random.default_rng(seed), 48)
    assert np.array_equal(np.asarray(parts), np.asarray(again)), "parts depend on neither"
    parts, changed = np.asarray(parts), (np.asarray(one) != np.asarray(two)).any(2)
    assert not (changed & (parts[..., 0] == 0)).any() and changed.any() == (head != other)
    assert ((parts[..., 0] > 0) ^ (parts[..., 2] > 0))[parts[..., 3] > 0].all(), "a pixel is of one part"


@pytest.mark.parametrize("tells", LEVELS)
def test_parts_cover_the_objects_and_nothing_else(tells):
    for number in range(6):
        scene, parts = chimeras.chimera_scene(tells, "train", number, 0)
        assert np.array_equal(parts > 0, scene.mask > 0) and parts.dtype == np.uint8
        for instance in range(1, len(scene.labels) + 1):
            found = np.bincount(parts[scene.instances == instance], minlength=3)
            assert found[CHIMERA_PARTS["body"]] > found[CHIMERA_PARTS["head"]] or len(scene.labels) > 1
        again, same = chimeras.chimera_scene(tells, "train", number, 0)
        assert np.array_equal(scene.image, again.image) and np.array_equal(parts, same)


def test_levels_differ_in_bodies_alone():
    (kind, parts), (fully, same) = (chimeras.chimera_scene(tells, "val", 3, 1) for tells in (0.0, 1.0))
    assert np.array_equal(kind.instances, fully.instances) and np.array_equal(parts, same)
    changed = (kind.image != fully.image).any(2)
    near = binary_dilation(parts == CHIMERA_PARTS["body"], np.ones((7, 7)))  # edges are soft
    assert changed.any() and not changed[~near].any()


def test_classes_are_pairs():
    labels = torch.arange(20)
    found = chimeras.shared_part(labels[:, None], labels)
    assert [int(found[kind].sum(1).unique()) for kind in ("head", "body", "neither")] == [3, 4, 12]
    names = list(chimeras.CHIMERAS.values())
    for kind, word in (("head", 0), ("body", -1)):
        for i, j in found[kind].nonzero().tolist():
            assert names[i].split()[word] == names[j].split()[word] and i != j


def test_layout_is_that_of_voc_with_parts(tree):
    for split in ("trainaug", "val"):
        data = Voc(tree, split)
        assert len(data) == 8 and data.tags.shape == (8, 20) and data.confounded is None
        for i, (image, tags) in enumerate(data):
            mask, parts = data.mask(i), chimeras.part_mask(data, i)
            assert image.shape == (3, 64, 64) and {*parts.unique().tolist()} <= {0, 1, 2}
            assert not (parts[mask == 0] > 0).any() and (parts[(mask > 0) & (mask != IGNORE)] > 0).all()
            assert {*mask.unique().tolist()} - {0, IGNORE} == {*(tags.nonzero()[:, 0] + 1).tolist()}
    names = {minis.json.loads((tree / minis.NOTE).read_text())["source"]}
    assert names == {"chimeras-partly"} and not (tree / "Tracks").exists()


def test_each_level_has_a_fingerprint_of_its_own(tree):
    worlds = {tells: chimeras.chimera_world(tells).fingerprint for tells in LEVELS}
    assert len({*worlds.values()}) == 3 and fingerprint(tree) == worlds[0.5]
    with pytest.raises(ValueError, match="chimeras-kind, chimeras-partly, chimeras-fully, but 'chimeras' came"):
        minis.mini_voc(source="chimeras")


# labels of contrast ---------------------------------------------------------------------------------------------------


def sample(seed=0, classes=4):
    """Two views whose maps are the masks of the cells, masks of 2 x 2 pixels a cell, tags and noise."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, classes, (3, 4, 5), generator=generator)
    maps = (cells[:, None] == torch.arange(classes)[:, None, None]).double()
    tags = maps[:, 1:].amax((2, 3))
    views = [View(maps, maps, torch.randn(3, 8, 4, 5, generator=generator, dtype=torch.float64)) for _ in range(2)]
    masks = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).byte()
    return views, masks, tags, torch.rand(2, 3, 4, 5, generator=generator), cells


def test_a_cell_has_the_label_of_most_of_its_known_pixels():
    masks = torch.tensor([[[1, 1, 2, IGNORE], [0, 1, IGNORE, IGNORE], [IGNORE, IGNORE, 3, 3], [IGNORE] * 2 + [0, 3]]])
    labels, known = true_labels(masks.byte(), 4, (2, 2))
    assert labels.tolist() == [[[1, 2], [0, 3]]] and known.tolist() == [[[True, True], [False, True]]]
    flipped, _ = true_labels(masks.byte(), 4, (2, 2), Warp(torch.tensor([True])))
    assert flipped.tolist() == [[[2, 1], [3, 0]]]


@pytest.mark.parametrize("config", [OWN_PIXELS, ContrastConfig.paper()], ids=["recipe", "paper"])
def test_true_labels_are_the_pseudo_labels_of_perfect_maps(config):
    views, masks, tags, noise, _ = sample()
    expected = contrast_loss(*views, tags, config, noise)
    found = contrast_loss(*views, tags, replace(config, labels="true"), noise, masks=masks)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    blind = [view._replace(cam=view.cam.flip(0), refined=view.refined.flip(0)) for view in views]
    cells = contrast_terms(*blind, tags, replace(config, labels="true"), noise, masks=masks)
    assert not torch.allclose(cells["cross-cam"], contrast_terms(*blind, tags, config, noise)["cross-cam"], atol=1e-3)


def test_unknown_cells_take_no_part():
    (one, two), masks, tags, noise, _ = sample()
    config = replace(OWN_PIXELS, labels="true", mine_pixels=False)
    masks[0, :4] = IGNORE
    expected = contrast_loss(one, two, tags, config, noise, masks=masks)
    other = one.embeddings.clone()
    other[0, :, :2] = torch.randn(8, 2, 5, dtype=torch.float64)
    found = contrast_loss(one._replace(embeddings=other), two, tags, config, noise, masks=masks)
    torch.testing.assert_close(found, expected)


def test_shuffled_labels_are_those_of_other_pixels(monkeypatch):
    views, _, tags, noise, cells = sample()
    seen = {}
    intra = contrast._intra
    monkeypatch.setattr(contrast, "_intra", lambda *given: seen.update(labels=given[1]) or intra(*given))
    terms = contrast_loss(*views, tags, replace(OWN_PIXELS, labels="shuffled"), noise)
    assert all(torch.isfinite(term) for term in terms.values())
    for labels in seen["labels"]:
        assert torch.equal(labels.sort().values, cells.flatten().sort().values)
        assert (labels != cells.flatten()).float().mean() > 0.4
    assert not torch.equal(*seen["labels"]), "each view has an order of its own"


def test_true_labels_need_masks():
    views, _, tags, noise, _ = sample()
    with pytest.raises(ValueError, match="Expected masks for true labels, got None; make the images"):
        contrast_loss(*views, tags, replace(OWN_PIXELS, labels="true"), noise)


def test_training_images_bring_masks_that_lie_on_them(tree):
    """The mask of an image is turned as the image is."""
    chosen = {"data": str(tree), "size": 64, "small": 32, "contrast": replace(OWN_PIXELS, labels="true")}
    data, flips = Voc(tree, "trainaug"), set()
    for kept in (False, True):
        images = training_images(recipe("seam+p2p", "small", kept=kept, **chosen), progress=False)
        for i in range(8):
            item, mask = images[i], data.mask(i)
            turned = not torch.equal(item["mask"], mask)
            assert torch.equal(item["mask"], mask.flip(-1) if turned else mask)
            flips.add(turned)
            if not kept:
                assert torch.equal(item["image"], data[i][0].flip(-1) if turned else data[i][0])
    assert flips == {False, True}
    plain = training_images(recipe("seam", "small", **chosen | {"contrast": OWN_PIXELS}), progress=False)
    assert "mask" not in plain[0], "no mask is read where none is wanted"


# the study ------------------------------------------------------------------------------------------------------------


def test_what_goes_on_has_the_cam_of_its_start():
    """A network of another method begins with the maps of CAM; the background's and what is new are of its own seed."""
    torch.manual_seed(7)
    start = build(Architecture("cam", ("background", "a", "b"), "small", neck=8))
    images = torch.rand(2, 3, 32, 32)
    for method in ("seam", "seam+p2p"):
        one, again, other = (continued(start, recipe(method, "small", neck=8, seed=seed)) for seed in (0, 0, 1))
        view = one(one.prepare(images))
        torch.testing.assert_close(view.cam[:, 1:], start(start.prepare(images)).cam[:, 1:])
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values()))
        assert not torch.equal(one.classifier.weight[0], other.classifier.weight[0])
        assert not torch.equal(one.similar.weight, other.similar.weight)


def test_rows_of_a_seed_go_on_from_one_cam():
    cases = studies.levels()
    assert len(cases) == 3 * 3 * 5 and len({case.file for _, case in cases}) == len(cases)
    for row, case in cases:
        assert (case.start is None) == (row == "cam") and case.config.batch_size == 8
        assert case.config.contrast.top_k * 64 == 8 * 4 * 4
        assert case.config.contrast.labels == {"oracle": "true", "shuffled": "shuffled"}.get(row, "pseudo")
        if case.start is not None:
            assert (row, case.start) != ("cam", None) and case.start.method == "cam"
            assert case.start.seed == case.config.seed
    alike = {replace(case.config.contrast, labels="pseudo") for _, case in cases}
    assert len(alike) == 1, "rows differ in their labels only"


@pytest.mark.figures
def test_a_run_of_each_row(tree, tmp_path, monkeypatch):
    """Real trainings, of one epoch: rows go on from CAM, which stays as it was, and figures are shares."""
    monkeypatch.setattr(studies.minis, "mini_voc", lambda **asked: tree)
    studies._start.cache_clear(), studies._images.cache_clear()
    runs = {}
    for row, case in studies.levels()[:5]:
        short = {"epochs": 1, "neck": 16}
        start = case.start and replace(case.start, **short)
        runs[row] = studies._measured(case._replace(config=replace(case.config, **short), start=start), tmp_path)
    for row, run in runs.items():
        for split in ("train", "val"):
            reading, figures = next(iter(run["splits"][split].items()))
            assert reading == ("without PCM" if row == "cam" else "with PCM")
            assert {"head", "body", "label head", "label body", "tags", "miou"} <= {*figures}
            assert all(0 <= value <= 100 for name, value in figures.items() if name != "threshold")
    oracle, contrast, shuffled, seam = (runs[row]["splits"] for row in ("oracle", "seam+p2p", "shuffled", "seam"))
    assert oracle != contrast and shuffled != contrast and seam != contrast, "labels of contrast made no difference"


class Perfect(CamNet):
    """A network whose maps are given; its trunk has stride 8."""

    def __init__(self, maps):
        nn.Module.__init__(self)
        self.maps, self.trunk = iter(maps.split(8)), nn.Module()
        self.trunk.stride = 8

    def prepare(self, images):
        return {}

    def forward(self, prepared):
        own = next(self.maps)
        return View(own, own)


@pytest.mark.parametrize("blind", [False, True], ids=["all", "heads only"])
def test_figures_of_maps_that_are_the_masks(tree, monkeypatch, blind):
    data = Voc(tree, "val")
    masks = torch.stack([data.mask(i) for i in range(8)])
    parts = torch.stack([chimeras.part_mask(data, i) for i in range(8)])
    seen = masks.where((parts == CHIMERA_PARTS["head"]) | (not blind), torch.zeros_like(masks))
    maps = (seen[:, None] == torch.arange(21)[:, None, None]).float()
    batches = iter(maps[:, 1:].split(8))
    monkeypatch.setattr(studies.seeds, "score_maps", lambda *asked: {"any": next(batches)})
    config = recipe("seam", "small", contrast=CHIMERA_CONTRAST, **CHIMERA_TRAINING)
    found = part_figures(Perfect(maps), data, config, 0.5)
    assert found["head"] == 100 and found["body"] == (0 if blind else 100)
    assert {value for name, value in found.items() if name.startswith("mixed")} == {0}
    assert found["tags"] == 100


def test_seeds_of_the_other_class_are_counted_as_mixed(tree, monkeypatch):
    data = Voc(tree, "val")
    several = data.tags.sum(1) == 2
    masks = torch.stack([data.mask(i) for i in range(8)]).long()
    swapped = torch.where(masks > 0, (data.tags.float() @ torch.arange(1.0, 21))[:, None, None].long() - masks, masks)
    swapped = torch.where(several[:, None, None] & (masks != IGNORE), swapped, masks)
    maps = (swapped[:, None] == torch.arange(21)[:, None, None]).float()
    batches = iter(maps[:, 1:].split(8))
    monkeypatch.setattr(studies.seeds, "score_maps", lambda *asked: {"any": next(batches)})
    config = recipe("seam", "small", contrast=CHIMERA_CONTRAST, **CHIMERA_TRAINING)
    found = part_figures(Perfect(maps), data, config, 0.5)
    mixed = {name: value for name, value in found.items() if name.startswith("mixed")}
    assert several.any() and mixed and {*mixed.values()} == {100} and 0 < found["body"] < 100


def test_differences_are_of_pairs():
    run = lambda row, seed, miou: {
        "world": "w",
        "row": row,
        "seed": seed,
        "splits": {split: {"with PCM": {"miou": miou}} for split in ("train", "val")},
    }
    table = {"runs": [run("seam", 0, 40.0), run("oracle", 0, 45.0), run("seam", 1, 50.0), run("oracle", 1, 57.0)]}
    mean, low, high = studies.paired_differences(table)["w"]["oracle"]["val"]
    assert mean == 6 and low < mean < high and high - mean == pytest.approx(mean - low)


def test_a_prediction_stands_before_what_was_measured(tmp_path, monkeypatch):
    measured = {"commit": "c", "runs": [{"row": "seam", "world": "w"}]}
    monkeypatch.setattr(studies, "measure", lambda *asked: measured)
    monkeypatch.setattr(studies, "paired_differences", lambda *asked: {})
    studies.write("chimeras", tmp_path)
    written = json.loads((tmp_path / "chimeras.json").read_text())
    assert next(iter(written)) == "prediction" and written["prediction"] == studies.STUDY_PREDICTIONS["chimeras"]
    committed = json.loads((studies.paths.shelf() / "evidence" / "chimeras.json").read_text())
    assert committed["prediction"] == studies.STUDY_PREDICTIONS["chimeras"], (
        "it stays as it was written before the study"
    )
