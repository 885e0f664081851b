"""Errors of every op, in ulps: over sizes, offsets, scales and bad data, beside other libraries.

`python -m benchmarks.accuracy` measures, keeps the figures in benchmarks/results/accuracy.json, and makes the tables
and charts of docs/numerics.md and the excerpt in README.md from them.
"""
