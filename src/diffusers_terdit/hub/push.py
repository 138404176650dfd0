"""Upload a model in one commit that loses nothing of what the repository holds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    create_branch,
    create_commit,
    create_repo,
    hf_hub_download,
    list_repo_files,
)
from huggingface_hub.errors import EntryNotFoundError

from ..storage.saving import scrub_paths
from ..storage.weights import require_safetensors
from .errors import hub_errors
from .model_card import PICTURES, encode_pictures, merge_cards, model_card, own_text, read_text


logger = logging.get_logger(__name__)


_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|diffusion_pytorch_model\.(?:safetensors|bin)\.index(?:\.(?P<index_variant>[^.]+))?\.json"
)


def create_repository(repo_id: str, private: bool | None, token: str | None, revision: str | None = None) -> str:
    """Make a repository, and a branch of it, unless they exist; its id with the name of its owner.

    Raises:
        OSError: The Hub does not allow it, or cannot be reached.
    """
    with hub_errors(repo_id, revision, writing=True):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None:
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    return repo_id


def read_card(repo_id: str, revision: str | None = None, token: str | None = None) -> str | None:
    """The README.md of a repository; `None` where there is none."""
    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return read_text(Path(path))


def push_folder(
    folder: Path,
    repo_id: str,
    card: str | None,
    overrides: Iterable[str] = (),
    pictures: Mapping[str, bytes] | None = None,
    commit_message: str = "Upload",
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
) -> CommitInfo:
    """Upload the files of a folder in one commit, with a card, and delete the weights that they replace.

    Args:
        folder (`Path`): Gets the card that is uploaded, too.
        repo_id (`str`): An existing repository, with the name of its owner.
        card (`str`, *optional*): What `model_card` gives, to merge with the cards of the folder and the repository.
        overrides (`Iterable[str]`): See `merge_cards`.
        pictures (`dict[str, bytes]`, *optional*): Further files by path.
        commit_message (`str`): Title of the commit.
        token (`str`, *optional*): Default the one of `hf auth login`.
        create_pr (`bool`): Open a pull request instead.
        subfolder (`str`, *optional*): Folder of the repository to upload into.
        revision (`str`, *optional*): An existing branch; default `main`.
        ignore (`Sequence[str]`): Patterns of paths in the folder that stay here, such as `"checkpoint-*"`.

    Raises:
        ValueError: The metadata of a card is not YAML.
        OSError: The Hub does not allow it, or cannot be reached.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    ignore = [".git/*", ".cache/*", "*.partial", "terdit-*.lock", *ignore]
    files = {name: path for path in paths if not _matches(name := path.relative_to(folder).as_posix(), ignore)}
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    added: dict[str, str | bytes] = {prefix + name: str(path) for name, path in files.items()}
    with hub_errors(repo_id, revision, writing=True):
        if card is not None:
            merged = _merged_card(card, folder, repo_id, revision, token, overrides, append=bool(pictures))
            added["README.md"] = merged.encode()
        added |= pictures or {}
        present = list_repo_files(repo_id, revision=revision, token=token)
        operations = [CommitOperationAdd(path, content) for path, content in added.items()]
        logger.info(f"Uploading {len(added)} files to {repo_id}.")
        return create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(path) for path in _replaced(present, added))],
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path, or a folder that it is in, matches a pattern."""
    parents = [str(parent) for parent in PurePosixPath(name).parents[:-1]]
    return any(fnmatch(part, pattern) for part in (name, *parents) for pattern in patterns)


def _merged_card(
    generated: str,
    folder: Path,
    repo_id: str,
    revision: str | None,
    token: str | None,
    overrides: Iterable[str],
    append: bool,
) -> str:
    """The card to upload, also written into the folder; of two with text of their own each stays where it is."""
    path, where = folder / "README.md", f"README.md of {repo_id}"
    theirs, ours = read_card(repo_id, revision, token), read_text(path) if path.exists() else None
    our_text, their_text = own_text(ours, str(path)), own_text(theirs, where)
    if our_text and their_text and our_text != their_text:
        logger.warning(
            f"{repo_id} has a README.md of its own, which was kept; the one in the folder was not uploaded. To replace"
            f" it: `hf upload {repo_id} README.md`."
        )
        return merge_cards(generated, theirs, where, overrides, append)
    last, where = (ours, str(path)) if our_text else (theirs, where)
    first = theirs if our_text else ours
    card = merge_cards(merge_cards(generated, first, overrides=overrides), last, where, overrides, append)
    path.write_bytes(card.encode())
    return card


def _replaced(present: Iterable[str], added: Iterable[str]) -> list[str]:
    """Weights in the repository that belong to the uploaded ones' earlier state.

    An index of shards would win over a new single file, and shards over nothing.
    """

    def key(path: str) -> tuple[str, str | None] | None:
        folder, _, name = path.rpartition("/")
        found = _WEIGHTS.fullmatch(name)
        return (folder, found["variant"] or found["index_variant"]) if found else None

    added = set(added)
    renewed = {key(path) for path in added} - {None}
    pictures = any(path.startswith(f"{PICTURES}/") for path in added)
    return [
        path
        for path in present
        if path not in added
        and (key(path) in renewed or (pictures and re.fullmatch(rf"{PICTURES}/\d\d+\.png", path) is not None))
    ]


class HubMixin:
    """Uploads with a model card, for layer, model and pipeline."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
        images: Any = None,
    ) -> Any:
        """Save, and upload with a model card.

        A README.md that the repository has keeps its author's text and metadata; the generated part is renewed.

        Args:
            repo_id (`str`): Repository, made if it does not exist.
            commit_message (`str`, *optional*): Default "Upload" and the name of the class.
            private (`bool`, *optional*): Of a repository that is made.
            token (`str`, *optional*): Default the one of `hf auth login`.
            create_pr (`bool`): Open a pull request instead.
            safe_serialization (`bool`): Only `True`: safetensors.
            variant (`str`, *optional*): See `save_pretrained`.
            subfolder (`str`, *optional*): Folder of the repository; then no card is written.
            revision (`str`, *optional*): Branch, made from `main` if it does not exist.
            license (`str`, *optional*): For the card, an identifier as on the Hub. None is guessed.
            base_model (`str`, *optional*): For the card: Hub id of what this was made from; default the one it was
                converted or loaded from, where that is known.
            images (`list` or `dict` of `PIL.Image.Image`, *optional*): Pictures for the card, with captions as keys;
                such as `pipe(...).images`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit.

        Raises:
            OSError: The Hub does not allow it, or cannot be reached.
            ValueError: Another format is asked for, `images` hold something else, or the metadata of the repository's
                README.md is not YAML.
        """
        require_safetensors(safe_serialization)
        repo_id = create_repository(repo_id, private, token, revision)  # what is not allowed, before the work
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)  # type: ignore[attr-defined]
            return self._push_folder(
                Path(folder),
                repo_id=repo_id,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
                variant=variant,
                subfolder=subfolder,
                revision=revision,
                license=license,
                base_model=base_model,
                images=images,
            )

    def _push_folder(
        self,
        folder: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
        images: Any = None,
    ) -> Any:
        scrub_paths(folder)
        repo_id = create_repository(repo_id or folder.resolve().name, private, token, revision)
        shown, pictures = encode_pictures(images)
        arguments = {"revision": revision, "variant": variant}
        text = None if subfolder else model_card(self, repo_id, None, shown, license, base_model, arguments)
        given = {"license": license, "base_model": base_model}
        return push_folder(
            folder,
            repo_id,
            text,
            [key for key, value in given.items() if value],
            pictures,
            commit_message or f"Upload {type(self).__name__}",
            token,
            create_pr,
            subfolder,
            revision,
        )
