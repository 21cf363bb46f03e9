from __future__ import annotations

import numpy as np
import pytest

from elrcli.audit.scores import ranking_figures


def test_a_perfect_ranking_has_figures_of_one():
    figures = ranking_figures(np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, True, False]))
    assert figures == {"errors": 2, "auroc": 1.0, "ap": 1.0, "p_at_n": 1.0}


def test_a_ranking_by_hand():
    # errors at places 1 and 3: AP = (1/1 + 2/3) / 2, one of the first two is an error,
    # three of the four (error, clean) pairs are in order
    figures = ranking_figures(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False]))
    assert figures["ap"] == pytest.approx(5 / 6)
    assert figures["p_at_n"] == 0.5
    assert figures["auroc"] == 0.75


@pytest.mark.parametrize("is_error", [[False, False], [True, True]])
def test_one_kind_of_labels_has_no_ranking(is_error):
    figures = ranking_figures(np.array([0.1, 0.2]), np.array(is_error))
    assert figures == {"errors": sum(is_error), "auroc": None, "ap": None, "p_at_n": None}
