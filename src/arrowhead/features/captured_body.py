"""A body whose kernels are launched together: a CUDA graph for each shape of batch.

    first batches of a shape     run as they are
      -> capture                 the kernels are recorded once, and the result is compared
      -> later batches           copied into the graph's input, replayed, copied out

Launching hundreds of kernels one by one keeps a CPU thread busy and, with small networks, the GPU
waiting. A graph that does not give the same bits as the body itself is not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Network = Callable[[torch.Tensor], torch.Tensor]
    Capture = Callable[[Network, torch.Tensor], Network]

RUNS_BEFORE_CAPTURE = 2  # libraries choose their algorithms in the first
MAX_GRAPHS = 4  # each keeps the memory of a batch


class CapturedBody:
    """Calls `body`, by a graph where a shape comes again and again.

    Args:
        body: uint8 (B, 3, S, S) -> float32 (B, D), on one device.
        capture: Records what `body` does with a batch; the default needs CUDA.
    """

    def __init__(self, body: Network, capture: Capture | None = None) -> None:
        self._body, self._capture = body, capture or capture_cuda_graph
        self._runs: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, Network | None] = {}

    @property
    def graphs(self) -> int:
        """How many shapes are replayed from a graph."""
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """The features of a batch."""
        shape = pixels_BCHW.shape
        if graph := self._graphs.get(shape):
            return graph(pixels_BCHW)
        result = self._body(pixels_BCHW)
        self._runs[shape] += 1
        is_due = self._runs[shape] > RUNS_BEFORE_CAPTURE and shape not in self._graphs
        if is_due and len(self._graphs) < MAX_GRAPHS:
            self._graphs[shape] = self._make_graph(pixels_BCHW, result)
        return result

    def _make_graph(self, pixels: torch.Tensor, expected: torch.Tensor) -> Network | None:
        """A graph for this shape; None if it cannot be recorded or gives other bits."""
        import torch

        try:
            graph = self._capture(self._body, pixels)
            again = graph(pixels.flip(0)).flip(0)  # not what it was recorded with
            same = torch.equal(graph(pixels), expected)
        except RuntimeError:  # such as a network that reads a value on the host
            return None
        return graph if same and torch.allclose(again, expected, atol=1e-2, rtol=1e-2) else None


def capture_cuda_graph(body: Network, pixels: torch.Tensor) -> Network:
    """Record what `body` does with a batch of this shape as a CUDA graph."""
    import torch

    fixed_input = pixels.clone()
    side_stream = torch.cuda.Stream(pixels.device)  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream(pixels.device))
    with torch.cuda.stream(side_stream):
        body(fixed_input)
    torch.cuda.current_stream(pixels.device).wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads use the GPU meanwhile: they copy pixels of the next batch.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        fixed_output = body(fixed_input)

    def replay(pixels: torch.Tensor) -> torch.Tensor:
        fixed_input.copy_(pixels)
        graph.replay()
        return fixed_output.clone()  # the next replay overwrites it

    return replay
