"""What every part needs of the machine around it: devices, processes, files, commands.

It imports nothing of the package.
"""
