"""The fused step's arithmetic on a CPU, in PyTorch's own operations over buffers that stay; docs/cpu.md.

`products` has the convolutions and chooses among ways to compute them, of which `winograd` needs fewer multiplications;
`matmul` the matrix product behind it; `elementwise` what stands between them.
"""
