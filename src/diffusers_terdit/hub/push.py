"""Upload a model in one commit that loses nothing of what the repository holds."""

import json
import os
import re
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    RepoCard,
    create_branch,
    create_commit,
    create_repo,
    hf_hub_download,
    list_repo_files,
)
from huggingface_hub.errors import EntryNotFoundError

from ..storage.saving import undisturbed, weights_name
from ..storage.weights import require_safetensors
from .errors import hub_errors
from .known_files import CARD, PICTURES, known_files, open_inside
from .model_card import CardOptions, merge_cards, model_card, own_text, parse_card


logger = logging.get_logger(__name__)


def create_repository(
    repo_id: str, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> str:
    """Create a repository, and a branch of it, unless they exist; return its id with the name of its owner.

    Raises:
        OSError: The Hub does not allow it, or cannot be reached.
    """
    with hub_errors(repo_id, revision, writing=True):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None:
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    return repo_id


def push_saved(
    model: Any,
    folder: str | os.PathLike,
    options: CardOptions,
    repo_id: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Upload a folder that holds a saved model, with a card, in one commit; delete the weights that it replaces.

    Args:
        model ([`TerDiTPipeline`], [`TerDiTTransformer2DModel`] or [`TernaryLinear`]): What was saved.
        folder (`str` or `os.PathLike`): The folder, which is only read. What is uploaded are its `known_files`,
            without the paths of this machine in configs.
        options ([`CardOptions`]): What the card says beyond the model.
        repo_id (`str`, *optional*): Repository, created if it does not exist; by default named as the folder.
        private (`bool`, *optional*): Whether a created repository is private.
        commit_message (`str`, *optional*): By default "Upload" and the name of the class.
        token (`str`, *optional*): By default that of `hf auth login`.
        create_pr (`bool`): Open a pull request instead.
        variant (`str`, *optional*): Variant under which the weights were saved.
        subfolder (`str`, *optional*): Folder of the repository to upload into; then there is no card.
        revision (`str`, *optional*): Branch, created from `main` if it does not exist.

    Raises:
        OSError: The Hub does not allow it, or cannot be reached; or a file is a link, or another process saves into
            the folder.
        ValueError: A README.md that is there cannot be read.
    """
    folder = Path(folder)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    with ExitStack() as opened:
        names = known_files(folder)
        with undisturbed(folder, *{(folder / name).parent for name in names} - {folder}):
            added = {prefix + name: _content(folder, name, opened) for name in names}
        repo_id = create_repository(repo_id or folder.resolve().name, private, token, revision)
        opened.enter_context(hub_errors(repo_id, revision, writing=True))
        if not subfolder:
            saved = added.get(CARD)
            ours = parse_card(saved, folder / CARD) if isinstance(saved, bytes) else None
            theirs = _read_remote_card(repo_id, revision, token)
            card = model_card(model, repo_id, options, revision=revision, variant=variant)
            added[CARD] = _merged(ours, card, theirs, repo_id, options).encode()
            added |= options.encoded()
        present = list_repo_files(repo_id, revision=revision, token=token)
        logger.info(f"Uploading {len(added)} files to {repo_id}.")
        return create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path, content) for path, content in added.items()),
                *(CommitOperationDelete(path) for path in _replaced(present, added)),
            ],
            commit_message=commit_message or f"Upload {type(model).__name__}",
            token=token,
            create_pr=create_pr,
            revision=revision,
        )


def _content(folder: Path, name: str, opened: ExitStack) -> str | bytes | BinaryIO:
    """Return what of a file is uploaded: its bytes; of weights the open file, whatever its path leads to later."""
    if name.endswith((".safetensors", ".bin")):
        weights = opened.enter_context(open_inside(folder, name))
        path = f"/proc/self/fd/{weights.fileno()}"  # of Linux; huggingface_hub uploads open files slower than paths
        return path if os.path.exists(path) else weights
    with open_inside(folder, name) as file:
        content = file.read()
    if name.endswith(("config.json", "model_index.json")):
        try:
            config = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {error}. Save the model again.") from error
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            return f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode()
    return content


def _read_remote_card(repo_id: str, revision: str | None, token: str | None) -> RepoCard | None:
    """Return the card of a repository, or `None` where there is none."""
    try:
        path = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return parse_card(Path(path).read_bytes(), f"{CARD} of {repo_id}")


def _merged(ours: RepoCard | None, card: str, theirs: RepoCard | None, repo_id: str, options: CardOptions) -> str:
    """Return the card to upload; if the folder and the repository both have an author's text, each keeps its own."""
    our_text, their_text, append = own_text(ours), own_text(theirs), bool(options.images)
    if our_text and their_text and our_text != their_text:
        logger.warning(
            f"{repo_id} has its own README.md, which was kept; the one in the folder was not uploaded. To replace"
            f" it: `hf upload {repo_id} README.md`."
        )
        return merge_cards(card, theirs, options, append)
    first, last = (theirs, ours) if our_text else (ours, theirs)
    return merge_cards(merge_cards(card, first, options), last, options, append)


def _replaced(present: Iterable[str], added: Collection[str]) -> list[str]:
    """Return the files in the repository that belong to an earlier state of the uploaded weights and pictures.

    diffusers would load an old index of shards instead of a new single file.
    """

    def key(path: str) -> tuple[str, tuple[str, str]] | None:
        folder, _, name = path.rpartition("/")
        weights = weights_name(name)
        if weights is None and folder == PICTURES and re.fullmatch(r"\d\d+\.png", name):
            weights = ("pictures", "")
        return weights and (folder, weights)

    renewed = {key(path) for path in added} - {None}
    return [path for path in present if path not in added and key(path) in renewed]


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
            repo_id (`str`): Repository, created if it does not exist.
            commit_message (`str`, *optional*): By default "Upload" and the name of the class.
            private (`bool`, *optional*): Whether a created repository is private.
            token (`str`, *optional*): By default that of `hf auth login`.
            create_pr (`bool`): Open a pull request instead.
            safe_serialization (`bool`): Only `True`: safetensors.
            variant (`str`, *optional*): See `save_pretrained`.
            subfolder (`str`, *optional*): Folder of the repository; then no card is written.
            revision (`str`, *optional*): Branch, created from `main` if it does not exist.
            license (`str`, *optional*): For the card, an identifier as on the Hub. None is guessed.
            base_model (`str`, *optional*): For the card: Hub id of what this was made from; by default the repository
                that it was converted or loaded from, where that is known.
            images (`list` or `dict` of `PIL.Image.Image`, *optional*): Pictures for the card, with captions as keys;
                such as `pipe(...).images`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit.

        Raises:
            OSError: The Hub does not allow it, or cannot be reached.
            ValueError: Another format is asked for, `images` holds something else, or the README.md of the repository
                cannot be read.
        """
        require_safetensors(safe_serialization)
        options = CardOptions(license, base_model, images)
        repo_id = create_repository(repo_id, private, token, revision)  # what is not allowed fails before the work
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)  # type: ignore[attr-defined]
            return push_saved(
                self,
                folder,
                options,
                repo_id,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
                variant=variant,
                subfolder=subfolder,
                revision=revision,
            )

    def _push_saved(
        self,
        folder: Path,
        license: str | None = None,
        base_model: str | None = None,
        images: Any = None,
        **upload: Any,
    ) -> None:
        """Upload what `save_pretrained` wrote, with the arguments of `push_to_hub`."""
        push_saved(self, folder, CardOptions(license, base_model, images), **upload)
