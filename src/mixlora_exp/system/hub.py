"""Adapters on the Hugging Face hub: `hub:OWNER/NAME@REVISION` in place of a folder.

Only the adapter's own files are fetched, from one commit, into the hub's cache. Their content is
read like that of any other folder of a stranger.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixlora_exp.errors import UserError, shown

PREFIX = "hub:"
PLACE = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
LARGEST_JSON = 2**20


def on_hub(place: str) -> bool:
    """Return whether `place` names an adapter on the hub instead of a folder."""
    return place.startswith(PREFIX)


def adapter_folder(place: str) -> Path:
    """Return the folder of the adapter at `place`: a folder, or the hub's cache after its files
    were fetched. Without network if `place` names a commit whose files are in the cache.

    Raises:
        UserError: as `pin_revision`.
    """
    if not on_hub(place):
        return Path(place).expanduser()
    name, commit = _parts(pin_revision(place))
    return Path(_cached(name, CONFIG, str(commit))).parent


def pin_revision(place: str) -> str:
    """Return `place` with the commit instead of a branch or tag, after its files were fetched;
    which commit that is, is told on standard error. Folders are returned unchanged.

    Raises:
        UserError: `place` is not of the form `hub:OWNER/NAME@REVISION`, the repository does not
            exist, holds no adapter in safetensors, or cannot be reached.
    """
    if not on_hub(place):
        return place
    name, revision = _parts(place)
    if revision is not None and COMMIT.fullmatch(revision) and _cached(name, WEIGHTS, revision):
        return place
    from huggingface_hub import HfApi, hf_hub_download

    with one_error(f"adapter={place}"):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        for wanted in (CONFIG, WEIGHTS):
            if wanted not in sizes:
                raise UserError(
                    f"adapter={place} is no adapter: the repository has no {wanted}; give one that "
                    "PEFT or `mixlora-exp push` wrote"
                )
        for file in (CONFIG, BASE):
            if sizes.get(file, 0) > LARGEST_JSON:
                raise UserError(f"adapter={place}: {file} has {sizes[file]:,} bytes: take another")
        commit = str(info.sha)
        # The configuration last: a cache that has it is complete.
        for file in (BASE, WEIGHTS, CONFIG):
            if file in sizes:
                hf_hub_download(name, file, revision=commit)
    found = f"{PREFIX}{name}@{commit}"
    if revision != commit:
        sys.stderr.write(f"adapter={place} is {found} today\n")
    return found


def _parts(place: str) -> tuple[str, str | None]:
    parts = PLACE.fullmatch(place)
    if parts is None:
        raise UserError(
            f"adapter={shown(place, 200)} is not valid: write hub:OWNER/NAME@REVISION, with a "
            "commit, a branch or a tag"
        )
    return parts[1], parts[2]


def _cached(name: str, file: str, commit: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(name, one, revision=commit) for one in (CONFIG, file)]
    return found[-1] if all(isinstance(path, str) for path in found) else None


@contextmanager
def one_error(what: str) -> Iterator[None]:
    """Convert the hub's exceptions into one `UserError` about `what`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        why = "access is gated: ask on its page, then run `hf auth login`"
        raise UserError(f"{what}: {why}") from error
    except errors.RevisionNotFoundError as error:
        why = "the repository has no such revision: name one of its commits, branches or tags"
        raise UserError(f"{what}: {why}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        why = "the repository does not exist, or this account may not use it (`hf auth login`)"
        raise UserError(f"{what}: {why}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            why = "this account may not do that: run `hf auth login` with a token that may"
        else:
            why = f"the hub refused ({shown(str(error).splitlines()[0], 200)})"
        raise UserError(f"{what}: {why}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError,
            ConnectionError) as error:  # fmt: skip
        why = f"the hub cannot be reached ({shown(type(error).__name__, 60)})"
        raise UserError(f"{what}: {why}") from error
    except OSError as error:
        raise UserError(f"{what}: {shown(str(error), 200)}") from error
