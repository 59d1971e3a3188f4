"""The linear head found exactly: logistic regression on standardized features.

    features, labels        -> standardized rows, in blocks, each worker its share
    strengths of L2, folds  -> held-out log loss of each strength     (`choose`)
    the chosen strength     -> the minimum on all training rows       (`solve`)

One label per image: softmax regression (two classes: one logit, as scikit-learn has it). Several:
one binary regression per label, all with the same strength. The objective is scikit-learn's:
the sum of losses plus l2/2 times the squared weights, so l2 is 1/C; the intercept is free.

It is minimized by L-BFGS (Nocedal & Wright 2006, algorithm 7.4) on full batches in float64, in
coordinates where the Hessian at the start of the path is about the identity: the principal axes of
the features. The folds are *lanes* of one batched solve, and each strength starts from the minimum
of the one before, from the strongest on. Sums over rows are summed over workers, and everything
decided is decided from those sums: 1 and N workers find the same head to about 1e-6.

Letters: K lanes, C columns of logits (1 for two classes), D features, A principal axes, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from arrowhead.data import splits
from arrowhead.training import cross_validation, lbfgs
from arrowhead.training.batches import DistributedContext
from arrowhead.training.dataset import Data, Trial, class_weights, mean_and_std
from arrowhead.training.trainer import Trained, evaluate

if TYPE_CHECKING:
    from torch import Tensor


STRENGTHS = tuple(float(f"{10 ** (half / 2):.6g}") for half in range(9, -3, -1))
"""What --l2 auto tries, strongest first: 31,623 to 0.1 (C from 0.00003 to 10)."""
FOLDS = 5
RISES = 3  # the path ends when this many strengths in a row were worse than the best
SHARPER = tuple(2 ** (half / 2) for half in range(-2, 3))
"""1 / temperature: what logits are multiplied with when strengths are compared."""
LOOSE, TIGHT = 1e-3, 1e-6  # gradient norms, where the Hessian is about 1: losses to 1e-5, 1e-12
MOST_WORK = 1 << 35  # images x features x classes that --head auto still takes to be quick
CHOICE_WORK = (
    1 << 28
)  # the strength is chosen on as many images as come to this, 20 per class or more
HELD_NUMBERS = 1 << 26  # standardized rows are kept up to 512 MiB, else made again for each pass
BLOCK_NUMBERS = 1 << 21  # numbers of a block of rows or of its logits
LANE_NUMBERS = 1 << 22  # weights of all lanes of one solve; L-BFGS holds 20 times as many
AXES_ROWS = 8192  # rows the principal axes are taken from: they only steer


def train(
    data: Data,
    trials: Sequence[Trial],
    distributed: DistributedContext = DistributedContext(),
    record: Callable[[dict[int, dict[str, float]]], None] = lambda lines: None,
) -> list[Trained]:
    """The head of each trial, found exactly; all workers must call it together.

    `trial.config.l2` is its strength; "auto" chooses it by cross-validation within
    `trial.train`. Each `Trained` has one line of figures, epoch 0, as a trained head's last, with
    `l2` and, where it was chosen, `cv_loss`. Losses are nats per image; of several labels the mean
    over labels, as validation's.
    """
    made = []
    for number, trial in enumerate(trials):
        one = _train(data, trial, distributed)
        record({number: one.epochs[0]})
        made.append(one)
    return made


def _train(data: Data, trial: Trial, distributed: DistributedContext) -> Trained:
    problem = Problem(data, trial, distributed)
    chosen: dict[str, float] = {}
    start = None
    strength = trial.config.l2
    if strength == "auto":
        some = _some(data, trial)
        strength, loss, start = choose(
            problem if some is trial else Problem(data, some, distributed, problem.axes)
        )
        chosen = {"cv_loss": loss}
    found = problem.solve(problem.everything(), strength, start, TIGHT)
    state = problem.state(found)
    losses = float(problem.losses(found)[0])
    figures = evaluate(data, trial, state, distributed)
    line = {"epoch": 0, "train_loss": losses} | figures | {"l2": strength} | chosen
    return Trained(state=state, epochs=[line], epoch=0, l2=strength)


def _some(data: Data, trial: Trial) -> Trial:
    """The trial on few enough of its images for cross-validation, drawn by content, alike for
    every class.
    """
    views, width = data.feature.shape[1:]
    classes, rows = len(data.classes), trial.train
    most = max(20 * classes, CHOICE_WORK // (views * width * classes), AXES_ROWS)
    if len(rows) <= most:
        return trial
    label = data.label.cpu().numpy()[rows]
    parts = math.ceil(len(rows) / most)
    part = cross_validation.folds(data.key[rows], label, parts, data.classes)
    return replace(trial, train=rows[part <= 0])  # -1: classes too rare to be divided


# ------------------------------------------------------------------------------ the strength


def choose(problem: Problem) -> tuple[float, float, Lanes | None]:
    """The strength with the lowest log loss on rows held out, each strength at its best
    temperature of 1/2 to 2; its mean loss there without a temperature, nats (of several labels the
    mean over labels); and weights to start from.

    At temperature 1 the log loss prefers strengths that are too strong for accuracy: a weak penalty
    makes probabilities too sure, which a temperature mends afterwards (`calibration`), but a strong
    one predicts the common class too often, which nothing mends. A wider range of temperatures
    would make heads of meaningless labels too sure.

    Folds are drawn by content, alike for every class, so copies of an image are held out together
    (`folds`); a class that cannot be held out stays in training. Without any fold the
    strength is 1, scikit-learn's default.
    """
    masks = problem.folds(FOLDS)
    if len(masks) < 2:
        return 1.0, math.nan, None
    best, lowest, plain, kept = 1.0, math.inf, math.nan, None
    worse, found = 0, None
    for strength in STRENGTHS:
        found = problem.solve(masks, strength, found, LOOSE)
        losses = {by: problem.held_out(masks, found.times(by)) for by in SHARPER}
        loss = min(losses.values())
        if loss < lowest:
            best, lowest, plain, kept, worse = strength, loss, losses[1.0], found, 0
        else:
            worse += 1
        if worse == RISES:
            break
    return best, plain / problem.labels, kept and kept.mean()


# ------------------------------------------------------------------------------- the problem


@dataclass(frozen=True, slots=True)
class Lanes:
    """Weights along the principal axes, float64 (K, C, A), and intercepts (K, C)."""

    weight: Tensor
    bias: Tensor

    def times(self, by: float) -> Lanes:
        """All logits that many times as large."""
        return Lanes(self.weight * by, self.bias * by)

    def mean(self) -> Lanes:
        """The mean of the lanes, as one."""
        return Lanes(self.weight.mean(0, keepdim=True), self.bias.mean(0, keepdim=True))


class Problem:
    """The rows of one head, and its loss for many weights at once.

    Every view of an image counts, all its views together as one image. Held-out losses are those
    of the clean view.
    """

    def __init__(
        self,
        data: Data,
        trial: Trial,
        distributed: DistributedContext,
        axes: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        import torch

        self.data, self.rows, self.distributed = data, trial.train, distributed
        self.device, self.classes = data.feature.device, len(data.classes)
        self.multi = data.multi
        self.columns = 1 if self.classes == 2 and not self.multi else self.classes
        self.labels = self.classes if self.multi else 1
        mean, deviation = mean_and_std(data.feature, self.rows)
        self._mean, self._deviation = mean, deviation
        views = data.feature.shape[1]
        mine = splits.share(len(self.rows), distributed.rank, distributed.world)
        self._mine = slice(mine.start, mine.stop)
        flat = self.rows[self._mine, None] * views + np.arange(views)
        self._flat = torch.from_numpy(flat.reshape(-1))
        self._views, self.width = views, data.feature.shape[2]
        weights = class_weights(data, trial)
        self._image = torch.arange(len(mine)).repeat_interleave(views).to(self.device)
        self._label = data.label[torch.from_numpy(self.rows[self._mine]).to(data.label.device)]
        self._gain = None if weights is None else weights.double()
        if self._gain is not None and not self.multi:
            # As scikit-learn's class_weight: the weights of all rows sum to their number.
            counts = torch.bincount(data.label[self.rows], minlength=self.classes).double()
            self._gain = self._gain * counts.sum() / (self._gain * counts).sum()
        self._cache: Tensor | None = None
        self.axes = axes or self._principal()
        self._axes, self._variance = self.axes

    # ------------------------------------------------------------------------------ rows

    def _standardized(self, flat: Tensor) -> Tensor:
        """float64 (B, D)."""
        rows = self.data.feature.take(flat.to(self.device)).double()
        return rows.sub_(self._mean).div_(self._deviation)

    def _blocks(self, lanes: int) -> Iterator[tuple[slice, Tensor]]:
        """This worker's rows, some at a time: where they are among them, float64 (B, D)."""
        import torch

        count = len(self._flat)
        if self._cache is None and 0 < count * self.width <= HELD_NUMBERS:
            parts = [self._standardized(part) for part in torch.split(self._flat, 4096)]
            self._cache = torch.cat(parts)
        step = max(1, BLOCK_NUMBERS // max(lanes * self.columns, self.width))
        for start in range(0, count, step):
            here = slice(start, min(start + step, count))
            if self._cache is not None:
                yield here, self._cache[here]
            else:
                yield here, self._standardized(self._flat[here])

    def _principal(self) -> tuple[Tensor, Tensor]:
        """Axes (D, A) and variances (A,) of the standardized features, the same on every worker.

        Taken from all rows, or from AXES_ROWS of them where there are more: other axes only slow
        the solve. Of fewer rows than features only the axes that vary: weights along others are 0
        at the minimum (the representer theorem).
        """
        import torch

        rows = self.rows
        most = max(AXES_ROWS, 2 * self.width)
        if len(rows) > most:
            rows = rows[np.sort(np.argsort(self.data.key[rows], kind="stable")[:most])]
        flat = torch.from_numpy((rows[:, None] * self._views + np.arange(self._views)).reshape(-1))
        few = len(flat) < self.width
        wide = [self._standardized(part) for part in torch.split(flat, 4096)]
        if few:
            x = torch.cat(wide)
            value, vector = torch.linalg.eigh(x @ x.T / len(flat))
            real = value > 1e-10 * value.max().clamp(min=1e-30)
            value, vector = value[real], vector[:, real]
            return x.T @ vector / (value * len(flat)).sqrt(), value
        square = sum((part.T @ part for part in wide), wide[0].new_zeros(self.width, self.width))
        value, vector = torch.linalg.eigh(square / len(flat))
        return vector, value.clamp(min=0)

    # ----------------------------------------------------------------------------- lanes

    def everything(self) -> Tensor:
        """The lane that all rows take part in: bool (1, images of this worker)."""
        import torch

        return torch.ones(1, self._mine.stop - self._mine.start, dtype=torch.bool)

    def folds(self, count: int) -> Tensor:
        """Which images each lane learns from, bool (K, images of this worker)."""
        import torch

        label = self.data.label.cpu().numpy()[self.rows]
        part = cross_validation.folds(self.data.key[self.rows], label, count, self.data.classes)
        numbers = [one for one in range(count) if (part == one).any()]
        lanes = np.stack([part != one for one in numbers]) if numbers else np.empty((0, len(part)))
        return torch.from_numpy(lanes[:, self._mine])

    def _sum(self, mine: Tensor) -> Tensor:
        import torch.distributed as dist

        if self.distributed.world > 1:
            dist.all_reduce(mine)
        return mine

    def _shares(self, lanes: Tensor) -> Tensor:
        """What each row weighs in each lane's sum of losses, float64 (K, rows)."""
        weight = lanes.double().to(self.device)
        if self._gain is not None and not self.multi:
            weight = weight * self._gain[self._label]
        return weight[:, self._image] / self._views

    # ------------------------------------------------------------------------------ losses

    def _nats(self, logit_BKC: Tensor, here: slice, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """Of each row and lane the loss (B, K), and its slope at the logits (B, K, C), or the
        curvature there (the diagonal) where `slope` is False.
        """
        import torch
        from torch.nn.functional import softplus

        label = self._label[self._image[here]]
        if self.columns > 1 and not self.multi:
            log = logit_BKC.log_softmax(2)
            index = label[:, None, None].expand(-1, log.shape[1], 1)
            nats, prob = -log.gather(2, index)[:, :, 0], log.exp()
            if not gradient:
                return nats, prob * (1 - prob)
            return nats, prob.scatter_add(2, index, torch.full_like(prob[:, :, :1], -1.0))
        present = (label if self.multi else label[:, None]).double()[:, None]
        gain = 1.0 if self._gain is None or not self.multi else 1 + present * (self._gain - 1)
        nats = (gain * (softplus(logit_BKC) - present * logit_BKC)).sum(2)
        prob = logit_BKC.sigmoid()
        return nats, gain * (prob * (1 - prob) if not gradient else prob - present)

    def _pass(
        self, lanes: Lanes, share_KN: Tensor, *, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over all rows: losses (K,), what `_nats` gives summed over rows (K, C), and
        for a slope the products with the rows along the axes (K, C, A).
        """
        import torch

        count = len(lanes.weight)
        weight_KCD = lanes.weight @ self._axes.T
        flat_weight = weight_KCD.flatten(0, 1)
        nats = lanes.bias.new_zeros(count)
        sums = torch.zeros_like(lanes.bias)
        product = torch.zeros_like(weight_KCD)
        for here, x_BD in self._blocks(count):
            logit = (x_BD @ flat_weight.T).view(len(x_BD), count, -1) + lanes.bias
            loss_BK, second = self._nats(logit, here, gradient=gradient)
            weight_BK = share_KN[:, here].T
            nats += (loss_BK * weight_BK).sum(0)
            second = second * weight_BK[..., None]
            sums += second.sum(0)
            if gradient:
                product += (second.flatten(1).T @ x_BD).view_as(product)
        shapes = [nats, sums, product] if gradient else [nats, sums]
        flat = self._sum(torch.cat([one.flatten() for one in shapes]))
        parts = torch.split(flat, [one.numel() for one in shapes])
        whole = [part.view_as(one) for part, one in zip(parts, shapes, strict=True)]
        return whole[0], whole[1], whole[2] @ self._axes if gradient else product

    def losses(self, lanes: Lanes) -> Tensor:
        """Mean loss over the training rows (and labels, of several), without the penalty, nats,
        float64 (K,).
        """
        share = self._shares(self.everything()).expand(len(lanes.weight), -1)
        return self._pass(lanes, share, gradient=False)[0] / self._sum(share.sum(1)) / self.labels

    def held_out(self, masks: Tensor, lanes: Lanes) -> float:
        """Mean loss, nats, of every image under the lane that has not seen it, on its clean view,
        summed over its labels; images that no lane held out are left out.
        """
        share = self._shares(~masks) * self._views
        share = share * (self._flat % self._views == 0).to(self.device)
        total, *_ = self._pass(lanes, share, gradient=False)
        return float(total.sum() / self._sum(share.sum().clone()[None])[0])

    # --------------------------------------------------------------------------- the minimum

    def solve(self, masks: Tensor, strength: float, start: Lanes | None, to: float) -> Lanes:
        """The minimum of every lane, from `start` on; lanes that do not fit in memory together one
        after another. to: the norm of the gradient at which a lane is done.
        """
        import torch

        start = start or self._prior(masks)
        each = max(1, LANE_NUMBERS // (self.columns * len(self._variance)))
        parts = [
            self._solve(
                masks[at : at + each],
                strength,
                Lanes(start.weight[at : at + each], start.bias[at : at + each]),
                to,
            )
            for at in range(0, len(masks), each)
        ]
        return Lanes(
            torch.cat([one.weight for one in parts]), torch.cat([one.bias for one in parts])
        )

    def _prior(self, masks: Tensor) -> Lanes:
        """Weights 0, intercepts as often as each class (or label) comes."""
        import torch

        share = self._shares(masks)[:, :: self._views] * self._views
        if self.multi:
            present = self._label.double()
            gain = 1.0 if self._gain is None else self._gain
            ones, total = (share @ present) * gain, share.sum(1, keepdim=True)
            sums = torch.cat([ones, total - share @ present], 1)
        else:
            sums = share @ torch.nn.functional.one_hot(self._label, self.classes).double()
        log = (self._sum(sums) + 0.5).log()
        if self.multi:
            bias = log[:, : self.classes] - log[:, self.classes :]
        else:
            bias = log[:, 1:] - log[:, :1] if self.columns == 1 else log - log.mean(1, keepdim=True)
        return Lanes(bias.new_zeros(len(masks), self.columns, len(self._variance)), bias)

    def _solve(self, masks: Tensor, strength: float, start: Lanes, to: float) -> Lanes:
        import torch

        share = self._shares(masks)
        total = self._sum(share.sum(1))
        penalty = strength / total
        # About the Hessian: how much the probabilities can still move, times the variances.
        _, sums, _ = self._pass(start, share, gradient=False)
        curve = (sums / total[:, None]).clamp(min=1e-4)
        scale = (curve[..., None] * self._variance + penalty[:, None, None]).rsqrt()
        bias_scale = curve.rsqrt()

        def lanes_of(point: Tensor, which: Tensor) -> Lanes:
            wide = point.view(len(which), self.columns, -1)
            return Lanes(wide[..., :-1] * scale[which], wide[..., -1] * bias_scale[which])

        def measure(point: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            lanes, n = lanes_of(point, which), total[which]
            nats, sums, product = self._pass(lanes, share[which], gradient=True)
            square = lanes.weight.square().sum((1, 2))
            gradient = product / n[:, None, None] + penalty[which, None, None] * lanes.weight
            gradient_bias = sums / n[:, None] * bias_scale[which]
            flat = torch.cat([gradient * scale[which], gradient_bias[..., None]], 2).flatten(1)
            return nats / n + penalty[which] / 2 * square, flat

        first = torch.cat([start.weight / scale, (start.bias / bias_scale)[..., None]], 2)
        every = torch.arange(len(masks), device=self.device)
        return lanes_of(lbfgs.minimize(measure, first.flatten(1), to), every)

    def state(self, lanes: Lanes) -> dict[str, np.ndarray]:
        """The first lane as the state of a linear head (see `heads.make`), numpy float32."""
        weight, bias = lanes.weight[0] @ self._axes.T, lanes.bias[0]
        if self.columns == 1:  # the difference of two logits, shared between them
            weight = weight * weight.new_tensor([[-0.5], [0.5]])
            bias = bias * bias.new_tensor([-0.5, 0.5])
        made = {"0.mean": self._mean, "0.deviation": self._deviation}
        made |= {"2.weight": weight, "2.bias": bias}
        return {name: value.float().cpu().numpy() for name, value in made.items()}
