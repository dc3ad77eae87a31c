"""Words that figures and tables share."""

import numpy as np
import pandas as pd
import pytest

from kit.show.wording import in_units, need, need_one, with_interval


def test_a_score_is_written_with_its_interval_or_with_a_dash():
    assert with_interval(0.732, 0.65, 0.789) == "0.73 [0.65, 0.79]"
    assert with_interval(1.0, None, None) == with_interval(1.0, np.nan, np.nan) == "1.00 [–]"
    assert with_interval(0.52, -1.04, 2, 1, "+") == "+0.5 [-1.0, +2.0]"


def test_units_are_said_where_they_are_known():
    assert in_units("true", "age") == "true (years)" and in_units("true", "mmse") == "true"


def test_what_a_table_lacks_is_named():
    table = pd.DataFrame({"task": ["age", "sex"], "mode": ["probe", "probe"]})
    need(table, "scores", ["task"])
    with pytest.raises(ValueError, match="scores lacks value; its columns are task, mode"):
        need(table, "scores", ["task", "value"])
    with pytest.raises(ValueError, match="scores has no rows"):
        need(table[:0], "scores", ["task"])
    need_one(table, "scores", ["mode", "seed"])
    with pytest.raises(ValueError, match="scores holds several of task: age, sex; select one"):
        need_one(table, "scores", ["mode", "task"])
