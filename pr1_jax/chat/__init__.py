"""A conversation with a model, in a terminal, a pipe or a notebook.

`session` asks, `opening` loads, `view` draws, `command` talks to the world. It may
import the stages and what is below them.
"""
