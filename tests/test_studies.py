"""Studies: the same training is done once, tables are read by method and seed, intervals are Student's."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
from scipy import stats

from course_lib import evidence, lesson
from course_lib.course import evidence as command
from course_lib.course import studies
from course_lib.course.studies import STUDIES, Case, ablations, measure, methods, summary
from course_lib.evidence import t_interval, values
from course_lib.published import CONTRAST_TABLES
from course_lib.worlds import minis
from course_lib.wsss.recipes import CHIMERA_CELLS, recipe
from course_lib.wsss.views import Transformation


@pytest.fixture
def trainings(monkeypatch, tmp_path, inline_pool):
    """Trainings that take no time: what was trained. Seeds score 40 and their number, SEAM 10 more, 1 less without."""

    class Trainings(list):
        """Settings of what was trained; `went_on` has the images of those that go on from CAM."""

    class Continued(NamedTuple):
        method: str
        seed: int

        def eval(self):
            return self

    done = Trainings()
    done.went_on = []

    def fit(learner, images, progress=True):
        done.went_on.append(images)
        return [{"seconds": 1.0}]

    def train(config, images=None, progress=True):
        done.append(config)
        return config, [{"seconds": 1.0}]

    def score(config, data):
        miou = 40.0 + config.seed + 10 * (config.method == "seam") + 0.5 * (data.split == "val")
        row = {
            "miou": miou,
            "miou_others": miou + 2,
            "precision": 60.0,
            "recall": 70.0,
            "threshold": 0.2,
            "track": 30.0,
            "iou": {"dots creature": 12.0},
        }
        return (
            {"with PCM": row, "without PCM": row | {"miou": miou - 1}}
            if config.method == "seam"
            else {"without PCM": row}
        )

    class Split:
        confounded = "dots creature"

        def __init__(self, root, split):
            self.split = split

    monkeypatch.setattr(studies, "train", train)
    monkeypatch.setattr(studies, "fit", fit)
    monkeypatch.setattr(studies, "continued", lambda net, config: Continued(config.method, config.seed))
    monkeypatch.setattr(studies, "TagLearner", lambda net, config: net)
    monkeypatch.setattr(studies, "training_images", lambda config, progress: "read")
    monkeypatch.setattr(studies, "part_figures", lambda *asked: {})
    monkeypatch.setattr(studies, "_images", lambda *asked: "kept")
    monkeypatch.setattr(studies, "_start", train)
    monkeypatch.setattr(studies.seeds, "score", score)
    monkeypatch.setattr(studies, "Voc", Split)
    monkeypatch.setattr(studies, "ProcessPoolExecutor", inline_pool)
    monkeypatch.setattr(minis, "mini_voc", lambda **asked: tmp_path / f"{asked['source']}{asked['seed']}")
    monkeypatch.setattr(studies, "fingerprint", lambda folder: folder.name)
    return done


def creatures(method, seed, data_seed=0):
    return method, Case("creatures", data_seed, recipe(method, "small", data="", seed=seed))


ROWS = [creatures(method, seed, data_seed) for data_seed in (0, 1) for seed in (0, 1) for method in ("cam", "seam")]


def test_rows_that_ask_for_the_same_training_share_it(trainings, tmp_path):
    rows = [*ROWS, ("the same as SEAM", ROWS[1][1])]
    table = measure(rows, tmp_path / "runs", 1)
    assert len(trainings) == len(ROWS) and len(table["runs"]) == len(rows)
    assert {name: value for name, value in table["runs"][-1].items() if name != "row"} == {
        name: value for name, value in table["runs"][1].items() if name != "row"
    }
    assert measure(rows, tmp_path / "runs", 1)["runs"] == table["runs"] and len(trainings) == len(ROWS), (
        "finished ones run again"
    )
    assert {config.data for config in trainings} == {str(tmp_path / "creatures0"), str(tmp_path / "creatures1")}


def test_other_settings_are_another_training(trainings, tmp_path):
    row, case = ROWS[0]
    changed = (row, case._replace(config=replace(case.config, epochs=case.config.epochs + 1)))
    measure([ROWS[0]], tmp_path, 1)
    measure([changed], tmp_path, 1)
    assert len(trainings) == 2


def test_values_of_a_method_stand_in_the_order_of_the_seeds(trainings, tmp_path):
    table = measure(ROWS, tmp_path, 1)
    assert values(table, "creatures", "cam", "train") == [40, 41, 40, 41]
    assert values(table, "creatures", "seam", "val") == [50.5, 51.5, 50.5, 51.5]
    assert values(table, "creatures", "seam", "val", reading="without PCM") == [49.5, 50.5, 49.5, 50.5]
    assert values(table, "creatures", "cam", "val", "confounded") == [12.0] * 4
    assert values(table, "creatures", "cam", "val", "miou_others") == [42.5, 43.5, 42.5, 43.5]
    assert values(table, "photographs", "cam", "val") == []
    assert [line.split()[:2] for line in summary(table)] == [["creatures", "cam"], ["creatures", "seam"]]


def test_what_is_written_can_be_read(trainings, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "methods", lambda: ROWS)
    monkeypatch.setattr(studies.paths, "checkout", lambda: tmp_path)
    table = studies.write("methods", tmp_path)
    assert json.loads((tmp_path / "methods.json").read_text()) == json.loads(json.dumps(table))
    assert sum('"world": "creatures"' in line for line in (tmp_path / "methods.json").read_text().splitlines()) == len(
        ROWS
    )


def test_interval_is_that_of_a_paired_test():
    first, second = [40.0, 43.0, 41.0, 39.5], [42.0, 44.0, 43.5, 41.0]
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert t_interval([b - a for a, b in zip(first, second)]) == pytest.approx((1.75, low, high))
    assert t_interval([2.0]) == (2.0, -float("inf"), float("inf"))


def test_every_method_and_every_row_has_its_seeds():
    found = methods()
    for method in ("cam", "seam", "eps", "seam+p2p", "eps+p2p"):
        worlds = [case.world for row, case in found if row == method]
        assert worlds.count("photographs") >= 4 and worlds.count("creatures") >= 6
        assert (
            len(
                {
                    (case.data_seed, case.config.seed)
                    for row, case in found
                    if row == method and case.world == "creatures"
                }
            )
            >= 6
        )


def test_rows_of_the_tables_go_on_from_one_cam_and_differ_in_one_thing():
    rows = {}
    for row, case in ablations():
        rows.setdefault(row, []).append(case)
    assert all([case.config.seed for case in cases] == [0, 1, 2] for cases in rows.values())
    assert {row.removeprefix("5: ") for row in rows if row.startswith("5")} < {*CONTRAST_TABLES[5]}
    starts = {case.start for cases in rows.values() for case in cases}
    assert starts == {case.config for case in rows["5: CAM"]} | {None}
    first = {row: cases[0].config for row, cases in rows.items()}
    whole = first["5: + pixel sampling"]
    shares = {row: config.contrast.top_k / CHIMERA_CELLS for row, config in first.items() if row.startswith("6")}
    assert shares == {"6: K = 1/128": 1 / 128, "6: K = 1/16": 1 / 16, "6: K = 1/4": 1 / 4}
    assert all(
        replace(first[row], contrast=replace(first[row].contrast, top_k=whole.contrast.top_k)) == whole
        for row in shares
    )
    control, flipped = first["7: SEAM + flip"], first["7: rescale + flip"]
    assert replace(control, method="seam+p2p") == flipped and flipped.transformation == Transformation(flip=True)
    assert replace(flipped, kept=True, transformation=Transformation()) == whole


def test_a_study_with_a_reference_says_differences(trainings, tmp_path, monkeypatch):
    cases = [case for case in ablations() if case[0] in ("5: CAM", "5: SEAM", "7: SEAM + flip")]
    monkeypatch.setitem(STUDIES, "ablations", lambda: cases)
    monkeypatch.setattr(studies.paths, "checkout", lambda: tmp_path)
    table = studies.write("ablations", tmp_path)
    found = table["differences"]["chimeras-kind"]
    assert {*found} == {"5: CAM", "7: SEAM + flip"} and found["5: CAM"]["val"] == [-10, -10, -10]
    assert trainings.went_on == ["kept", "read"] * 3, "a second view that flips is not kept"


def test_gains_are_those_of_a_seed_over_itself(trainings, tmp_path, monkeypatch):
    tables = {
        "methods": measure(methods(), tmp_path / "a", 1),
        "contrast": measure(studies.changes(), tmp_path / "b", 1),
    }
    monkeypatch.setattr(evidence, "table", tables.get)
    found = evidence.gains()
    assert list(found) == ["as in the recipe", *studies.CHANGES]
    assert found["as in the recipe"] == [-10.0] * 4  # contrast scores as any method here, SEAM 10 more
    assert all(found[name] == [-10.0] * 3 for name in studies.CHANGES)
    sizes = {config.size for config in trainings if config.backbone != "small"}
    assert sizes == {192, 288} and len({config.contrast for config in trainings if config.method == "seam+p2p"}) == 2
    monkeypatch.setattr(evidence, "table", lambda name: None)
    assert evidence.gains() is None


def test_the_command_measures_studies(monkeypatch, trainings):
    asked = []
    table = {"runs": []}
    monkeypatch.setattr(studies, "write", lambda name, shelf: asked.append(name) or table)
    monkeypatch.setattr(command.build, "build_solved", lambda *_: [])
    assert command.main(("methods",)) == 0 and asked == ["methods"]
    with pytest.raises(ValueError, match="there is no lesson sedes"):
        command.main(("sedes",))


@pytest.mark.parametrize("name", STUDIES)
def test_committed_tables_have_every_run(name):
    """Or none, of a study that is still to run: then its prediction stands there alone."""
    table = evidence.table(name)
    if name in studies.STUDY_PREDICTIONS:
        assert table["prediction"] == studies.STUDY_PREDICTIONS[name], "it stays as it was written before the study"
        if not table["runs"]:
            return
    asked = [(row, case.world, case.data_seed, case.config.seed) for row, case in STUDIES[name]()]
    assert [(run["row"], run["world"], run["data_seed"], run["seed"]) for run in table["runs"]] == asked
    assert not str(table["commit"]).endswith("dirty") and set(table["versions"]) <= set(lesson.PACKAGES) | {"python"}
