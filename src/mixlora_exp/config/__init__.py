"""Configuration: `conf/` and the command line, composed by Hydra into checked dataclasses.

No OmegaConf object leaves this room: `resolve.to_config` turns one into a `schema.Config`. The
schemas need neither Hydra nor OmegaConf, so that adapters and benchmarks run without them.
"""
