"""Prompts in, trajectories out: parallel blocks decoded as one loop over one cache.

It may import model, kernels, system and the method's modules. Read `settings`, `state`,
`machine`, then `loop`, `forward`; `sampler` is the host's side.
"""
