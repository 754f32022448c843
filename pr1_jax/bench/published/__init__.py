"""The published scheme for parallel blocks, a request a part, to compare ours with.

It may import the sampler, the model, the method and `bench.plans`.
"""
