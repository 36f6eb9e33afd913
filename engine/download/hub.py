"""A model or data set of the Hugging Face Hub: what it lists at one commit, as files to fetch.

`huggingface_hub` knows the Hub: its address (HF_ENDPOINT), the token (HF_TOKEN, or that of a login), names, listings and refusals.
The files themselves are fetched by `engine/download/remote_files.py`: `huggingface_hub` 2.4 deletes what a stopped process had of a
file, and writes what a server sends beyond the listed size.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from engine.download.remote_files import RemoteFile, fetch, is_safe_name
from engine.errors import InputError
from engine.http_session import HTTPSession, is_web_address, shown_address
from engine.progress import progress

PAUSE = 1.0  # seconds, see HTTPSession
TIMEOUT = 60.0  # seconds
MOST_FILES = 2_000_000
ENDPOINT = constants.ENDPOINT


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub; `kind` is "model" or "dataset", `name` OWNER/NAME. `token` None: the user's own, if there is one."""

    kind: str
    name: str
    token: str | None = None
    prefix: ClassVar[str] = ""  # as a bucket has one

    def __post_init__(self) -> None:
        if not is_web_address(ENDPOINT):
            raise InputError(f"HF_ENDPOINT {shown_address(ENDPOINT)}: not the address of a Hub (expected https://HOST)")
        token = self.token or get_token()
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise InputError("--token (or HF_TOKEN): expected printable ASCII without spaces, as hf_...")  # never the token itself
        object.__setattr__(self, "token", token or None)

    def __repr__(self) -> str:
        return f"Repository({self.kind!r}, {self.name!r})"  # without the token

    @property
    def shown(self) -> str:
        """The repository as it may be shown."""
        return self.name[:200]

    def files(self, include: str = "") -> list[RemoteFile]:
        """All files whose path begins with `include`, or is like that pattern (`*.json`), at the newest commit of the main branch.

        InputError if the repository cannot be read, or lists a path outside a folder, one path twice, or too many of them.
        """
        session, found = self._session(), dict[str, RemoteFile]()
        try:
            api = HfApi(endpoint=ENDPOINT, token=self.token or False)
            get_session().timeout = TIMEOUT
            commit = api.repo_info(self.name, repo_type=self.kind, timeout=TIMEOUT).sha
            if not isinstance(commit, str):
                raise ValueError("it names no commit")
            entries = islice(api.list_repo_tree(self.name, repo_type=self.kind, revision=commit, recursive=True), MOST_FILES + 1)
            for count, entry in enumerate(progress(entries, desc="listing", unit=" files")):
                if count >= MOST_FILES:
                    raise ValueError(f"it lists more than {MOST_FILES:,} files")
                if isinstance(entry, RepoFile) and (entry.path.startswith(include) or fnmatchcase(entry.path, include)):
                    file = self._remote_file(entry, commit)
                    if file.name in found:
                        raise ValueError(f"it lists {file.name[:80]!r} twice")
                    found[file.name] = file
        except OfflineModeIsEnabled:
            raise InputError(f"{self.name}: HF_HUB_OFFLINE is set, so nothing can be fetched (expected it unset)") from None
        except HFValidationError:
            raise InputError(f"{self.shown}: no name of the Hub (expected OWNER/NAME)") from None
        except HfHubHTTPError as error:
            raise InputError(self._refusal(error, session)) from None
        except (httpx2.RequestError, OSError) as error:
            reason = session.hide(str(error)) or type(error).__name__
            raise InputError(f"{session.url}: cannot be reached: {reason}") from None
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
            raise InputError(f"{session.url}: does not answer as the Hub does: {session.hide(str(error))[:200]}") from None
        return list(found.values())

    def fetch(self, files: list[RemoteFile], folder: str | Path, **options: Any) -> dict[str, int]:
        """`remote_files.fetch` of files that this repository lists. Redirects are followed, without the token elsewhere."""
        return fetch(files, folder, self._session(), follow_redirects=True, **options)

    def _session(self) -> HTTPSession:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return HTTPSession(ENDPOINT, timeout=TIMEOUT, pause=PAUSE, headers=headers)

    def _remote_file(self, entry: RepoFile, commit: str) -> RemoteFile:
        size = entry.lfs.size if entry.lfs else entry.size
        digest = ("sha256", entry.lfs.sha256) if entry.lfs else ("git", entry.blob_id)
        if not (isinstance(size, int) and 0 <= size < 10**15 and all(isinstance(part, str) for part in digest)):
            raise ValueError(f"it lists {str(entry.path)[:80]!r} with the size {str(size)[:80]}")
        if not is_safe_name(entry.path):
            raise InputError(f"{self.name}: lists {entry.path[:80]!r} (expected paths that stay inside a folder)")
        url = hf_hub_url(self.name, entry.path, repo_type=self.kind, revision=commit, endpoint=ENDPOINT)
        return RemoteFile(entry.path, url.removeprefix(ENDPOINT), size, digest)

    def _refusal(self, error: HfHubHTTPError, session: HTTPSession) -> str:
        """What the Hub's refusal means, in one line."""
        status, what = error.response.status_code, f"{self.kind} {self.name}".replace("dataset", "data set")
        if isinstance(error, GatedRepoError):
            mend = "of an account that has done so" if self.token else "(--token or HF_TOKEN)"
            return f"{what}: is gated: its terms are accepted at {session.url}/{self._page()}, then it takes a token {mend}"
        if isinstance(error, RepositoryNotFoundError):
            private = "this token may not see it" if self.token else "it is private and takes --token or HF_TOKEN"
            return f"{what}: not on {session.url} (HTTP {status}), or {private}"
        if status == 401:
            return f"{what}: the token is not accepted by {session.url} (HTTP 401; expected a valid --token or HF_TOKEN)"
        said = session.hide(error.server_message or error.response.reason_phrase)[:200]
        return f"{what}: refused by {session.url}: HTTP {status} {said}"

    def _page(self) -> str:
        return f"datasets/{self.name}" if self.kind == "dataset" else self.name
