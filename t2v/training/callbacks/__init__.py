"""What happens around the steps: checkpoints and signals, TensorBoard, sample videos, the console, scores."""
