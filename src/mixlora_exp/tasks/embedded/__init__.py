"""Eight small tasks in the official schemas, made from general knowledge that ships with the code.

They need no network and no download, and serve to try the whole pipeline: a small pretrained
model gets better at them within minutes. Scores on them say nothing about the real data sets.
The knowledge is in `facts/`, a text file per relation; `draw` takes from it, `make` asks.
"""

from mixlora_exp.tasks.embedded.make import rows

__all__ = ["rows"]
