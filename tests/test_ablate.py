"""Ablations: what a row changes, what comes out, and that an interrupted one goes on."""

import json
from dataclasses import replace

import pytest

from course_lib import __main__
from course_lib.backbones.weights import LITE0
from course_lib.experiments import wsss as ablation
from course_lib.experiments.wsss import ablate, as_markdown
from course_lib.published import CONTRAST_TABLES
from course_lib.worlds import minis, tagged
from course_lib.wsss.recipes import recipe, rows
from course_lib.wsss.views import Transformation


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tagged.RECIPES, "creatures", replace(tagged.RECIPES["creatures"], images={"trainaug": 8, "val": 4})
        )
        patch.setattr(minis, "SCORED", 4)
        return minis.mini_voc(tmp_path_factory.mktemp("data"), "creatures")


def tiny(tree):
    return recipe("seam+p2p", "small", data=str(tree), size=32, small=16, epochs=1, batch_size=4, neck=16)


@pytest.mark.parametrize("table", CONTRAST_TABLES)
@pytest.mark.parametrize("backbone", ["small", "resnet38", LITE0])
def test_rows_change_what_they_say(table, backbone):
    config = recipe("seam+p2p", backbone, data="d")
    found = rows(table, config)
    assert list(found) == list(CONTRAST_TABLES[table]) and len({repr(part) for part in found.values()}) == len(found)
    if table == 6:
        assert [part.contrast.top_k for part in found.values()][1:] == [4, 8, 16, 32, 64]
        assert found["K = 0"].method == "seam" and found["K = 32"] == config
    elif table == 7:
        plain, *turned = [part.transformation for part in list(found.values())[1:]]
        assert plain == Transformation() and turned == [
            Transformation(flip=True),
            Transformation(rotation=20.0),
            Transformation(translation=16.0),
        ]
        assert not any(part.kept for part in found.values()), "all rows draw the same images"
        assert found["rescale"] == replace(config, kept=False) and found["CAM"].method == "cam"
    else:
        assert found["+ pixel sampling"] == config
        weights = [
            (part.contrast.cross_prototype > 0, part.contrast.cross_cam > 0, part.contrast.intra > 0)
            for part in list(found.values())[2:]
        ]
        assert weights == [(True, False, False), (True, True, False), *[(True, True, True)] * 3]
        mined = [(part.contrast.mine_prototypes, part.contrast.mine_pixels) for part in list(found.values())[4:]]
        assert mined == [(False, False), (True, False), (True, True)]
        assert (found["CAM"].epochs, found["SEAM"].small) == {
            "resnet38": (15, 134),
            "small": (8, 32),
            LITE0: (config.epochs, config.small),
        }[backbone]


def test_what_was_interrupted_goes_on(tree, tmp_path, monkeypatch):
    train, calls = ablation.train, []

    def counted(config, folder, progress):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((config.seed, folder.parent.name))
        return train(config, folder, progress)

    monkeypatch.setattr(ablation, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        ablate(6, tiny(tree), (0, 1), tmp_path, progress=False)
    monkeypatch.setattr(
        ablation,
        "train",
        lambda config, folder, progress: (
            calls.append((config.seed, folder.parent.name)) or train(config, folder, progress)
        ),
    )
    result = ablate(6, tiny(tree), (0, 1), tmp_path, limit=None, progress=False)
    names = ["k=0", "k=4", "k=8", "k=16", "k=32", "k=64"]
    assert calls == [(seed, name) for seed in (0, 1) for name in names], "nothing is trained twice"
    assert json.loads((tmp_path / "table6.json").read_text()) == result
    assert all(set(found) == {"0", "1"} and set(found["0"]) == {"train", "val"} for found in result["rows"].values())
    assert "| K = 64 |" in (tmp_path / "table6.md").read_text()
    with pytest.raises(ValueError, match="with other settings: epochs was 1 and is 2"):
        ablate(6, replace(tiny(tree), epochs=2), (0,), tmp_path, progress=False)


def test_table():
    scores = {
        "0": {"train": {"with PCM": 50.0, "without PCM": 1.0}, "val": {"with PCM": 40.0}},
        "1": {"train": {"with PCM": 52.0, "without PCM": 1.0}, "val": {"with PCM": 41.0}},
    }
    found = as_markdown({"table": 6, "rows": {"K = 0": scores, "K = 4": {}}})
    assert "| K = 0 | 51.0 ± 1.4 (50.0, 52.0) | 55.41 | 40.5 ± 0.7 (40.0, 41.0) |  |" in found
    assert "| K = 4 |  | 60.02 |  |  |" in found


def test_command_refuses_other_methods(tree, tmp_path, capsys):
    options = ["ablate", "--table", "5", "--data", str(tree), "--folder", str(tmp_path)]
    assert __main__.main([*options, "--method", "eps+p2p"]) == 1
    assert "method seam+p2p, got eps+p2p" in capsys.readouterr().err
