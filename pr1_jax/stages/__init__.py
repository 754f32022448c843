"""The stages of a curriculum, what they share, and the run that writes what they do.

May import everything but the tools: the method, system, kernels, model, sampler,
training, data, huggingface, workdir and defaults.
"""
