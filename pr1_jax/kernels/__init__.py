"""Arithmetic written for a device: attention, draws, what XLA's fusion must be kept from.

It may import `layout` and `system`, and nothing else of the package.
"""
