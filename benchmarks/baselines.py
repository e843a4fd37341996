"""Score classifiers without a network on Fashion-MNIST: what an experiment with few images has to beat.

Logistic regression and nearest neighbours on the pixels, trained on the images that the search recipes draw, and
scored on the 10,000 test images.
"""

import numpy as np
import torch

from glit_models.data import open_splits
from glit_models.evaluate.probe import FrozenFeatures, score_linear, score_neighbours

from . import report


def main() -> None:
    """Score and print."""
    parser = report.parser(__doc__, rounds=1)
    parser.add_argument("--images", type=int, nargs="+", default=[3000, 20000], help="numbers of training images")
    parser.add_argument("--hold-out", type=int, default=2000, help="training images that a recipe keeps for searching")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[report.Row] = []
    for count in options.images:
        splits = open_splits("fashion-mnist", None, options.hold_out, count, 0)
        data = FrozenFeatures(splits.class_names, *_pixels(splits.train), *_pixels(splits.test), 0.0)
        linear, _ = score_linear(data)
        rows.append({
            "images": count, "logistic regression, %": f"{linear.top1:.2f}",
            "5 nearest neighbours, %": f"{score_neighbours(data, 5).top1:.2f}",
        })  # fmt: skip
    report.show("baselines", options, rows, "accuracy on the test images")


def _pixels(dataset: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 784] from 0 to 1, and labels [N]."""
    images, labels = zip(*dataset, strict=True)  # type: ignore[call-overload]
    flat = np.stack([np.asarray(image.convert("L"), np.float32).ravel() for image in images]) / 255
    return torch.from_numpy(flat), torch.tensor(labels)


if __name__ == "__main__":
    main()
