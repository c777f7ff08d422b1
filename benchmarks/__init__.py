"""Speed and memory, as JSON: `python -m benchmarks` lists the benchmarks."""
