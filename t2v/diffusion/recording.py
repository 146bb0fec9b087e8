"""cuda_graph=true: the network's call is recorded once as a CUDA graph and replayed at every further sampling step.

A sampler calls one network some fifty times with equal shapes, and launching its two thousand kernels one by one takes the CPU longer than
a GPU needs for a small batch. Weights may change in place between calls, as an average's do in training: a graph holds addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from t2v.diffusion.objective import Denoiser

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""A call on fixed inputs -> the same call, replayed: its result is overwritten by the next one."""


class Recordings:
    """The recorded calls of one network, the most recently used `capacity` of them, by shapes, types and addresses.

    The first `plain_calls` of each kind run as they are: there, kernels are compiled and chosen. `record` is for tests.
    """

    def __init__(self, capacity: int = 2, plain_calls: int = 2, record: Record | None = None) -> None:
        self.capacity, self.plain_calls = capacity, plain_calls
        self._record = record or CUDAGraphs()
        self._replays: OrderedDict[tuple[Any, ...], Recording | int] = OrderedDict()  # or how often it was called so far

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self._replays.clear()

    def of(self, network: nn.Module) -> Denoiser:
        """`network` with its calls replayed, for one sampling under no_grad or inference_mode; itself where `recordable` says no."""
        if not recordable(network):
            return network
        weights = tuple(tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers()))

        def denoise(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
            inputs = (z, t, text)
            key = (id(network), hash(weights), network.training, autocast_state(z.device), *((*x.shape, x.dtype, x.device) for x in inputs))
            known = self._replays.pop(key, 0)
            if isinstance(known, int) and known >= self.plain_calls:
                known = Recording(network, inputs, self._record)
            result = network(*inputs) if isinstance(known, int) else known(*inputs)
            self._replays[key] = known + 1 if isinstance(known, int) else known
            while len(self._replays) > self.capacity:
                self._replays.popitem(last=False)
            return result

        return denoise


class Recording:
    """One call: inputs are copied to where the graph reads them, and the result from where the next replay would write."""

    def __init__(self, network: nn.Module, inputs: tuple[Tensor, ...], record: Record) -> None:
        with torch.inference_mode(False):  # plain tensors, so that they can be written in any mode
            self.inputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        self._write(inputs)
        try:
            self.replay = record(lambda: network(*self.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the network's call on {tuple(inputs[0].shape)} cannot be recorded as a CUDA graph: use cuda_graph=false"
            ) from error

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._write(inputs)
        return self.replay().clone()

    def _write(self, inputs: tuple[Tensor, ...]) -> None:
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine.copy_(x)


class CUDAGraphs:
    """Records on the GPU. All graphs share one pool of memory, because no two run at once and results are copied out."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with uncached_autocast(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # loaders use CUDA, too
            result = call()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def uncached_autocast() -> torch.autocast:
    """Autocast as it is now, but with the casts of weights inside the graph: cached ones would be freed, and old."""
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def recordable(network: nn.Module) -> bool:
    """Whole on one GPU, in evaluation mode, and no gradient is asked for. Sharded parameters are gathered by calls that no graph holds."""
    parameters = list(network.parameters())
    devices = {parameter.device for parameter in parameters}
    sharded = any(hasattr(parameter, "placements") for parameter in parameters)
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and not sharded and not network.training and not torch.is_grad_enabled()
