"""What workers measure, given to Ray for Prometheus."""

from __future__ import annotations

from typing import Any

MEASURES = {
    "images_decoded": ("counter", "Images decoded.", ()),
    "features_written": ("counter", "Images whose features were written to a shard.", ()),
    "scores_written": ("counter", "Images whose scores were written to a part.", ()),
    "faults": ("counter", "Images that could not be read, by kind of fault.", ("kind",)),
    "stage_seconds": ("counter", "Seconds that a stage was busy.", ("stage",)),
    "epoch": ("gauge", "The epoch that ended last.", ("part",)),
    "loss": ("gauge", "Loss of that epoch, the lowest of all heads.", ("part", "split")),
    "accuracy": ("gauge", "Accuracy of that epoch, the highest of all heads.", ("part",)),
}
"""What workers measure: kind, meaning and labels by name. In Prometheus `ray_arrowhead_<name>`, a
counter with `_total` behind it; labels `run`, `verb` and Ray's own (NodeAddress …) are added."""


class Meters:
    """Measures of one process of a cluster."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._made: dict[str, Any] = {}

    def __call__(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter, or set a gauge."""
        from ray.util import metrics

        kind, what, keys = MEASURES[name]
        if name not in self._made:
            make = metrics.Counter if kind == "counter" else metrics.Gauge
            made = make(f"arrowhead_{name}", what, (*keys, *self._labels))
            self._made[name] = made.set_default_tags(self._labels)
        if kind == "gauge":
            self._made[name].set(value, labels)
        elif value:  # Ray refuses to add nothing
            self._made[name].inc(value, labels)
