"""A micro-batch's forward and backward pass, recorded in a CUDA graph and replayed: a step then
waits for no launch."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GRAPHS = 64
"""Most recordings of a run; what comes later runs without."""

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
Compute = Callable[[], Sequence[Tensor]]


class Recorder(ABC):
    """Runs computations, and records them to be repeated."""

    def run(self, compute: Compute) -> Sequence[Tensor]:
        """Return the results of a computation that is not recorded."""
        return compute()

    @abstractmethod
    def record(self, compute: Compute) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Record a computation; returns a function that repeats it, and the tensors that then hold
        its results."""


class StaticGradients:
    """Gives each trained parameter one buffer for its gradient, the same in all steps: a replayed
    graph adds to the memory that it was recorded with."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._buffers: dict[nn.Parameter, Tensor] = {}

    def restore(self) -> None:
        """Put zeros in place of gradients that an optimizer's `zero_grad` took away."""
        cleared = [p for p in self._parameters if p.requires_grad and p.grad is None]
        kept = [self._buffers[p] for p in cleared if p in self._buffers]
        if kept:
            torch._foreach_zero_(kept)
        for parameter in cleared:
            if parameter not in self._buffers:
                self._buffers[parameter] = torch.zeros_like(parameter)
            parameter.grad = self._buffers[parameter]


class CudaRecorder(Recorder):
    """Records in CUDA graphs that share their memory, since they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, compute: Compute) -> Sequence[Tensor]:
        """Return the results of a computation, run on the stream of the recordings."""
        # On the stream of the recordings: autograd goes on with the one that it met a parameter on.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = compute()
        current.wait_stream(self._stream)
        return found

    def record(self, compute: Compute) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Record a computation in a CUDA graph; returns its replay, and the tensors that hold its
        results.

        Raises:
            RuntimeError: the computation waits for the device, or does what else a graph cannot
                record.
        """
        index = self._device.index
        number = torch.cuda.current_device() if index is None else index
        generator = torch.cuda.default_generators[number]
        before = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        # Other threads, a data loader's, may go on using the GPU.
        options = {"stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with (
                # A recording that fails leaves its stream as the current one.
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, **options),
            ):
                found = compute()
        except RuntimeError:
            # It would stay as within a recording.
            generator.graphsafe_set_state(before)
            raise
        return graph.replay, found


class CapturedPass:
    """`run(inputs)`, which computes from tensors alone and adds to gradients, replayed from a
    recording for inputs of shapes seen before.

    The first inputs of some shapes run as they are, which compiles kernels; the second are
    recorded. `prepare`: called before each pass, outside the recording, it brings up to date what
    the pass reads beside its inputs, in the same memory as ever, and returns where that is: what
    was recorded with other places is not replayed. `run` must not make the host wait for the
    device. Where recording fails, a line says why and all passes run as they are.
    """

    def __init__(self, run: Run, prepare: Callable[[], Any], recorder: Recorder) -> None:
        self._run, self._prepare, self._recorder = run, prepare, recorder
        self._seen: set[Any] = set()
        self._graphs: dict[Any, tuple[dict[str, Tensor], Callable[[], None], Sequence[Tensor]]] = {}
        self._places: Any = None
        self.failed: str | None = None

    def __call__(self, inputs: Mapping[str, Tensor], key: Any = None) -> list[Tensor]:
        """Return the results of `run`. key: what else, beside the shapes, a recording depends
        on."""
        places = self._prepare()
        if places != self._places:
            self._graphs.clear()
            self._places = places
        shapes = key, tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        if shapes not in self._graphs and self._records(shapes):
            self._add(shapes, inputs)
        if shapes not in self._graphs:
            self._seen.add(shapes)
            return list(self._recorder.run(lambda: self._run(inputs)))
        own, replay, results = self._graphs[shapes]
        torch._foreach_copy_(list(own.values()), [inputs[name] for name in own])
        replay()
        # The next replay writes to the same memory.
        return [result.clone() for result in results]

    def _records(self, shapes: Any) -> bool:
        return self.failed is None and shapes in self._seen and len(self._graphs) < GRAPHS

    def _add(self, shapes: Any, inputs: Mapping[str, Tensor]) -> None:
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        try:
            replay, results = self._recorder.record(lambda: self._run(own))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failed = str(error).strip().splitlines()[0]
            sys.stderr.write(
                f"trainer.compile=graph: runs as layer, because a pass cannot be recorded: "
                f"{self.failed}\n"
            )
            return
        self._graphs[shapes] = own, replay, results
