"""Logistic regression: the linear head's exact optimum, on standardized features.

    features, labels        -> standardized rows in blocks; each worker has its share
    L2 strengths, folds     -> held-out log loss of each strength       (`choose_strength`)
    the chosen strength     -> the optimum on all training rows         (`LogisticSolver.solve`)

With one label per image this is softmax regression (with two classes a single logit, as in
scikit-learn); with several labels it is one binary regression per label, all with the same L2
strength. The objective is scikit-learn's: the sum of the losses plus l2/2 times the squared
weights, so l2 is 1/C; the intercept is not penalized. scikit-learn needs all rows in memory and
fits one fold at a time; here rows can stay on disk, workers share them, and 1 and N workers get the
same head to about 1e-6, since everything is decided from sums over all workers.

L-BFGS minimizes the objective on full batches in float64, in coordinates where the Hessian is about
the identity: the principal axes of the features. The models of all folds are solved together, and
each strength starts from the solution of the one before, from the strongest on.

Letters in shape suffixes: K models solved together, C columns of logits (1 for two classes),
D features, A principal axes, B rows of a block, N rows of this worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arrowhead.data import splits
from arrowhead.training import cross_validation, lbfgs
from arrowhead.training.batches import DistributedContext
from arrowhead.training.dataset import Data, Trial, class_weights, mean_and_std
from arrowhead.training.trainer import EpochMetrics, TrainedHead, evaluate

if TYPE_CHECKING:
    from torch import Tensor


L2_STRENGTHS = tuple(float(f"{10 ** (half / 2):.6g}") for half in range(9, -3, -1))
"""The strengths that --l2 auto tries, strongest first: 31,623 to 0.1 (C from 0.00003 to 10)."""
FOLDS = 5
MAX_WORSE_STRENGTHS = 3  # the search ends after this many strengths in a row that were not better
INVERSE_TEMPERATURES = tuple(2 ** (half / 2) for half in range(-2, 3))
"""Factors of the logits when strengths are compared."""
# Gradient norms at which a solve ends. The Hessian is about 1: losses are exact to 1e-5 and 1e-12.
CV_GRADIENT_NORM, FINAL_GRADIENT_NORM = 1e-3, 1e-6
MAX_AUTO_WORK = 1 << 35  # images x features x classes up to which --head auto takes logistic
MAX_CV_WORK = 1 << 28  # the same, up to which cross-validation uses all images
MAX_CACHED_VALUES = 1 << 26  # standardized rows are cached up to 512 MiB, else computed every pass
BLOCK_VALUES = 1 << 21  # values in a block of rows or in its logits
MAX_SOLVE_WEIGHTS = 1 << 22  # weights of all models in one solve; L-BFGS holds 20 times as many
MAX_AXES_ROWS = 8192  # rows that the principal axes are computed from


def train(
    data: Data,
    trials: Sequence[Trial],
    distributed: DistributedContext = DistributedContext(),
    report: Callable[[EpochMetrics], None] = lambda metrics: None,
) -> list[TrainedHead]:
    """Solve the head of each trial; all workers call this function together.

    Args:
        data: Features and labels.
        trials: `config.l2` is the strength of the L2 penalty; "auto" chooses it by
            cross-validation within `train`.
        distributed: This worker's rank.
        report: Gets the metrics of each head.

    Returns:
        One head per trial. Its metrics are those of a single epoch, 0, with `l2` and, if that was
        chosen, `cv_loss`. Losses are in nats per image, with several labels the mean over labels.
    """
    heads = []
    for number, trial in enumerate(trials):
        head = _train(data, trial, distributed)
        report({number: head.epochs[0]})
        heads.append(head)
    return heads


def _train(data: Data, trial: Trial, distributed: DistributedContext) -> TrainedHead:
    solver = LogisticSolver(data, trial, distributed)
    chosen: dict[str, float] = {}
    start = None
    strength = trial.config.l2
    if strength == "auto":
        sample = sample_for_cv(data, trial)
        strength, loss, start = choose_strength(
            solver
            if sample is trial
            else LogisticSolver(data, sample, distributed, solver.principal_axes)
        )
        chosen = {"cv_loss": loss}
    model = solver.solve(solver.all_images(), strength, start, FINAL_GRADIENT_NORM)
    state = solver.head_state(model)
    train_loss = float(solver.mean_losses(model)[0])
    metrics = evaluate(data, trial, state, distributed)
    result = {"epoch": 0, "train_loss": train_loss} | metrics | {"l2": strength} | chosen
    return TrainedHead(state=state, epochs=[result], epoch=0, l2=strength)


def sample_for_cv(data: Data, trial: Trial) -> Trial:
    """Return the trial on few enough training images for cross-validation.

    They are drawn by content, the same share of every class.
    """
    views, width = data.feature.shape[1:]
    classes, rows = len(data.classes), trial.train
    max_rows = max(20 * classes, MAX_CV_WORK // (views * width * classes), MAX_AXES_ROWS)
    if len(rows) <= max_rows:
        return trial
    label = data.label.cpu().numpy()[rows]
    parts = math.ceil(len(rows) / max_rows)
    part = cross_validation.assign_folds(data.key[rows], label, parts, data.classes)
    return replace(trial, train=rows[part <= 0])  # -1: classes too rare to be divided


# ------------------------------------------------------------------------------ the strength


def choose_strength(solver: LogisticSolver) -> tuple[float, float, Models | None]:
    """Choose the L2 strength by cross-validation.

    The strength with the lowest log loss on held-out rows is chosen, where each strength is judged
    at its best temperature of 1/2 to 2. At temperature 1 the log loss prefers strengths that are
    too strong for accuracy: a weak penalty makes the head overconfident, which calibration
    corrects afterwards, but a strong penalty makes it predict the common class too often, which
    nothing corrects. With a wider range of temperatures, heads of random labels would become
    overconfident.

    Folds are drawn by content with the same share of every class, so copies of an image are held
    out together; a class that cannot be held out stays in training.

    Returns:
        The strength (1, scikit-learn's default, if there are no folds); its mean held-out loss at
        temperature 1, in nats (with several labels the mean over labels); and a model to start
        from.
    """
    masks = solver.folds(FOLDS)
    if len(masks) < 2:
        return 1.0, math.nan, None
    best_strength, lowest, loss_of_best, best_models = 1.0, math.inf, math.nan, None
    worse, models = 0, None
    for strength in L2_STRENGTHS:
        models = solver.solve(masks, strength, models, CV_GRADIENT_NORM)
        losses = {
            factor: solver.held_out_loss(masks, models.scaled(factor))
            for factor in INVERSE_TEMPERATURES
        }
        loss = min(losses.values())
        if loss < lowest:
            best_strength, lowest, loss_of_best = strength, loss, losses[1.0]
            best_models, worse = models, 0
        else:
            worse += 1
        if worse == MAX_WORSE_STRENGTHS:
            break
    return best_strength, loss_of_best / solver.labels, best_models and best_models.mean()


# -------------------------------------------------------------------------------- the solver


@dataclass(frozen=True, slots=True)
class Models:
    """K linear models: weights along the principal axes, float64 (K, C, A), intercepts (K, C)."""

    weight: Tensor
    bias: Tensor

    def scaled(self, factor: float) -> Models:
        """Multiply all logits by a factor."""
        return Models(self.weight * factor, self.bias * factor)

    def mean(self) -> Models:
        """Return the mean of the models, as one model."""
        return Models(self.weight.mean(0, keepdim=True), self.bias.mean(0, keepdim=True))


class LogisticSolver:
    """The training rows of one head, and the optimum of many models on subsets of them.

    Every view of an image counts, and all views of an image together weigh as much as one image.
    Held-out losses are those of the first view.
    """

    def __init__(
        self,
        data: Data,
        trial: Trial,
        distributed: DistributedContext,
        principal_axes: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        import torch

        self.data, self.rows, self.distributed = data, trial.train, distributed
        self.device, self.classes = data.feature.device, len(data.classes)
        self.multilabel = data.multilabel
        self.columns = 1 if self.classes == 2 and not self.multilabel else self.classes
        self.labels = self.classes if self.multilabel else 1
        self._mean, self._std = mean_and_std(data.feature, self.rows)
        views = data.feature.shape[1]
        share = splits.rows_of(len(self.rows), distributed.rank, distributed.world_size)
        self._own = slice(share.start, share.stop)
        flat = self.rows[self._own, None] * views + np.arange(views)
        self._flat = torch.from_numpy(flat.reshape(-1))
        self._views, self.width = views, data.feature.shape[2]
        weights = class_weights(data, trial)
        self._image = torch.arange(len(share)).repeat_interleave(views).to(self.device)
        self._label = data.label[torch.from_numpy(self.rows[self._own]).to(data.label.device)]
        self._class_weights = None if weights is None else weights.double()
        if self._class_weights is not None and not self.multilabel:
            # As scikit-learn's class_weight: the weights of all rows sum to their number.
            counts = torch.bincount(data.label[self.rows], minlength=self.classes).double()
            total = (self._class_weights * counts).sum()
            self._class_weights = self._class_weights * counts.sum() / total
        self._cache: Tensor | None = None
        self.principal_axes = principal_axes or self._principal_axes()
        self._axes, self._variance = self.principal_axes

    # ------------------------------------------------------------------------------ rows

    def _standardized(self, flat: Tensor) -> Tensor:
        """Return standardized features, float64 (B, D)."""
        rows = self.data.feature.take(flat.to(self.device)).double()
        return rows.sub_(self._mean).div_(self._std)

    def first_views(self, position: NDArray[np.int64]) -> Tensor:
        """Return the standardized first views of some of this worker's images, float64 (B, D)."""
        import torch

        return self._standardized(self._flat[torch.from_numpy(position * self._views)])

    def _blocks(self, models: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield this worker's rows in blocks: their positions, and float64 (B, D)."""
        import torch

        count = len(self._flat)
        if self._cache is None and 0 < count * self.width <= MAX_CACHED_VALUES:
            parts = [self._standardized(part) for part in torch.split(self._flat, 4096)]
            self._cache = torch.cat(parts)
        size = max(1, BLOCK_VALUES // max(models * self.columns, self.width))
        for start in range(0, count, size):
            block = slice(start, min(start + size, count))
            if self._cache is not None:
                yield block, self._cache[block]
            else:
                yield block, self._standardized(self._flat[block])

    def _principal_axes(self) -> tuple[Tensor, Tensor]:
        """Compute axes (D, A) and variances (A,) of the standardized features.

        They are the same on every worker. They are computed from all rows, or from MAX_AXES_ROWS
        if there are more: other axes only make the solve slower. If there are fewer rows than
        features, only the axes with a variance are returned: along the others the weights at the
        optimum are 0 (the representer theorem).
        """
        import torch

        rows = self.rows
        max_rows = max(MAX_AXES_ROWS, 2 * self.width)
        if len(rows) > max_rows:
            rows = rows[np.sort(np.argsort(self.data.key[rows], kind="stable")[:max_rows])]
        flat = torch.from_numpy((rows[:, None] * self._views + np.arange(self._views)).reshape(-1))
        fewer_rows = len(flat) < self.width
        blocks = [self._standardized(part) for part in torch.split(flat, 4096)]
        if fewer_rows:
            x = torch.cat(blocks)
            value, vector = torch.linalg.eigh(x @ x.T / len(flat))
            varies = value > 1e-10 * value.max().clamp(min=1e-30)
            value, vector = value[varies], vector[:, varies]
            return x.T @ vector / (value * len(flat)).sqrt(), value
        zero = blocks[0].new_zeros(self.width, self.width)
        square = sum((block.T @ block for block in blocks), zero)
        value, vector = torch.linalg.eigh(square / len(flat))
        return vector, value.clamp(min=0)

    # ---------------------------------------------------------------------- images and models

    def all_images(self) -> Tensor:
        """Return the mask of one model trained on all images, bool (1, images of this worker)."""
        import torch

        return torch.ones(1, self._own.stop - self._own.start, dtype=torch.bool)

    def folds(self, count: int, repeat: int = 0) -> Tensor:
        """Return which images the model of each fold trains on, bool (K, images of this worker).

        repeat: Draws other folds, for repeated cross-validation.
        """
        import torch

        label, key = self.data.label.cpu().numpy()[self.rows], self.data.key[self.rows]
        if repeat:
            key = cross_validation.shuffle_keys(key, f"{repeat}")
        fold = cross_validation.assign_folds(key, label, count, self.data.classes)
        numbers = [one for one in range(count) if (fold == one).any()]
        masks = np.stack([fold != one for one in numbers]) if numbers else np.empty((0, len(fold)))
        return torch.from_numpy(masks[:, self._own])

    def _sum_over_workers(self, value: Tensor) -> Tensor:
        import torch.distributed as dist

        if self.distributed.world_size > 1:
            dist.all_reduce(value)
        return value

    def _row_weights(self, masks: Tensor) -> Tensor:
        """Return each row's weight in each model's sum of losses, float64 (K, N)."""
        weight = masks.double().to(self.device)
        if self._class_weights is not None and not self.multilabel:
            weight = weight * self._class_weights[self._label]
        return weight[:, self._image] / self._views

    # ------------------------------------------------------------------------------ losses

    def _losses(self, logit_BKC: Tensor, block: slice, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """Compute the loss (B, K) of each row and model, and a derivative at the logits (B, K, C).

        The derivative is the gradient, or else the diagonal of the Hessian.
        """
        import torch
        from torch.nn.functional import softplus

        label = self._label[self._image[block]]
        if self.columns > 1 and not self.multilabel:
            log_prob = logit_BKC.log_softmax(2)
            index = label[:, None, None].expand(-1, log_prob.shape[1], 1)
            loss, prob = -log_prob.gather(2, index)[:, :, 0], log_prob.exp()
            if not gradient:
                return loss, prob * (1 - prob)
            return loss, prob.scatter_add(2, index, torch.full_like(prob[:, :, :1], -1.0))
        present = (label if self.multilabel else label[:, None]).double()[:, None]
        weights = self._class_weights if self.multilabel else None
        weight = 1.0 if weights is None else 1 + present * (weights - 1)
        loss = (weight * (softplus(logit_BKC) - present * logit_BKC)).sum(2)
        prob = logit_BKC.sigmoid()
        return loss, weight * (prob * (1 - prob) if not gradient else prob - present)

    def _pass(
        self, models: Models, weight_KN: Tensor, *, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make one pass over the rows of all workers.

        Returns:
            The weighted sums of losses (K,); those of the derivatives of `_losses` (K, C), which
            are the intercepts' gradients; and, if `gradient`, the weights' gradients (K, C, A).
        """
        import torch

        count = len(models.weight)
        weight_KCD = models.weight @ self._axes.T
        flat_weight = weight_KCD.flatten(0, 1)
        losses = models.bias.new_zeros(count)
        sums = torch.zeros_like(models.bias)
        products = torch.zeros_like(weight_KCD)
        for block, x_BD in self._blocks(count):
            logit = (x_BD @ flat_weight.T).view(len(x_BD), count, -1) + models.bias
            loss_BK, derivative = self._losses(logit, block, gradient=gradient)
            weight_BK = weight_KN[:, block].T
            losses += (loss_BK * weight_BK).sum(0)
            derivative = derivative * weight_BK[..., None]
            sums += derivative.sum(0)
            if gradient:
                products += (derivative.flatten(1).T @ x_BD).view_as(products)
        parts = [losses, sums, products] if gradient else [losses, sums]
        flat = self._sum_over_workers(torch.cat([one.flatten() for one in parts]))
        pieces = torch.split(flat, [one.numel() for one in parts])
        totals = [piece.view_as(one) for piece, one in zip(pieces, parts, strict=True)]
        return totals[0], totals[1], totals[2] @ self._axes if gradient else products

    def mean_losses(self, models: Models) -> Tensor:
        """Compute each model's mean loss over all training rows, without the penalty.

        Returns:
            float64 (K,), nats, with several labels per image the mean over labels.
        """
        weight = self._row_weights(self.all_images()).expand(len(models.weight), -1)
        total = self._sum_over_workers(weight.sum(1))
        return self._pass(models, weight, gradient=False)[0] / total / self.labels

    def held_out_loss(self, masks: Tensor, models: Models) -> float:
        """Compute the mean loss of held-out images, in nats, summed over labels.

        Each image's loss is that of the model that was not trained on it, on its first view.
        Images that no fold holds out are left out.
        """
        weight = self._row_weights(~masks) * self._views
        weight = weight * (self._flat % self._views == 0).to(self.device)
        total, *_ = self._pass(models, weight, gradient=False)
        return float(total.sum() / self._sum_over_workers(weight.sum().clone()[None])[0])

    def logits(self, models: Models) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits of this worker's images, in blocks.

        Yields:
            The positions of images among those of this worker, and the logits of their first view,
            float64 (K, B, C); with two classes those of the two differ by the model's single logit.
        """
        import torch

        flat_weight = (models.weight @ self._axes.T).flatten(0, 1)
        size = max(1, BLOCK_VALUES // max(len(flat_weight), self.width))
        first_views = self._flat[:: self._views]
        for start in range(0, len(first_views), size):
            block = slice(start, min(start + size, len(first_views)))
            x_BD = self._standardized(first_views[block])
            logit = (x_BD @ flat_weight.T).view(len(x_BD), len(models.weight), -1) + models.bias
            if self.columns == 1:
                logit = torch.cat([-logit / 2, logit / 2], 2)
            yield block, logit.transpose(0, 1)

    # --------------------------------------------------------------------------- the optimum

    def solve(
        self, masks: Tensor, strength: float, start: Models | None, max_gradient_norm: float
    ) -> Models:
        """Find the optimum of every model.

        Args:
            masks: The images that each model trains on, bool (K, images of this worker).
            strength: The strength of the L2 penalty.
            start: The models to start from; None: weights of 0.
            max_gradient_norm: The norm of the gradient at which a model is done.
        """
        import torch

        start = start or self._prior_models(masks)
        size = max(1, MAX_SOLVE_WEIGHTS // max(1, self.columns * len(self._variance)))
        parts = [
            self._solve(
                masks[first : first + size],
                strength,
                Models(start.weight[first : first + size], start.bias[first : first + size]),
                max_gradient_norm,
            )
            for first in range(0, len(masks), size)
        ]
        return Models(
            torch.cat([one.weight for one in parts]), torch.cat([one.bias for one in parts])
        )

    def _prior_models(self, masks: Tensor) -> Models:
        """Return models with weights of 0 that predict each class (or label) by its frequency."""
        import torch

        weight = self._row_weights(masks)[:, :: self._views] * self._views
        if self.multilabel:
            present = self._label.double()
            positive = 1.0 if self._class_weights is None else self._class_weights
            ones, total = (weight @ present) * positive, weight.sum(1, keepdim=True)
            sums = torch.cat([ones, total - weight @ present], 1)
        else:
            sums = weight @ torch.nn.functional.one_hot(self._label, self.classes).double()
        log = (self._sum_over_workers(sums) + 0.5).log()
        if self.multilabel:
            bias = log[:, : self.classes] - log[:, self.classes :]
        else:
            bias = log[:, 1:] - log[:, :1] if self.columns == 1 else log - log.mean(1, keepdim=True)
        return Models(bias.new_zeros(len(masks), self.columns, len(self._variance)), bias)

    def _solve(
        self, masks: Tensor, strength: float, start: Models, max_gradient_norm: float
    ) -> Models:
        import torch

        weight_KN = self._row_weights(masks)
        total = self._sum_over_workers(weight_KN.sum(1))
        penalty = strength / total
        # The Hessian is about the variance of the probabilities times that of the features.
        _, sums, _ = self._pass(start, weight_KN, gradient=False)
        curvature = (sums / total[:, None]).clamp(min=1e-4)
        scale = (curvature[..., None] * self._variance + penalty[:, None, None]).rsqrt()
        bias_scale = curvature.rsqrt()

        def to_models(point: Tensor, which: Tensor) -> Models:
            values = point.view(len(which), self.columns, -1)
            return Models(values[..., :-1] * scale[which], values[..., -1] * bias_scale[which])

        def evaluate_objective(point: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            models, n = to_models(point, which), total[which]
            losses, sums, products = self._pass(models, weight_KN[which], gradient=True)
            square = models.weight.square().sum((1, 2))
            grad = products / n[:, None, None] + penalty[which, None, None] * models.weight
            bias_grad = sums / n[:, None] * bias_scale[which]
            flat = torch.cat([grad * scale[which], bias_grad[..., None]], 2).flatten(1)
            return losses / n + penalty[which] / 2 * square, flat

        first = torch.cat([start.weight / scale, (start.bias / bias_scale)[..., None]], 2)
        point = lbfgs.minimize(evaluate_objective, first.flatten(1), max_gradient_norm)
        return to_models(point, torch.arange(len(masks), device=self.device))

    def head_state(self, models: Models) -> dict[str, np.ndarray]:
        """Return the first model as a linear head's state, float32 (see `heads.build_head`)."""
        weight, bias = models.weight[0] @ self._axes.T, models.bias[0]
        if self.columns == 1:  # split the single logit into two that differ by it
            weight = weight * weight.new_tensor([[-0.5], [0.5]])
            bias = bias * bias.new_tensor([-0.5, 0.5])
        state = {"0.mean": self._mean, "0.deviation": self._std}
        state |= {"2.weight": weight, "2.bias": bias}
        return {name: value.float().cpu().numpy() for name, value in state.items()}
