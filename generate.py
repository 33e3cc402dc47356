"""Let a model with an adapter write: `python generate.py adapter=DIR prompt="Question: ..."`.

`prompts=FILE` has a prompt per line (JSONL: its field `prompt`) and answers in JSON lines;
without either, type prompts one after another. `adapters=[DIR,DIR]` lets several adapters answer
each prompt, in the same batches (JSONL: a field `adapter` chooses one). The base model is that of
the adapter's record, or `model=NAME`. `chat=true` puts prompts into the tokenizer's chat template.
"""

import sys

from mixlora_exp.cli.generate import run
from mixlora_exp.system.guarded import guarded

if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:], resumes=False))
