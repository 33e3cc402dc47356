"""Reading adapters that the official packages (moe-peft, mixlora) wrote, and nothing else.

The command `convert` is the only user: without this folder everything but that command works.
"""
