"""The guest laboratory: boots real guests and runs commands in them. Begin with boot() in guest.py.

`python -m tests.lab.setup` fetches what it needs.
"""
