"""Shared by the CPU and GPU benchmarks: settings, inputs, baselines, statistics."""
