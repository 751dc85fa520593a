"""Paper dolls: what is drawn is what the masks say, and identity lies in the named parts and nowhere else."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from course_lib.worlds import dolls

ANY = st.integers(0, 2**32)


def random_doll(seed):
    rng = np.random.default_rng(seed)
    camera = dolls.CAMERAS[rng.integers(6)]
    return dolls.random_clothes(rng), dolls.random_head(rng), dolls.random_pose(camera, rng), camera


def changed(one, other):
    return (one[0] != other[0]).any(-1) | (one[1] != other[1])


def hard_edges(*dolls_of_one_pose):
    """The dolls drawn without smooth edges: every pixel is one piece of paper, and masks are exact to the pixel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dolls, "FINE", 1)
        return [dolls.draw(*doll) for doll in dolls_of_one_pose]


def shows(parts, *pictures):
    return np.any([np.isin(mask, parts) for _, mask in pictures], 0)


@settings(max_examples=15, deadline=None)
@given(ANY, ANY)
def test_clothes_change_torso_and_legs_only(seed, other):
    clothes, head, pose, _ = random_doll(seed)
    one, two = hard_edges((clothes, head, pose), (random_doll(other)[0], head, pose))
    assert not (changed(one, two) & ~shows((dolls.TORSO, dolls.LEGS), one, two)).sum()


@settings(max_examples=15, deadline=None)
@given(ANY, ANY)
def test_hair_hat_and_bag_change_head_and_bag_only(seed, other):
    clothes, head, pose, _ = random_doll(seed)
    one, two = hard_edges((clothes, head, pose), (clothes, random_doll(other)[1], pose))
    assert not (changed(one, two) & ~shows((dolls.HEAD, dolls.BAG), one, two)).sum()


@settings(max_examples=10, deadline=None)
@given(ANY, ANY)
def test_smooth_edges_mix_little_of_a_neighbour(seed, other):
    """Averaged pixels belong to the part that covers most of them; what else shows through is a thin line at most."""
    clothes, head, pose, _ = random_doll(seed)
    one, two = dolls.draw(clothes, head, pose), dolls.draw(random_doll(other)[0], head, pose)
    difference = np.abs(one[0].astype(int) - two[0]).sum(-1)
    edge = binary_dilation(shows((dolls.TORSO, dolls.LEGS), one, two), np.ones((3, 3)))
    assert difference[~edge].sum() <= 0.05 * difference.sum()


@pytest.mark.parametrize("field, part", [("top", dolls.TORSO), ("bottom_colour", dolls.LEGS), ("shoes", dolls.LEGS)])
def test_colour_of_a_garment_is_seen_on_its_part(field, part):
    clothes, head, pose, _ = random_doll(3)
    clothes = replace(clothes, pattern="plain")
    one, two = (
        dolls.draw(replace(clothes, **{field: colour}), head, pose) for colour in ((200, 30, 30), (30, 30, 200))
    )
    assert (one[1] == two[1]).all(), "a colour moved the mask"
    difference = changed(one, two)
    assert difference.sum() > 40 and (difference & (one[1] == part)).sum() > 0.8 * difference.sum()


@settings(max_examples=15, deadline=None)
@given(ANY)
def test_masks_and_pictures_agree(seed):
    picture, parts = dolls.draw(*random_doll(seed)[:3])
    assert picture.shape == (128, 64, 4) and parts.shape == (128, 64) and set(np.unique(parts)) == {0, 1, 2, 3, 4}
    opacity = picture[..., 3]
    assert (opacity[parts > 0] > 50).all() and (opacity[parts == 0] < 206).all()
    rows = [np.nonzero(parts == part)[0].mean() for part in (dolls.HEAD, dolls.TORSO, dolls.LEGS)]
    assert rows == sorted(rows), "head above torso above legs"
    share = np.bincount(parts.ravel(), minlength=5) / parts.size
    assert 0.15 < 1 - share[0] < 0.6 and share[dolls.HEAD] > 0.02 and share[dolls.BAG] > 0.003


