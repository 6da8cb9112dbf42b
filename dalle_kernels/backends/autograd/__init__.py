"""What registered operations share, whatever their kernels are written in: fake kernels and gradients."""
