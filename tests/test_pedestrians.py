"""Parts of a pedestrian on trial: what hiding each of them costs, beside what the map says."""

import pytest

from course_lib.metric_learning.pedestrians import parts_on_trial


def test_each_part_is_hidden_alone_and_compared_with_the_whole():
    asked = []

    def measure(hidden):
        asked.append(hidden)
        return 50.0 - {"legs": 30.0, "torso": 12.0, "head": -2.0}.get(hidden[0], 0.0) if hidden else 50.0

    costs, needed, hottest = parts_on_trial(measure, {"head": 3.0, "torso": 1.0, "legs": 2.0})
    assert costs == pytest.approx({"head": -2, "torso": 12, "legs": 30})
    assert (needed, hottest) == ("legs", "head") and set(asked) == {(), ("head",), ("torso",), ("legs",)}
