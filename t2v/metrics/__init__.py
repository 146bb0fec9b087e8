"""How good are generated videos? Functions on (features, index); networks that give the features; thin torchmetrics wrappers."""
