"""Metrics of workers, sent to Prometheus through Ray."""

from __future__ import annotations

from typing import Any

METRICS = {
    "images_decoded": ("counter", "Images decoded.", ()),
    "images_repaired": ("counter", "Images that the GPU's decoder got wrong.", ()),
    "features_written": ("counter", "Images whose features were written to a shard.", ()),
    "scores_written": ("counter", "Images whose scores were written to a part.", ()),
    "faults": ("counter", "Images that could not be read, by kind of fault.", ("kind",)),
    "stage_seconds": ("counter", "Seconds that a stage was busy.", ("stage",)),
    "epoch": ("gauge", "The epoch that ended last.", ("part",)),
    "loss": ("gauge", "Loss of that epoch, the lowest of all heads.", ("part", "split")),
    "accuracy": ("gauge", "Accuracy of that epoch, the highest of all heads.", ("part",)),
}
"""Name -> kind, description and labels. In Prometheus a metric is called `ray_arrowhead_<name>`, a
counter `ray_arrowhead_<name>_total`; the labels `run`, `verb` and Ray's own (NodeAddress …) are
added."""


class Meters:
    """The metrics of one process in a cluster."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._metrics: dict[str, Any] = {}

    def __call__(self, name: str, value: float, **labels: str) -> None:
        """Add `value` to a counter, or set a gauge to it."""
        from ray.util import metrics

        kind, description, keys = METRICS[name]
        if name not in self._metrics:
            metric_class = metrics.Counter if kind == "counter" else metrics.Gauge
            metric = metric_class(f"arrowhead_{name}", description, (*keys, *self._labels))
            self._metrics[name] = metric.set_default_tags(self._labels)
        if kind == "gauge":
            self._metrics[name].set(value, labels)
        elif value:  # Ray rejects an increment of zero
            self._metrics[name].inc(value, labels)
