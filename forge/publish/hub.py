"""Push a model directory to the Hugging Face Hub so that the repo holds a loadable model at every commit.

Weights are uploaded first and become visible with everything else in one commit, which names its parent: what another
process pushed meanwhile is seen and never overwritten blindly. After a fault the difference to the repo is taken anew,
so a commit whose reply was lost is found instead of repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
import hashlib
import os
from pathlib import Path
import shutil
import tempfile
import time
from types import MappingProxyType
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
import psutil

from forge.errors import HubError, StorageError
from forge.files import TEMPORARY_SUFFIX, hash_file
from forge.vocabulary import INDEX_FILE, MANIFEST_FILE

CARD_FILE: Final = "README.md"
#: Attempts of one push. Waits between them grow 1, 2, 4, 8 s: a restarting service is back within them.
ATTEMPTS: Final = 5
FIRST_WAIT_SECONDS: Final = 1.0
#: Answers that another attempt may change: the parent moved (412), too many requests (429), the service's own faults.
_PASSING: Final = (408, 412, 429, 500, 502, 503, 504)
#: The HTTP client's base class; which client it is depends on the version of huggingface_hub.
_HTTP_ERROR: Final[type[Exception]] = HfHubHTTPError.__mro__[1]
_REASONS: Final = {
    401: "the Hub does not accept the token; log in with `hf auth login` or set HF_TOKEN",
    403: "the token may not write there; use one with write access to that user or organisation",
    404: "the Hub does not know the repo, or the token may not see it",
    409: "another change of the repo is in progress; push again in a minute",
    412: "others keep committing to the repo at the same time; push again when they have finished",
    429: "the Hub allows no more requests for now; push again in a few minutes",
}


def push_model(
    model_dir: Path,
    repo: str,
    *,
    message: str,
    card: str | None = None,
    plots: Mapping[str, bytes] = MappingProxyType({}),
    tag: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Upload what differs from the repo, in one commit; no commit when nothing does.

    Args:
        model_dir: the assembled model; files directly in it are pushed, hidden and temporary ones are not.
        repo: `USER/REPO`; made when it does not exist.
        message: first line of the commit.
        card: content of README.md; None leaves the repo's as it is (or pushes the directory's, if it has one).
        plots: pictures that the card shows, by name.
        tag: what the commit is called; one that names another commit is moved. None leaves tags alone.
        private: whether a repo that is made now is private.
        endpoint: address of the Hub; None is the public one (or `HF_ENDPOINT`).
        token: None uses the token that this machine is logged in with.
        sleep: waits between attempts.

    Returns:
        The address of the commit, or of the newest one when nothing differed.

    Raises:
        HubError: the Hub refused, or could not be reached; the sentence says why and what to do.
        StorageError: `model_dir` holds no model.
    """
    if not (model_dir / INDEX_FILE).is_file():
        raise StorageError(f"{model_dir} holds no assembled model: it has no {INDEX_FILE}.")
    api = HfApi(endpoint=endpoint, token=token)
    with _pinned(model_dir) as files:
        content: dict[str, Path | bytes] = {**files, **plots}
        if card is not None:
            content[CARD_FILE] = card.encode()
        for attempt in range(ATTEMPTS):
            try:
                oid = _push_once(api, repo, content, message, private)
                if tag is not None:
                    _name(api, repo, oid, tag, message)
                return f"{api.endpoint}/{repo}/commit/{oid}"
            except (_HTTP_ERROR, OSError, ValueError, RuntimeError) as error:
                cause = _root(error)
                if attempt == ATTEMPTS - 1 or not _may_pass(cause):
                    raise _sentence(cause, repo, api.endpoint) from error
                if _status(cause) != 412:  # a moved parent is read again at once
                    sleep(FIRST_WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _push_once(api: HfApi, repo: str, content: dict[str, Path | bytes], message: str, private: bool) -> str:
    """The commit (its hash) that holds the content."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    head = str(api.repo_info(repo).sha)
    held = {entry.path: entry for entry in api.list_repo_tree(repo, revision=head, recursive=True)}
    changed = [name for name in sorted(content, key=_order) if not _same(content[name], held.get(name))]
    if not changed:
        return head
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content[name]) for name in changed]
    weights = [operation for operation in operations if operation.path_in_repo.endswith(".safetensors")]
    if weights:
        api.preupload_lfs_files(repo, additions=weights, free_memory=False)
    return str(api.create_commit(repo, operations, commit_message=message, parent_commit=head).oid)


def _name(api: HfApi, repo: str, oid: str, tag: str, message: str) -> None:
    """Have the tag name the commit; a run may evaluate as many experts a second time, when some were taken out."""
    named = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
    if tag in named and named[tag] != oid:
        api.delete_tag(repo, tag=tag)
    if named.get(tag) != oid:
        api.create_tag(repo, tag=tag, revision=oid, tag_message=message)


def _order(name: str) -> tuple[int, str]:
    """Weights first, the index and then the manifest last."""
    last = {INDEX_FILE: 2, MANIFEST_FILE: 3}
    return (0 if name.endswith(".safetensors") else last.get(name, 1), name)


@contextmanager
def _pinned(model_dir: Path) -> Iterator[dict[str, Path]]:
    """The directory's files by name, held still by hard links while an assembly goes on replacing them."""
    files = [path for path in sorted(model_dir.iterdir())
             if path.is_file() and not path.name.startswith(".") and path.suffix != TEMPORARY_SUFFIX]  # fmt: skip
    for left in model_dir.parent.glob(".push-*-*"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        holder = tempfile.TemporaryDirectory(prefix=f".push-{os.getpid()}-", dir=model_dir.parent)
    except OSError:  # the directory beside the model is not ours to write: then nobody assembles there either
        yield {path.name: path for path in files}
        return
    with holder as name:
        yield {path.name: _link(path, Path(name) / path.name) for path in files}


def _link(source: Path, target: Path) -> Path:
    try:
        os.link(source, target)
    except OSError:
        return source
    return target


def _same(content: Path | bytes, entry: Any) -> bool:
    """Whether the repo's file has these bytes: compared by sha256 if it is a large file there, else by git's hash."""
    if entry is None or getattr(entry, "blob_id", None) is None:
        return False
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if entry.size != size:
        return False
    if entry.lfs is not None:
        sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else hash_file(content)
        return bool(sha256 == entry.lfs.sha256)
    data = content if isinstance(content, bytes) else content.read_bytes()
    return bool(hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False).hexdigest() == entry.blob_id)


def _root(error: BaseException) -> BaseException:
    """The HTTP error that the library wrapped, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (_HTTP_ERROR, OfflineModeIsEnabled)):
            return cause
        cause = cause.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _PASSING
    # What is left of the HTTP client's errors never got an answer: no route, refused, cut off, timed out.
    return isinstance(error, _HTTP_ERROR)


def _sentence(error: BaseException, repo: str, endpoint: str) -> HubError:
    status = _status(error)
    if isinstance(error, HFValidationError):
        reason = "that is no name of a repo; it must look like USER/REPO"
    elif isinstance(error, LocalTokenNotFoundError):
        reason = _REASONS[401]
    elif isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set; unset it to go online"
    elif status is not None and status >= 500:
        reason = f"the Hub has a fault of its own (HTTP {status}); push again later"
    elif status is not None:
        reason = _REASONS.get(status, f"the Hub refused the request (HTTP {status})")
    elif isinstance(error, _HTTP_ERROR):
        reason = f"{endpoint} cannot be reached; check the network and push again"
    else:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return HubError(f"Cannot push to {repo}: {reason}.", detail=str(error))
