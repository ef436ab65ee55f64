"""The fused Triton kernels and what each computes in plain PyTorch."""
