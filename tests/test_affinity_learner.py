"""Training of AffinityNet: what is kept is what would be read."""

import pytest
import torch

from course_lib.backbones.weights import LITE0
from course_lib.data.voc import Voc
from course_lib.worlds import minis
from course_lib.wsss import psa
from course_lib.wsss.affinity_learner import STRONG, WEAK, KeptSureImages, SureImages, affinity_recipe
from course_lib.wsss.seeds import write_scores


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    """Three creatures with score maps of their classes under a strong and a weak background, and their data."""
    data, folder = Voc(minis.mini_voc(source="creatures"), "trainaug"), tmp_path_factory.mktemp("sure")
    data.ids, data.images = data.ids[:3], data.images[:3]
    generator = torch.Generator().manual_seed(0)
    for level in (STRONG, WEAK):
        (folder / level).mkdir()
        for index, name in enumerate(data.ids):
            present = torch.cat((torch.ones(1), data.tags[index].float()))
            scores = torch.rand(len(present), 96, 96, generator=generator) * present[:, None, None]
            write_scores(folder / level, name, scores, present)
    return data, folder


@pytest.mark.figures
def test_what_is_kept_is_what_is_read(sure):
    data, folder = sure
    config = affinity_recipe("psa", LITE0, data="", labels=str(folder), weights="random", size=64)
    assert config.kept
    torch.manual_seed(0)
    net = config.network(data.classes)
    read = SureImages(data, config, net.trunk.stride)
    kept = KeptSureImages(net, read, progress=False)
    for index in range(3):
        for flip in (False, True):
            own = read.item(index, flip)
            expected = net.prepare(own["image"][None])
            seed = next(seed for seed in range(20) if bool(torch.manual_seed(seed) and torch.randint(2, ())) == flip)
            torch.manual_seed(seed)
            found = kept[index]
            assert torch.equal(found["labels"], own["labels"])
            for name in ("trunk", "conv4", "conv5"):
                torch.testing.assert_close(found["maps"][name], expected[name][0], rtol=1e-4, atol=1e-4)


def test_a_grid_that_does_not_divide_the_image_is_refused(sure):
    data, folder = sure
    config = affinity_recipe("psa", LITE0, data="", labels=str(folder), weights="random", size=72)
    net = psa.build(config.network(data.classes).architecture)
    with pytest.raises(ValueError, match="a multiple of 16, got 72"):
        KeptSureImages(net, SureImages(data, config, net.trunk.stride), progress=False)


@pytest.mark.parametrize("changes", [{"jitter": True}, {"scales": (1.0, 1.0)}])
def test_what_is_kept_is_not_augmented(changes):
    with pytest.raises(ValueError, match="leave out `kept`"):
        affinity_recipe("psa", LITE0, **changes)


def test_irn_reads_its_images():
    assert not affinity_recipe("irn", LITE0).kept
