"""Lowering needs Triton's compiled kernels, so these tests run without the interpreter, on fake CUDA tensors."""

import triton

collect_ignore_glob = ["test_*.py"] if triton.knobs.runtime.interpret else []
