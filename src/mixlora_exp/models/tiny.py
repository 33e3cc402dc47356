"""The tokenizer of models with random weights.

A byte-level BPE trained on the fixed text below: identical on every machine, without a download.
The answer labels of all tasks are single tokens, as in published tokenizers.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
"""Special tokens with ids 0, 1 and 2, on which `architecture.build_hf_config` relies."""

TOKENIZER_SIZE = 512
"""Vocabulary size: 3 special tokens, 256 bytes, and merges."""

LABEL_TOKENS = (*(f" {letter}" for letter in "ABCDEFGH"), " true", " false")
"""Answer labels that must be one token each."""

_PROSE = """
Question: Which of these is the best answer to the question? Choose one of the options below.
Options: Answer: Answer with the letter of the option, or with true or false, and nothing else.
Read the passage and answer the question. Is it true that the statement follows from the passage?
Complete the sentence with the option that makes the most sense. The sentence needs an ending.
What should a person do next, and why did they do it? How would the others feel afterwards?
A plant uses light from the sun, water from the soil and air from around it to make its food.
When water is heated it turns into steam, and when it is cooled far enough it turns into ice.
The moon goes around the earth, the earth goes around the sun, and that is how we count the year.
To keep the soup warm, put the lid on the pot; to cool it down, take the lid off and stir it.
An animal that eats only plants is called a herbivore, and one that eats other animals is not.
They walked to the school in the morning because the bus was late and the rain had stopped.
Numbers: zero one two three four five six seven eight nine ten, more than, less than, equal to.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer (a few milliseconds) and wrap it for transformers."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    # The labels are repeated often enough to outnumber every pair in the prose, so that their
    # merges come first.
    labels = "".join(LABEL_TOKENS) * 200
    core.train_from_iterator(
        [labels, *_PROSE.strip().splitlines()],
        trainers.BpeTrainer(
            vocab_size=TOKENIZER_SIZE,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[PAD, BOS, EOS],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
