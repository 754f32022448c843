"""Processes that run what may hang, die or raise: math-verify, and functions of a user.

Imports `rewards` alone.
"""
