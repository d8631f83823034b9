"""`hf:ORG/NAME[@REVISION][:GLOB]` -> a local folder with a data set's Parquet files, through huggingface_hub.

Parquet only: no loading script, no pickle. A data set that has none in the asked revision is taken from the
branch the Hub keeps converted (refs/convert/parquet). HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE
work as everywhere.
"""

from __future__ import annotations

import fnmatch
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caravan.types import UserError

NAME = re.compile(r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<files>[\w./*?-]+))?")
CONVERTED = "refs/convert/parquet"


def parse(reference: str) -> tuple[str, str | None, str]:
    """`hf:ORG/NAME@REV:GLOB` -> ("ORG/NAME", "REV" or None, glob of files). UserError for anything else."""
    found = NAME.fullmatch(reference)
    if not found or ".." in reference:
        hint = "write hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME:train/*.parquet"
        raise UserError(f"'{reference}' is not a data set's Hub id", hint)
    return found["repo"], found["revision"], found["files"] or "*"


@contextmanager
def fetched(reference: str) -> Iterator[Path]:
    """A folder with (links to) the Parquet files asked for, downloading what is missing; gone afterwards.

    Raises UserError when the id is malformed, unknown or gated, when the network is out of reach, or when
    there is no Parquet file.
    """
    repo, revision, files = parse(reference)
    pattern = files if files.endswith(".parquet") else f"{files}.parquet"
    for version in (revision,) if revision else (None, CONVERTED):
        folder = _download(repo, version, pattern)
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet")] if folder else []
        chosen = fnmatch.filter(sorted(names), pattern)  # earlier downloads lie in the same folder
        if folder and chosen:
            with tempfile.TemporaryDirectory() as view:
                for name in chosen:
                    link = Path(view, name)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to((folder / name).resolve())
                yield Path(view)
            return
    raise UserError(
        f"{repo} has no Parquet file that fits {pattern}", "download it yourself and give the folder"
    )


def _download(repo: str, revision: str | None, pattern: str) -> Path | None:
    """The snapshot's folder; None if there is no such revision and none was asked for."""
    from huggingface_hub import errors, snapshot_download  # late: nobody else pays for it

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    page = f"{endpoint}/datasets/{repo}"
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[pattern]))
    except errors.GatedRepoError:
        raise UserError(f"{repo} is gated", f"accept its terms at {page}, then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        if revision == CONVERTED:
            return None
        raise UserError(f"{repo} has no revision '{revision}'", f"see {page}/tree/main") from None
    except errors.RepositoryNotFoundError:
        hint = "check the spelling; private data sets need HF_TOKEN"
        raise UserError(f"{endpoint} has no data set '{repo}' that you may read", hint) from None
    except errors.LocalEntryNotFoundError:
        if revision == CONVERTED:
            return None
        hint = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder instead"
        raise UserError(f"cannot reach {endpoint} and {repo} is not in the local cache", hint) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"downloading {repo} failed: {error}", "try again; what arrived is kept") from None
