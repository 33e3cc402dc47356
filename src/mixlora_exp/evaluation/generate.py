"""Protocol `generate`: the model answers in its own words, and the answer is read from them.

The prompt lists the options, as in `label_logits`; greedy decoding; a text that names no option,
or several, is counted as unparsed and as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, EvaluationConfig
from mixlora_exp.data.encoding import Encoded, encode_questions
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation.forward import Scorer, batches
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item

__all__ = ["encode_prompts", "parse_answer", "score_generate"]

PREAMBLE = re.compile(r"\W*(?:(?:the\s+)?(?:correct\s+|right\s+)?answer\s*(?:is\b|:)\W*)?", re.I)


def parse_answer(text: str, item: Item) -> int | None:
    """The option that a text names, None where it names none or several.

    The first line counts, after an opening like "The answer is". A label must stand by itself, at
    the end of the line or before punctuation, so that "A dog" is not option A, and be the only one,
    so that "A, B" is no answer. Else the line begins with the text of an option (the longest that
    fits), or contains the text of exactly one.
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = line[PREAMBLE.match(line).end() :].strip()
    standing = [
        index
        for index, label in enumerate(item.labels)
        if re.search(rf"(?:^|(?<=\s)|(?<=\()){re.escape(label)}\s*(?=$|[.):,;\]])", line)
    ]
    if standing and re.match(re.escape(item.labels[standing[0]]), line):
        return standing[0] if len(standing) == 1 else None
    lowered = line.casefold()
    options = [option.casefold() for option in item.options]

    def named(option: str, anchored: bool) -> bool:
        pattern = rf"(?<!\w){re.escape(option)}(?!\w)"
        return bool(re.match(pattern, lowered) if anchored else re.search(pattern, lowered))

    begins = [i for i, option in enumerate(options) if named(option, anchored=True)]
    if begins:
        longest = max(len(options[i]) for i in begins)
        begins = [i for i in begins if len(options[i]) == longest]
    found = begins or [i for i, option in enumerate(options) if named(option, anchored=False)]
    return found[0] if len(found) == 1 else None


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> list[Encoded]:
    """The items' prompts, each with room for the answer.

    Raises:
        UserError: labels are the same token or unknown, or an item is too long for the model.
    """
    return encode_questions(tokenizer, items, AnswerForm.label, data, evaluation.max_new_tokens)


def score_generate(
    scorer: Scorer,
    tests: Mapping[str, LoadedSplit],
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> list[TaskScore]:
    """Score the items of all tasks by what the model writes after the question."""
    questions = [
        (task, item, encoded)
        for task, test in tests.items()
        for item, encoded in zip(
            test.items,
            encode_prompts(scorer.tokenizer, test.items, data, evaluation),
            strict=True,
        )
    ]
    lengths = [len(encoded.prompt) + evaluation.max_new_tokens for _, _, encoded in questions]
    keys = [f"{task}/{item.id}" for task, item, _ in questions]
    texts = [""] * len(questions)
    for batch in batches(lengths, keys, scorer.batch_tokens):
        prompts = [questions[i][2].prompt for i in batch]
        new = scorer.generate(prompts, evaluation.max_new_tokens)
        for i, tokens in zip(batch, new, strict=True):
            texts[i] = scorer.tokenizer.decode(tokens, skip_special_tokens=True)
    results = []
    for task, test in tests.items():
        mine = [i for i, question in enumerate(questions) if question[0] == task]
        scores = [
            ItemScore(
                id=item.id,
                answer=item.answer,
                prediction=parse_answer(texts[i], item),
                text=texts[i],
            )
            for i, item in zip(mine, test.items, strict=True)
        ]
        results.append(
            summarize(
                task,
                "generate",
                test.items,
                scores,
                shortened=sum(questions[i][2].shortened for i in mine),
                unparsed=sum(score.prediction is None for score in scores),
            )
        )
    return results
