"""Maps of photographs of one's own: the function for any network with features, its controls, and the command."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from course_lib import __main__, backbones, checkpoints, maps
from course_lib.backbones import split_classifier
from course_lib.metric_learning.explain import resemblance
from course_lib.metric_learning.rules import NAMES
from course_lib.paths import shelf


class Planted(nn.Module):
    """Channel k is the colour of patch k of a palette: where an image shares colours with a reference is known."""

    def features(self, images):
        return nn.functional.avg_pool2d(torch.cat((images, 1 - images), 1), 4)


def patch(colour, at=None):
    """A grey image with a patch of a colour."""
    image = torch.full((1, 3, 32, 32), 0.2)
    if at:
        image[..., at[0] : at[0] + 12, at[1] : at[1] + 12] = torch.tensor(colour)[:, None, None]
    return image


def test_the_map_is_that_of_the_library_and_lies_on_what_is_shared():
    image, reference = patch((0.9, 0.0, 0.0), (4, 4)), patch((0.9, 0.0, 0.0), (16, 16))
    found = resemblance(Planted(), image, reference, "prototype")
    pooled = Planted().features(reference).mean((2, 3))
    assert torch.allclose(found.raw, maps.cam(Planted().features(image), pooled)[0])
    assert found.heatmaps((32, 32)).shape == (1, 32, 32) and found.other is None
    assert found.dependence.shape == (1,) and 0 <= found.dependence[0] <= 1


def test_a_map_that_ignores_its_reference_has_no_dependence():
    """Uniform weights are the same whatever the reference is."""
    found = resemblance(Planted(), patch((0.9, 0, 0), (4, 4)), patch((0, 0.9, 0), (4, 4)), "uniform")
    assert found.dependence[0] == pytest.approx(0, abs=1e-6)
    assert torch.equal(found.raw, found.shuffled)


def test_a_map_of_the_reference_alone_depends_on_it():
    """Two patches, red and blue: with weights of one channel the map is another one than with those shuffled."""
    image = patch((1.0, 0, 0), (2, 2))
    image[..., 18:30, 18:30] = torch.tensor([0, 0, 1.0])[:, None, None]
    both = [patch((1.0, 0, 0), (8, 8)), patch((0, 0, 1.0), (8, 8))]
    found = resemblance(Planted(), image, both, "p-mean")
    assert found.dependence.min() > 0.3
    red, blue = found.raw
    assert red[:4, :4].mean() > red[4:, 4:].mean() and blue[:4, :4].mean() < blue[4:, 4:].mean()
    assert torch.allclose(found.other, found.raw.flip(0))


@pytest.mark.parametrize("rule", NAMES)
def test_every_rule_of_a_pair_is_there(rule):
    found = resemblance(
        Planted(), patch((0.9, 0, 0), (4, 4)), [patch((0.9, 0, 0), (4, 4)), patch((0, 1.0, 0), (1, 1))], rule
    )
    assert found.raw.shape == (2, 8, 8) and found.raw.isfinite().all()


def test_a_network_of_torchvision_is_one_line():
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None).eval()
    net = SimpleNamespace(features=split_classifier(resnet)[0])
    found = resemblance(net, torch.rand(1, 3, 64, 96), torch.rand(2, 3, 64, 64), "dist-cam")
    assert found.raw.shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("rule", "references", "said"),
    [
        ("magic", 1, "Expected a rule"),
        ("p-mean", 1, "two references"),
        ("dist-cam", 0, "Expected a reference"),
    ],
)
def test_what_makes_no_sense_is_said(rule, references, said):
    with pytest.raises(ValueError, match=said):
        resemblance(Planted(), patch((1.0, 0, 0), (4, 4)), torch.rand(references, 3, 8, 8), rule)


def test_features_must_be_maps():
    net = SimpleNamespace(features=lambda images: images.mean((2, 3)))
    with pytest.raises(ValueError, match="before global pooling"):
        resemblance(net, torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for name, size in {"one": (40, 60), "two": (60, 40), "three": (50, 50)}.items():
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.jpg")
    return tmp_path


def explained(*words):
    return __main__.main(["explain", *map(str, words), "--size", "64"])


def test_without_a_reference_the_likeliest_classes_are_drawn(photos, capsys):
    assert explained(photos / "one.jpg", "-o", photos / "out.png", "--top", 2, "--raw") == 0
    said = capsys.readouterr().out
    assert "%" in said and str(photos / "out.png") in said
    with Image.open(photos / "out.png") as picture:
        assert min(picture.size) > 100
    assert "Heatmaps over photographs" in (photos / "out.txt").read_text()
    assert np.load(photos / "out-one.npy").shape[0] == 2


def test_with_references_controls_stand_beside_the_maps(photos, capsys):
    references = "--reference", photos / "two.jpg", photos / "three.jpg"
    assert explained(photos / "one.jpg", *references, "--rule", "p-mean", "-o", photos / "new" / "out.png") == 0
    said = capsys.readouterr().out
    assert "of the map depends on two.jpg" in said and "three.jpg" in said
    assert "prototype-centred" in (photos / "new" / "out.txt").read_text()


def test_a_checkpoint_of_ones_own_is_read(photos, capsys):
    torch.manual_seed(0)
    net = backbones.create("resnet18", pretrained=False, num_classes=3)
    checkpoints.write(photos / "own.safetensors", net)
    words = "--checkpoint", photos / "own.safetensors", "--architecture", "resnet18", "-o", photos / "out.png"
    assert explained(photos / "one.jpg", *words, "--class", "class 2") == 0
    assert "class 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.jpg"], "A photograph was expected"),
        (["one.jpg", "--class", "unicorn"], "no class 'unicorn'"),
        (["one.jpg", "--class", "cat"], "near are"),
        (["one.jpg", "--rule", "dist-cam"], "got no reference"),
        (["one.jpg", "--checkpoint", "x"], "--architecture together"),
        (["one.jpg", "--reference", "two.jpg", "--class", "cat"], "got both"),
    ],
)
def test_wrong_questions_get_a_sentence(photos, words, said, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    try:
        code = explained(*words)
    except SystemExit as stop:
        code = stop.code
    assert code and said in " ".join("".join(capsys.readouterr()).replace("│", " ").split())
    assert shelf().is_dir() and not (photos / "explained.png").exists()
