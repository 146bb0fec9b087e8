"""Networks: torch and attention kernels only. They know neither Lightning nor the diffusion process."""
