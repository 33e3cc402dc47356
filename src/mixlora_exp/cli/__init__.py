"""The commands; `main` finds them.

`config` and the modules here that read a command line import no torch, so that a mistake is told in
a second: what needs it is imported in the function that runs.
"""
