"""Protocol `generate`: the model generates text, from which the answer is parsed.

The prompt lists the options, as in `label_logits`; decoding is greedy. A text that names no option,
or several, counts as unparsed and as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, EvaluationConfig
from mixlora_exp.data.encoding import Encoded, encode_questions
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item

PREAMBLE = re.compile(r"\W*(?:(?:the\s+)?(?:correct\s+|right\s+)?answer\s*(?:is\b|:)\W*)?", re.I)


def parse_answer(text: str, item: Item) -> int | None:
    """Return the index of the option that a text names; None if it names none or several.

    Only the first non-empty line counts, without an opening such as "The answer is". If it begins
    with a label that is followed by punctuation or the end of the line ("A dog" is not option A),
    that option is the answer, unless another label occurs in this way ("A, B"). Otherwise the
    answer is the option whose text begins the line (the longest match), or the only one whose text
    occurs in it.
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
    """Encode the items' prompts, leaving positions for the generated answer.

    Raises:
        UserError: two labels are the same token, a label is unknown, or an item is too long for the
            model.
    """
    return encode_questions(tokenizer, items, AnswerForm.label, data, evaluation.max_new_tokens)


def generated_texts(
    scorer: Scorer, prompts: Sequence[list[int]], keys: Sequence[str], new_tokens: int
) -> list[str]:
    """Return the texts that the model generates after prompts, greedily, in batches of similar
    length."""
    lengths = [len(prompt) + new_tokens for prompt in prompts]

    def texts_of(batch: list[int]) -> list[str]:
        new = scorer.generate([prompts[i] for i in batch], new_tokens)
        return [scorer.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]

    return scorer.over_batches(lengths, keys, texts_of)


def score_generate(
    scorer: Scorer,
    tests: Mapping[str, LoadedSplit],
    evaluation: EvaluationConfig,
    encoded: Mapping[str, Sequence[Encoded]],
) -> list[TaskScore]:
    """Score the items of all tasks by the text that the model generates after the question.
    `encoded`: by task, from `encode_prompts`."""
    questions = [
        (task, item, found)
        for task, test in tests.items()
        for item, found in zip(test.items, encoded[task], strict=True)
    ]
    keys = [f"{task}/{item.id}" for task, item, _ in questions]
    prompts = [found.prompt for _, _, found in questions]
    texts = generated_texts(scorer, prompts, keys, evaluation.max_new_tokens)
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
