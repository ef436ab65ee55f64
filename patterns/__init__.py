"""The grammar: what quantized models look like in a graph."""
