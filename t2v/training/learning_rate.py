"""Learning-rate factors by optimizer step, and what becomes of an optimizer's settings when a training is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from t2v.training.slurm import first_process

HOW = ("foreach", "fused", "capturable")  # settings that change the work, not its result


def constant(warmup_steps: int = 0) -> Callable[[int], float]:
    """Linear warm-up, then 1: the paper states one rate, 5e-5, for all of its 267 thousand iterations."""
    return lambda step: min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """Linear warm-up, then a half cosine down to `final` at `total_steps`."""
    if total_steps <= warmup_steps:
        raise ValueError(
            f"a cosine of {total_steps} steps cannot hold a warm-up of {warmup_steps}: raise trainer.max_steps or lower "
            "lr_schedule.warmup_steps"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    return factor


def scheduled(optimizer: Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
    """What a module's `configure_optimizers` returns. A resumed training goes on with the rate, weight decay and so on that its command
    asks for, not with those of the command that wrote the checkpoint, and says where they differ."""
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": _Factor(optimizer, factor), "interval": "step"}}


class _Factor(LambdaLR):
    """Of a checkpoint only the step counts."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Moments and their steps are the checkpoint's, everything else the optimizer's own."""
    groups = []
    for stored, own in zip(state["param_groups"], optimizer.param_groups):
        groups.append({**own, "params": stored["params"]})
        for name in sorted(stored.keys() & own.keys() - {"params", "lr"}):
            before, now = (list(value) if isinstance(value, tuple) else value for value in (stored[name], own[name]))
            if before != now and name not in HOW and first_process():
                label = f"{own.get('name', '')} {'lr' if name == 'initial_lr' else name}".strip()
                print(f"resume   {label} is {now} from here on, {before} before", flush=True)
    return {**state, "param_groups": groups}