def test_every_garment_hair_hat_and_bag_makes_a_difference():
    clothes, head, pose, _ = random_doll(5)
    clothes = replace(clothes, top=(200, 30, 30), trim=(30, 30, 200))
    for back in (False, True):
        stance = replace(pose, back=back)
        for field, values, of_clothes in (
            ("pattern", dolls.PATTERNS, True),
            ("bottom", ("trousers", "shorts", "skirt"), True),
            ("hair", dolls.HAIR, False),
            ("hat", dolls.HATS, False),
            ("bag", dolls.BAGS, False),
        ):
            drawn = {
                dolls.draw(
                    replace(clothes, **{field: value}) if of_clothes else clothes,
                    head if of_clothes else replace(head, **{field: value}),
                    stance,
                )[0].tobytes()
                for value in values
            }
            assert len(drawn) == len(values), f"two values of {field} look the same"


@settings(max_examples=8, deadline=None)
@given(ANY, ANY)
def test_camera_shows_the_doll_and_leaves_the_street_alone(seed, noise):
    clothes, head, pose, camera = random_doll(seed)
    camera = replace(camera, blur=0.0)
    street = dolls.street(camera, np.random.default_rng(1))
    one, two = (dolls.draw(garment, head, pose)[0] for garment in (clothes, random_doll(noise)[0]))
    first, again, second = (
        dolls.photograph(doll, pose, camera, street, np.random.default_rng(noise)) for doll in (one, one, two)
    )
    assert first.shape == (128, 64, 3) and (first == again).all()
    nothing = (one[..., 3] == 0) & (two[..., 3] == 0)
    assert (first[nothing] == second[nothing]).all()


def test_six_cameras_give_six_pictures_of_one_doll():
    clothes, head, pose, _ = random_doll(0)
    doll, parts = dolls.draw(clothes, head, pose)
    seen = [
        dolls.photograph(doll, pose, camera, dolls.street(camera, np.random.default_rng(i)), np.random.default_rng(i))
        for i, camera in enumerate(dolls.CAMERAS)
    ]
    means = np.array([picture[parts > 0].mean(0) for picture in seen])
    gaps = np.abs(means[:, None] - means[None]).max(-1)[np.triu_indices(6, 1)]
    assert gaps.min() > 3, "two cameras have the same light"


@pytest.fixture
def small(monkeypatch):
    for name, value in (("TRAIN", 5), ("TEST", 4), ("DISTRACTORS", 3), ("JUNK", 2)):
        monkeypatch.setattr(dolls, name, value)


@pytest.mark.parametrize("identity", dolls.IDENTITIES)
def test_identity_is_in_the_named_parts(small, monkeypatch, identity):
    worn, draw = [], dolls.draw
    monkeypatch.setattr(
        dolls, "draw", lambda clothes, head, pose: (worn.append((clothes, head)), draw(clothes, head, pose))[1]
    )
    clothes, heads = defaultdict(list), defaultdict(list)
    for _, name, _, _ in dolls.market(identity, 0):
        number = int(name.split("_")[0])
        if number > 0:
            clothes[number].append(worn[-1][0])
            heads[number].append(worn[-1][1])
    assert len(clothes) == 9 and min(map(len, clothes.values())) >= 5
    for said, looks in (("clothes", clothes), ("head", heads)):
        for number, own in looks.items():
            kinds = len(set(own))
            assert kinds == 1 if identity in (said, "both") else kinds == len(own), (
                f"{said} of {number} in the world {identity}"
            )
        if identity in (said, "both"):
            assert len({own[0] for own in looks.values()}) == len(looks), "two persons look the same"


def test_same_seed_same_pictures(small):
    one, two, other = (list(dolls.market("head", seed)) for seed in (0, 0, 1))
    assert all(a[:2] == b[:2] and (a[2] == b[2]).all() and (a[3] == b[3]).all() for a, b in zip(one, two, strict=True))
    assert [name for _, name, _, _ in one] != [name for _, name, _, _ in other]


def test_distractors_show_nobody_and_junk_a_piece(small):
    gallery = {name: parts for split, name, _, parts in dolls.market("clothes", 0) if split == "gallery"}
    covered = {
        kind: [(parts > 0).mean() for name, parts in gallery.items() if name.startswith(kind)]
        for kind in ("0000", "-1")
    }
    assert len(covered["0000"]) == 3 and len(covered["-1"]) == 2
    assert max(covered["0000"]) < 0.25 and min(covered["-1"]) > 0


def test_fingerprint_names_the_world():
    assert len({dolls.market_fingerprint(identity, seed) for identity in dolls.IDENTITIES for seed in (0, 1)}) == 6
    assert dolls.market_fingerprint("head", 0) == dolls.market_fingerprint("head", 0)
