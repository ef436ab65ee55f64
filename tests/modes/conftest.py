"""Modes are compiled with Inductor on a GPU; on a CPU mostly by the eager executor, which rewrites the same graphs."""

import pytest
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache


@pytest.fixture
def backend(device):
    return "fusion_pass" if device == "cuda" else "fusion_pass_eager"


@pytest.fixture
def fused():
    """Counts, by name, the sites fused since the test began; nothing comes from a cache that outlives the test."""
    counters.clear()
    with fresh_cache():
        yield lambda: {
            name: count for name, count in counters["fusion_pass"].items() if name not in ("fused", "shared")
        }


@pytest.fixture
def graphs():
    """Counts the graphs that Dynamo has captured since the test began."""
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]
