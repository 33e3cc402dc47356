"""The commands; `main` finds them.

Neither `config` nor the modules here that read a command line import torch, so that a mistake is
reported within a second: functions import what needs torch when they run.
"""
