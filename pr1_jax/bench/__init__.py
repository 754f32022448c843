"""Benchmarks of sampling and updates.

They may import the sampler, training, the model, kernels, data, the method and system.
"""
