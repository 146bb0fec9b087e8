"""What happens around the steps: checkpoints and signals, TensorBoard, sample videos, the console, scores."""


def at_least_one(key: str, steps: int) -> int:
    """`steps`, the value of callbacks.`key`. ValueError if there is no such interval."""
    if steps < 1:
        raise ValueError(f"callbacks.{key} is {steps}: it must be at least 1")
    return steps
