"""The programs that measure the numbers in README.md and docs/benchmarks.md."""
