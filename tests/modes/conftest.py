"""Modes are compiled with Inductor on a GPU; on a CPU mostly by the eager executor, which rewrites the same graphs."""

import uuid

import pytest
from torch._dynamo.utils import counters

from fusion_pass import graph_pass


@pytest.fixture
def backend(device):
    return "fusion_pass" if device == "cuda" else "fusion_pass_eager"


@pytest.fixture
def fused(monkeypatch):
    """Counts, by name, the sites fused since the test began, which finds no graph in Inductor's caches."""
    counters.clear()
    monkeypatch.setattr(graph_pass, "source_hash", lambda: uuid.uuid4().hex)
    return lambda: {name: count for name, count in counters["fusion_pass"].items() if name not in ("fused", "shared")}


@pytest.fixture
def graphs():
    """Counts the graphs that Dynamo has captured since the test began."""
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]
