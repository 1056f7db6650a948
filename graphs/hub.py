"""Where a checkpoint is: a local directory, or a repository of the Hugging Face hub, downloaded to its cache."""

from __future__ import annotations

import re
from pathlib import Path

from graphs.errors import UserError, nearest
from graphs.files import reason

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.txt")
PICKLED = ("pytorch_model*.bin",)

#: what the hub client's exceptions mean to the one who typed the id
CAUSES = {
    "RepositoryNotFoundError": "the hub has no such repository, or it is private",
    "GatedRepoError": "its owners ask you to accept their terms on the hub first",
    "RevisionNotFoundError": "the repository has no such revision",
    "OfflineModeIsEnabled": "it is not in the local cache, and HF_HUB_OFFLINE forbids fetching it",
    "LocalEntryNotFoundError": "it is not in the local cache, and the hub cannot be reached",
    "IncompleteSnapshotError": "only a part is in the local cache, and the hub cannot be reached",
}


def resolve_checkpoint(name_or_path: Path | str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """The directory of a checkpoint: `name_or_path` itself, or the snapshot of the hub repository `org/name`.

    Only weights, JSON and tokenizer files are fetched (code never); pickled weights with `allow_pickle` only.
    Raises: UserError where there is neither, or the hub cannot give it.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{path}: a local directory has no revision '{revision}'; revisions belong to hub ids")
        return path
    if path.exists():
        raise UserError(f"{path}: a file; give the directory that holds it, {path.parent}")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{path}: no such directory{_neighbour(path)}, and not a hub id of the form org/name")
    patterns = [*PATTERNS, *(PICKLED if allow_pickle else ())]
    try:
        from huggingface_hub import snapshot_download

        # Directories of a repository hold other formats of the same model; the layout read here is the top level.
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except ImportError as error:
        raise UserError(f"'{name}' is no directory, and fetching it needs huggingface_hub: {reason(error)}") from error
    except Exception as error:  # the client raises from a dozen families (httpx, OSError, ValueError, its own)
        kinds = (CAUSES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CAUSES)
        raise UserError(f"'{name}': no such directory, and from the hub: {next(kinds, reason(error))}") from error


def _neighbour(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    return f" ({nearest(path.name, siblings)})" if siblings and len(siblings) < 50 else ""
