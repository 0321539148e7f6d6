"""Figures of predictions, and a baseline that any model must beat, by scikit-learn and SciPy.

scikit-learn is imported where it is used, because the import takes a second that other tasks need not spend.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class ClassScores(NamedTuple):
    """Figures of a classification.

    Attributes:
      accuracy: share of correct predictions.
      f1: harmonic mean of precision and recall. With two classes it is that of the second; with more, the average over
        classes. A class that never occurs, or is never predicted, has 0.
      matthews: correlation of predicted and true classes, -1 to 1; 0 for predictions that ignore the input.
    """

    accuracy: float
    f1: float
    matthews: float


def class_scores(confusion: Float[np.ndarray, "true predicted"]) -> ClassScores:
    """The scores for counts: `confusion[i, j]` examples of class i were taken for class j."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    true, predicted = np.indices(confusion.shape)
    cells = (true.ravel(), predicted.ravel())
    weights = confusion.ravel()
    average = "binary" if len(confusion) == 2 else "macro"
    return ClassScores(
        float(accuracy_score(*cells, sample_weight=weights)),
        float(f1_score(*cells, sample_weight=weights, average=average, zero_division=0.0)),
        float(matthews_corrcoef(*cells, sample_weight=weights)),
    )


def count_pairs(
    true: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"], num_classes: int
) -> Float[np.ndarray, "true predicted"]:
    """The `confusion` that `class_scores` takes."""
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (true, predicted), 1.0)
    return confusion


class Correlations(NamedTuple):
    """Figures of a regression, -1 to 1; 0 if predictions or true numbers are constant, NaN if one is not finite.

    Attributes:
      pearson: correlation of the numbers.
      spearman: correlation of their ranks.
    """

    pearson: float
    spearman: float


def correlations(true: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n"]) -> Correlations:
    """The correlations of predictions with the true numbers, computed in float64."""
    from scipy.stats import pearsonr, spearmanr

    true, predicted = (np.asarray(numbers, np.float64) for numbers in (true, predicted))  # SciPy keeps float32
    if not (np.isfinite(true).all() and np.isfinite(predicted).all()):
        return Correlations(math.nan, math.nan)
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return Correlations(0.0, 0.0)
    return Correlations(float(pearsonr(true, predicted).statistic), float(spearmanr(true, predicted).statistic))


def predict_by_bag_of_bytes(train: Sequence[str], labels: np.ndarray, heldout: Sequence[str]) -> np.ndarray:
    """Labels of held-out texts, predicted from the counts of each text's bytes, whatever their order.

    The features are log(1 + count) of each byte, standardised. Labels that are classes (integers) get a logistic
    regression, labels that are numbers a ridge regression. A model that reads the text should beat it.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_class = np.issubdtype(labels.dtype, np.integer)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000) if is_class else Ridge())
    predicted: np.ndarray = model.fit(_log_counts(train), labels).predict(_log_counts(heldout))
    return predicted


def _log_counts(texts: Sequence[str]) -> Float[np.ndarray, "n 256"]:
    counts = [np.bincount(np.frombuffer(text.encode("utf-8"), np.uint8), minlength=256) for text in texts]
    return np.log1p(np.array(counts, np.float32))
