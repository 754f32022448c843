"""All C++, its compilation and its calls; the only importers are model.cpu and benchmarks.

It may import `system`, and nothing else of the package.
"""
