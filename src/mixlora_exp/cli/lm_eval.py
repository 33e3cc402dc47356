"""lm-eval's command line, with MixLoRA registered: `mixlora-exp lm-eval run --model hf ...`.

lm-eval's own command cannot import this package first, so PEFT would not know the adapter type.
Tokenizers get the same special-token settings as in training: if a template appends EOS, lm-eval
would score that EOS instead of a one-token answer. An adapter (`peft=DIR`) that was trained on
weights other than those of `pretrained=` is refused, unless `base=accept` is among the arguments.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixlora_exp.adapters.base_check import check_same_base
from mixlora_exp.errors import UserError
from mixlora_exp.models.base_identity import identity_at

KNOWN = (
    (
        "Tasks not found",
        "--tasks: name tasks that `mixlora-exp lm-eval ls tasks` lists, or a task's "
        "YAML file, or give its folder with --include_path",
    ),
    ("Can't find 'adapter_config.json'", "--model_args: peft=DIR must be a folder with an adapter"),
)
"""Beginnings of lm-eval's and PEFT's errors that are user mistakes, each with the way out."""
NO_MODEL = ("is not a valid model identifier", "couldn't find them in the cached files")
"""Parts of transformers' messages about a model that cannot be found."""


def _settled(create: Callable[..., None]) -> Callable[..., None]:
    """Wrap lm-eval's `_create_tokenizer`: apply this project's special-token settings after it."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from mixlora_exp.models import fit_vocabulary, settle_special_tokens

    @functools.wraps(create)
    def settled(self: Any, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        create(self, pretrained, tokenizer, **options)
        source = tokenizer or pretrained
        # An encoder reads complete texts, in which EOS is part of the input.
        if self.backend != "causal" or not (isinstance(source, str) and self.tokenizer.is_fast):
            return
        places = ("revision", "subfolder")
        stated = get_tokenizer_config(source, **{k: options[k] for k in places if options.get(k)})
        if options.get("add_bos_token") is not None:
            stated["add_bos_token"] = options["add_bos_token"]
        whose = f"--model_args: the tokenizer of {source}"
        settle_special_tokens(self.tokenizer, stated, whose)
        fit_vocabulary(self.tokenizer, self.config.get_text_config().vocab_size, whose)

    return settled


ACCEPT = "base=accept"


def _model_args(argv: Sequence[str]) -> dict[str, str]:
    """Return lm-eval's `--model_args`: name=value pairs, in one word or several, or a JSON
    object."""
    words: list[str] = []
    for number, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("--model_args", "-a"):
            words += [value] if equals else []
            following = argv[number + 1 :] if not equals else ()
            for other in following:
                if other.startswith("-"):
                    break
                words.append(other)
    text = ",".join(words)
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return {}  # lm-eval reports it.
        return {name: value for name, value in found.items() if isinstance(value, str)}
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _check_base(argv: Sequence[str]) -> None:
    given = _model_args(argv)
    folder = Path(given.get("peft", "")).expanduser()
    if "peft" not in given or "pretrained" not in given or not folder.is_dir():
        return
    now = identity_at(given["pretrained"], given.get("revision", "main"))
    check_same_base(folder, now, accept=ACCEPT in argv)


def run(argv: Sequence[str]) -> None:
    """Run lm-eval with these arguments; `--help` shows lm-eval's own.

    Raises:
        UserError: lm-eval is not installed, does not know a given task, or the adapter was trained
            on another base model.
    """
    _check_base(argv)
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("lm-eval is not installed: run `pip install 'lm-eval[hf]'`") from error
    HFLM._create_tokenizer = _settled(HFLM._create_tokenizer)
    before = sys.argv
    # lm-eval reads them there.
    sys.argv = ["mixlora-exp lm-eval", *(word for word in argv if word != ACCEPT)]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        # Any other error may be a bug, and keeps its traceback.
        hint = next((hint for begin, hint in KNOWN if str(error).startswith(begin)), None)
        if hint is None and any(text in str(error) for text in NO_MODEL):
            hint = "--model_args: give pretrained=DIR with a model, or its name on the hub"
        if hint is None:
            raise
        raise UserError(f"{hint} ({' '.join(str(error).split())[:160]})") from error
    finally:
        sys.argv = before
