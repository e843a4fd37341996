"""Score classifiers on labelled images, and review both: calibration, probes of features, doubtful labels, a report."""

from .scores import (
    ClassScore,
    Evaluation,
    accuracy_interval,
    balanced_accuracy,
    evaluate,
    evaluate_scores,
    is_tie,
    macro_f1,
    smallest_difference,
)

__all__ = [
    "ClassScore",
    "Evaluation",
    "accuracy_interval",
    "balanced_accuracy",
    "evaluate",
    "evaluate_scores",
    "is_tie",
    "macro_f1",
    "smallest_difference",
]
