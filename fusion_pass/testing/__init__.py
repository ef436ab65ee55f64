"""Test that a fused computation has eager's bits: comparisons, an assertion for test suites, random inputs and programs.

Only :mod:`fusion_pass.testing.programs` needs Hypothesis (``pip install fusion-pass[test]``).
"""

from .comparison import Comparison, compare
from .equivalence import DifferenceError, assert_fusion_equivalent
from .fuzzing import Counterexample, Fuzzed, fuzz

__all__ = ["Comparison", "Counterexample", "DifferenceError", "Fuzzed", "assert_fusion_equivalent", "compare", "fuzz"]
