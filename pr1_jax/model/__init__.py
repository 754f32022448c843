"""A decoder: its parameters, its forward pass, and the backends that compute it.

It may import kernels and system. `decoder` declares the axis letters.
"""
