"""Lowering needs Triton's compiled kernels, so these tests run without the interpreter, on graphs relabelled as CUDA graphs."""

import triton

collect_ignore_glob = ["test_*.py"] if triton.knobs.runtime.interpret else []
