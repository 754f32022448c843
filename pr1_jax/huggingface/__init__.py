"""Hugging Face folders, read and written: config, weights, rows for tags, usage.

It may import the model, data and system.
"""
