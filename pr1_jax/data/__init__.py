"""What is trained and evaluated on: tasks made by code, files and hubs, as tokens.

Imports the method's files and `system`.
"""
