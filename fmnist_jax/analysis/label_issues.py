"""Label issues: training images whose labels are probably wrong.

Two heuristics: confident predictions of another class by a network that was not trained on the
image (confident learning, Northcutt, Jiang and Chuang 2021), and forgetting events during training
(Toneva et al. 2019).
"""

from typing import NamedTuple

import numpy as np
from scipy.special import softmax

from fmnist_jax.analysis.scores import check_predictions


class LabelIssues(NamedTuple):
    """Images with doubtful labels, by descending margin.

    Attributes:
      indices: int[s], positions among all images.
      given: int[s], their labels.
      other: int[s], the predicted classes.
      given_probability: float64[s].
      other_probability: float64[s]; the margin is `other_probability - given_probability`.
    """

    indices: np.ndarray
    given: np.ndarray
    other: np.ndarray
    given_probability: np.ndarray
    other_probability: np.ndarray


def find_label_issues(logits: np.ndarray, labels: np.ndarray) -> LabelIssues:
    """Finds labels that contradict confident predictions.

    The threshold of a class is the mean probability of the class over the images labeled with it
    (Northcutt et al., eq. 2). An image is an issue if the probability of its label is below the
    threshold of the label, and that of another class reaches its threshold. If several do, `other`
    is the most probable one.

    Args:
      logits: float[n, num_classes], of each image from a network that was not trained on it.
      labels: int[n], values in [0, num_classes).

    Raises:
      ValueError: if shapes do not match, logits are not finite or labels are out of range.

    Example:
      >>> logits = np.array([[2.0, 0], [3, 0], [0, 3], [0, 2], [0, 4]])
      >>> find_label_issues(logits, np.array([0, 0, 1, 1, 0])).indices.tolist()
      [4]
    """
    logits, labels = check_predictions(logits, labels)
    probabilities = softmax(logits, axis=1)
    rows = np.arange(len(labels))
    given = probabilities[rows, labels]
    num_classes = logits.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=given, minlength=num_classes)
    # No probability reaches the threshold of a class without images.
    thresholds = np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)

    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    confident[rows, labels] = -1.0
    other = confident.argmax(axis=1)
    highest = confident[rows, other]
    found = np.flatnonzero((given < thresholds[labels]) & (highest >= 0))
    found = found[np.argsort((given - highest)[found], kind="stable")]
    return LabelIssues(found, labels[found], other[found], given[found], highest[found])


def forgetting_events(history: np.ndarray) -> np.ndarray:
    """Counts how often each image went from correct to incorrect.

    Args:
      history: bool[epochs, n], True where the image was classified correctly after the epoch.

    Returns:
      int[n]. An image that was never correct has 0; Toneva et al. group it with the most forgotten.

    Example:
      >>> forgetting_events(np.array([[1, 0], [0, 0], [1, 1], [0, 1]], bool)).tolist()
      [2, 0]
    """
    return (history[:-1] & ~history[1:]).sum(axis=0)
