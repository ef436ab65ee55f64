"""fusion-pass: quantized models compiled with ``torch.compile`` run fused Triton kernels, with eager's exact bits."""

__version__ = "0.1.0"
