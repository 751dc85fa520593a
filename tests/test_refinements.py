"""The study of refinements: every row of a method, finished ones kept, what is frozen computed once."""

from functools import partial

import pytest
import torch

from course_lib.course import refinements
from course_lib.evidence import values
from course_lib.worlds import minis
from course_lib.wsss.pipeline import PipelineConfig


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The study on eight creatures of each split, one epoch of everything."""
    creatures, folder = minis.mini_voc(source="creatures"), tmp_path / "few"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part in creatures.iterdir():
        if part.name != "ImageSets":
            (folder / part.name).symlink_to(part)
    for part in (creatures / "ImageSets" / "Segmentation").iterdir():
        (lists / part.name).write_text("\n".join(part.read_text().split()[:8]) + "\n")
    monkeypatch.setattr(refinements.minis, "mini_voc", lambda **_: folder)
    settings = {"backbone": "small", "weights": "random", "epochs": 1, "batch_size": 4, "size": 64}
    monkeypatch.setattr(refinements, "PipelineConfig", partial(PipelineConfig, **settings))


def test_every_row_has_its_scores_and_is_made_once(small, tmp_path, monkeypatch):
    rows = refinements.refined("cam", 0, tmp_path)
    assert {row["row"] for row in rows} == {f"cam: {what}" for what in ("seeds", "crf", "psa", "irn", "deeplab")}
    by_name = {row["row"]: row["splits"] for row in rows}
    assert [*by_name["cam: seeds"]["train"]] == ["best threshold", "own threshold"]
    assert {*by_name["cam: crf"]} == {*by_name["cam: irn"]} == {"train"}
    assert {*by_name["cam: deeplab"]} == {"train", "val"}
    for splits in by_name.values():
        assert all(0 <= row["miou"] <= 100 for split in splits.values() for row in split.values())
    true = refinements.refined("true masks", 0, tmp_path)
    assert [row["row"] for row in true] == ["true masks: deeplab"]
    monkeypatch.setattr(refinements, "run_pipeline", lambda *_, **__: pytest.fail("a row was made again"))
    assert refinements.refined("cam", 0, tmp_path) == rows


def test_the_table_holds_differences_from_the_seeds():
    def run(row, seed, miou):
        scores = {"masks": {"miou": miou}}
        return {"row": row, "world": "photographs", "seed": seed, "splits": {"train": scores, "val": scores}}

    runs = [run("cam: seeds", seed, 40.0 + seed) for seed in range(3)]
    runs += [run("cam: crf", seed, 45.0 + seed) for seed in range(3)]
    table = refinements.refinement_table(runs)
    assert table["differences"] == {"cam: crf": {"train": [5.0, 5.0, 5.0], "val": [5.0, 5.0, 5.0]}}
    assert values(table, "photographs", "cam: crf", "train") == [45.0, 46.0, 47.0]
    said = [*refinements.refinement_summary(table)][1]
    assert said.split() == ["cam:", "crf", "train", "46.0", "±", "1.0", "val", "46.0", "±", "1.0"]


def test_what_is_frozen_is_computed_once_for_an_image():
    class Net(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.still = torch.nn.Parameter(torch.tensor(weight), requires_grad=False)
            self.learned = torch.nn.Parameter(torch.rand(()))

    asked = []

    def frozen(self, images):
        asked.append(len(images))
        return {"trunk": self.still * images}

    once, images = refinements.remembered(frozen), torch.rand(3, 3, 2, 2)
    for net in (Net(2.0), Net(2.0)):  # what learns does not matter
        assert torch.equal(once(net, images)["trunk"], 2 * images)
        assert torch.equal(once(net, images[[2, 0]])["trunk"], 2 * images[[2, 0]])
    assert asked == [3]
    assert torch.equal(once(Net(3.0), images[:1])["trunk"], 3 * images[:1])
    assert torch.equal(once(Net(2.0), torch.cat((images, images.flip(-1))))["trunk"][3:], 2 * images.flip(-1))
    assert asked == [3, 1, 3]
