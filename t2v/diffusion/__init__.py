"""The diffusion process: noise schedule, objective, guidance, sampling loop. Knows networks only as callables (z, t, text) -> noise."""
