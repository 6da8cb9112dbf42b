"""What the benchmarks on a CPU and on a GPU share: where they run, inputs, baselines."""
