"""Publish the adapter of a run on the Hugging Face hub.

RUN is the folder of a finished run, REPO is OWNER/NAME and is made if it is missing. Four files are
sent: the adapter's weights and configuration, the identity of its base model, and a model card made
from the record. Nothing in them tells of a folder on this machine. `hf auth login` stores the token
that this needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: RUN holds no adapter or was modified, or the hub refuses.
    """
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--license", metavar="NAME", help="licence, as in apache-2.0")
    parser.add_argument("--dry-run", action="store_true", help="print the model card, send nothing")
    args = parser.parse(argv)
    # Imported late, so that a mistake on the command line is reported before torch loads.
    from mixlora_exp.serving.push import package, push

    files = package(Path(args.run).expanduser(), args.repo, args.license)
    if args.dry_run:
        print(files["README.md"].decode(), end="")
        return 0
    commit = push(files, args.repo, private=not args.public)
    print(f"published: adapter=hub:{args.repo}@{commit}")
    return 0
