"""The benchmark of Tables 6 and 7: cost of a training step and a forward pass.

Needs only PyTorch, transformers and PEFT (no Hydra, datasets or lm-eval), so that it runs on a
bare GPU machine.
"""
