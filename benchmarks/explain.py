"""Evaluate the maps of `glit explain` by deletion and insertion, on Fashion-MNIST.

Deletion removes the patches in the order of a map, the most important one first, and averages the probability of the
class that was predicted for the whole image: lower is better. Insertion adds them in the same order: higher is better.
(Petsiuk et al., RISE, arXiv 1806.07421.) Each map is compared with random orders on the same images.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glit_models.data.fashion_mnist import FashionMNIST
from glit_models.explain import attention_map, gradcam, rollout, token_mixing
from glit_models.predict import Classifier, load_model

from . import report

Maps = dict[str, Tensor]  # by method, [B, h, w]


def main() -> None:
    """Explain, delete, insert and print."""
    parser = report.parser(__doc__, rounds=1)
    parser.add_argument("--model", default="glit_tiny.fashion_mnist", help="model, as for `glit explain`")
    parser.add_argument("--images", type=int, default=200, help="number of test images (default: 200)")
    parser.add_argument("--root", help="folder of the Fashion-MNIST files (default: found or downloaded)")
    parser.add_argument("--device", type=report.device, default="cpu", help="cpu, cuda, ... (default: cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    classifier = Classifier(load_model(options.model), torch.device(options.device))
    data = FashionMNIST("test", options.root)
    images = torch.stack([classifier.transform(data[index][0]) for index in range(options.images)])
    images = images.to(options.device)
    maps = _maps(classifier.model, images)
    report.show("explain", options, _rows(classifier.model, images, maps), f"mean of {len(images)} images, rounds")


def _maps(model: torch.nn.Module, images: Tensor) -> Maps:
    batches = [_maps_of_batch(model, batch) for batch in images.split(50)]
    maps = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    random = torch.rand(next(iter(maps.values())).shape, generator=torch.Generator().manual_seed(0))
    # Grad-CAM is zero at many patches, which come in a random order too.
    return {name: values + 1e-6 * values.amax() * random for name, values in maps.items()} | {"random": random}


def _maps_of_batch(model: torch.nn.Module, images: Tensor) -> Maps:
    blocks = token_mixing(model, images)
    last = max(index for index, block in enumerate(blocks) if "attention" in block.heads)
    maps = {
        f"attention, block {last}": attention_map(model, blocks[last].heads["attention"].mean(1), images),
        "rollout": attention_map(model, rollout(blocks), images),
    }
    result = gradcam(model, images)
    grid = tuple(maps["rollout"].shape[1:])
    maps[f"Grad-CAM, block {result.block}"] = F.adaptive_avg_pool2d(result.maps[:, None], grid)[:, 0]
    return {name: values.cpu() for name, values in maps.items()}


def _rows(model: torch.nn.Module, images: Tensor, maps: Maps) -> list[report.Row]:
    scores = {name: _deletion_insertion(model, images, values) for name, values in maps.items()}
    rows: list[report.Row] = []
    for name, both in scores.items():
        row: dict[str, str | int | float] = {"map": name}
        for test, values, base in zip(("deletion", "insertion"), both, scores["random"], strict=True):
            difference = values - base
            spread = 1.96 * float(difference.std()) / math.sqrt(len(difference))
            row[test] = f"{float(values.mean()):.3f}"
            row[f"{test}, less random"] = "" if name == "random" else f"{float(difference.mean()):+.3f} ± {spread:.3f}"
        rows.append(row)
    return rows


@torch.inference_mode()
def _deletion_insertion(model: torch.nn.Module, images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """The mean probability over all steps, for each image: [B] for deletion and [B] for insertion."""
    classes = model(images).argmax(-1)
    rank = maps.flatten(1).argsort(1, descending=True).argsort(1).view(maps.shape).to(images.device)  # [B, h, w]
    blank = images.amin()  # the level of the background
    sums = [torch.zeros(len(images)), torch.zeros(len(images))]
    steps = range(maps[0].numel() + 1)
    for step in steps:
        first = F.interpolate((rank < step).float()[:, None], images.shape[-2:])  # the patches of this step and before
        for kept, total in zip((1 - first, first), sums, strict=True):
            logits = model(images * kept + blank * (1 - kept))
            total += logits.softmax(-1).gather(1, classes[:, None])[:, 0].cpu()
    return sums[0] / len(steps), sums[1] / len(steps)


if __name__ == "__main__":
    main()
