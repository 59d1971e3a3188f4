"""Metrics of a stack of heads on validation rows: per image, summed, and averaged.

Letters in shape suffixes are those of `heads`: G groups, H heads of a group, C classes, B rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def per_image(logit_GHCB: Tensor, label: Tensor, *, multilabel: bool) -> dict[str, Tensor]:
    """Compute each image's value of the metrics that are means over images.

    Args:
        logit_GHCB: Logits of every head.
        label: (G | 1, B), or (G | 1, B, C) with several labels per image.
        multilabel: Whether images have several labels.

    Returns:
        By the metric's name (see `trainer.Training.validate`), (G, H, B) each.
    """
    import torch

    if multilabel:
        target, predicted = label.mT[:, None] > 0, logit_GHCB > 0
        signed = torch.where(target, -logit_GHCB, logit_GHCB)
        loss = torch.nn.functional.softplus(signed).mean(2)
        hits, targets = (predicted & target).sum(2), target.sum(2)
        predictions = predicted.sum(2) + 0 * loss  # a loss of nan makes F1 and F2 nan
        f1, f2 = (
            (1 + weight) * hits / (weight * targets + predictions).clamp(min=1) for weight in (1, 4)
        )
        accuracy = (predicted == target).double().mean(2)
        return {"valid_loss": loss, "accuracy": accuracy, "f1": f1, "f2": f2}
    index = label[:, None, None].expand(*logit_GHCB.shape[:2], 1, -1)
    loss = -logit_GHCB.log_softmax(2).gather(2, index)[:, :, 0]
    return {"valid_loss": loss, "accuracy": logit_GHCB.argmax(2) == label[:, None]}


def sum_over_rows(
    logit_GHCB: Tensor, label: Tensor, mask_GB: Tensor, *, multilabel: bool
) -> Tensor:
    """Sum what `from_sums` needs over the rows that are not padding.

    Args:
        logit_GHCB: Logits of every head.
        label: (G | 1, B), or (G | 1, B, C) with several labels per image.
        mask_GB: bool, the rows that count.
        multilabel: Whether images have several labels.

    Returns:
        float64 (G, H, columns). With several labels per image the columns are the metrics; with
        one they are the loss, the correct rows, and the correct rows of each class.
    """
    import torch

    metrics = per_image(logit_GHCB, label, multilabel=multilabel)
    mask = mask_GB[:, None]
    if multilabel:
        return torch.stack([(one * mask).double().sum(2) for one in metrics.values()], 2)
    groups, heads, classes, rows = logit_GHCB.shape
    index = label[:, None].expand(groups, heads, rows)
    correct = metrics["accuracy"] & mask
    by_class = torch.zeros(groups, heads, classes, dtype=torch.float64, device=label.device)
    by_class.scatter_add_(2, index, correct.double())
    sums = [torch.where(mask, metrics["valid_loss"], 0), correct]
    return torch.cat([torch.stack([one.double().sum(2) for one in sums], 2), by_class], 2)


def from_sums(sums: Tensor, label: Tensor, classes: int) -> dict[str, float]:
    """Turn one head's sums (see `sum_over_rows`) into its metrics.

    Args:
        sums: The sums over all validation rows.
        label: Labels of these rows, (N,), or (N, C) with several labels per image.
        classes: The number of classes, C.
    """
    import torch

    rows = len(label)
    metrics = {"valid_loss": float(sums[0] / rows), "accuracy": float(sums[1] / rows)}
    if label.dim() == 2:
        return metrics | {"f1": float(sums[2] / rows), "f2": float(sums[3] / rows)}
    counts = torch.bincount(label, minlength=classes).cpu()
    occurs = counts > 0
    recall = sums[2:][occurs] / counts[occurs]
    return metrics | {"balanced_accuracy": float(recall.mean())}
