"""Benchmarks of sampling and updates; they may import all but stages and tools."""
