"""How good a ranking of labels is, where the true ones are known: a pure function over arrays."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score


def ranking_figures(score: np.ndarray, is_error: np.ndarray) -> dict[str, float | None]:
    """Return AUROC, average precision and precision among the first N of a ranking.

    score [M] higher is more suspicious, is_error [M] bool, N the number of errors; None where
    there are no errors or nothing else.
    """
    errors = int(is_error.sum())
    if errors in (0, len(is_error)):
        return {"errors": errors, "auroc": None, "ap": None, "p_at_n": None}
    leading = np.argsort(-score, kind="stable")[:errors]
    return {
        "errors": errors,
        "auroc": float(roc_auc_score(is_error, score)),
        "ap": float(average_precision_score(is_error, score)),
        "p_at_n": float(is_error[leading].mean()),
    }
