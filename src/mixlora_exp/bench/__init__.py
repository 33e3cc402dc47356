"""The benchmark of Tables 6 and 7: what a training step and a forward pass cost, row by row.

Needs PyTorch, transformers and PEFT alone (no Hydra, datasets or lm-eval), so that it runs on a
bare GPU machine.
"""
