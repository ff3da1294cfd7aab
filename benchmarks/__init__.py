"""Where the numbers of README.md and docs/benchmarks.md come from."""
