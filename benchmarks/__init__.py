"""Exact curvature side by side: dagh and every peer, on the same networks, checked before they are timed.

``python -m benchmarks --help`` lists the options; ``docs/benchmarks.md`` describes what is measured and how.
"""
