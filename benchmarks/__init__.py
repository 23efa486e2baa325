"""Benchmarks: ratios measured side by side in one run, with the physical limit beside them."""
