"""The benchmark board of normfast: ``python -m benchmarks`` from the root of the repository."""
