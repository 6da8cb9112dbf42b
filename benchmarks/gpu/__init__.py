"""`make gpu`: builds, checks and measures everything on a machine with an NVIDIA GPU, in one call (docs/gpu.md)."""
