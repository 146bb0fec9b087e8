"""t2v: ModelScopeT2V with PyTorch Lightning and Hydra. Importing it is cheap; see README.md for the map."""

from t2v import torchvision_beside_cpu_torch

torchvision_beside_cpu_torch.install()
