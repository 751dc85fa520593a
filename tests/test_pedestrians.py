"""Parts of a pedestrian on trial: what hiding each of them costs, beside what the map says."""

import pytest

from course_lib.metric_learning.pedestrians import parts_on_trial


def test_each_part_is_hidden_alone_and_compared_with_the_whole():
    asked = []

    def measure(hidden):
        asked.append(hidden)
        return 50.0 - {"legs": 30.0, "torso": 12.0, "head": -2.0}.get(hidden[0], 0.0) if hidden else 50.0

    costs, order, agree = parts_on_trial(measure, {"head": 3.0, "torso": 1.0, "legs": 2.0})
    assert costs == pytest.approx({"head": -2, "torso": 12, "legs": 30})
    assert order == ["legs", "torso", "head"] and set(asked) == {(), ("head",), ("torso",), ("legs",)}
    assert agree == pytest.approx(1 / 3)  # legs over torso, but neither over head


def test_parts_that_cost_the_same_tell_nothing():
    with pytest.raises(ValueError, match="different costs"):
        parts_on_trial(lambda hidden: 1.0, {"head": 1.0, "legs": 2.0})
