"""How a training is divided between GPUs: strategy=single (Lightning's own), ddp (Lightning's own), fsdp (here)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric.utilities.optimizer import _optimizer_to_device
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from t2v.training.gathering import GatheredNetwork
from t2v.training.sharding import as_sharded, divide_like, load_rows, shard

GATHER = ("step", "pass", "block")


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: parameters, gradients, optimizer states and their average are divided over all ranks of all hosts.

    `gather`: when the weights come together. "step": all of them once a step, in memory that stays (`GatheredNetwork`); "pass": a block
    when it runs, until its first backward pass is done; "block": a block when it runs, and again in the backward pass.

    Lightning's ModelParallelStrategy brings processes and device mesh; its default mesh divides nothing on one host, so here data parallel
    is the world and tensor parallel is 1. What it does for checkpoints (distributed checkpoints with pickled metadata) is replaced:
    checkpoint folders are those of every other strategy. Runs on CPUs too.
    """

    def __init__(self, timeout_minutes: float = 30, gather: str = "step") -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        if gather not in GATHER:
            raise ValueError(f"strategy.gather={gather} is unknown: use {', '.join(GATHER)}")
        self.gather = gather

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard(self, network: nn.Module) -> None:
        """Called by the module in `configure_model`, alike for the network and for its average."""
        mesh: DeviceMesh = self.device_mesh["data_parallel"]
        trained = any(parameter.requires_grad for parameter in network.parameters())
        # without a backward pass nothing would give gathered weights up again, and they would stay those of the first call
        shard(network, mesh, self.precision_policy(), reshard_after_forward=self.gather != "pass" or not trained)

    def gathered(self, network: nn.Module, compiler: str | None, rows: Sequence[nn.Parameter]) -> GatheredNetwork:
        """For gather=step: `network` is one like that whose `rows` are given, without memory."""
        group = self.device_mesh["data_parallel"].get_group()
        return GatheredNetwork(network, rows, self.precision_policy().param_dtype, group, compiler)

    def precision_policy(self) -> MixedPrecisionPolicy:
        """bf16-mixed: weights travel in bf16, gradients in float32; autocast decides the rest, as in every other strategy."""
        if self.precision_plugin.precision == "bf16-mixed":
            return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        return MixedPrecisionPolicy(cast_forward_inputs=False)

    # -- checkpoints: every rank reads and writes its own rows ----------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return {**state, "state": _moments(as_sharded, state, optimizer)}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_rows(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict({**stored, "state": _moments(divide_like, stored, optimizer)})
            _optimizer_to_device(optimizer, self.root_device)


def how_gathered(strategy: Any) -> str | None:
    """FullyShardedStrategy's `gather`; None for strategies that divide no weights."""
    return strategy.gather if isinstance(strategy, FullyShardedStrategy) else None


def weights_stay(gather: str | None) -> bool:
    """Whether each pass finds the weights where the one before did, as CUDA graphs must. `gather`: `how_gathered`."""
    return gather in (None, "step")


def _moments(change: Callable[[Tensor, Tensor], Tensor], stored: Mapping[str, Any], optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The `state` of an optimizer's state dictionary with every moment changed to what `change` makes of it and of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))
    return {
        number: {key: change(value, of_number[number]) if _is_moment(value) else value for key, value in values.items()}
        for number, values in stored["state"].items()
    }


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
