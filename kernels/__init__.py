"""Fused kernels for strided convolutions, transposed convolutions, batch norm and their activations."""
