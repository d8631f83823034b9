"""`hf:ORG/NAME[@REVISION]` -> a local folder, through huggingface_hub's cache.

Only weights in safetensors, JSON, tokenizer files, chat templates and what says the licence are asked for: no
code, no pickle.
HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as everywhere. Nothing here runs unless an `hf:` id
asks for it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from caravan.types import UserError

ALLOWED = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "ice_text.model",
    "*.tiktoken",
    "rwkv_vocab*.txt",
    "vocab.txt",
    "*.jinja",
    "README.md",
    "LICENSE*",
]
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
NAME = re.compile(r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


def parse(reference: str) -> tuple[str, str | None]:
    """`hf:ORG/NAME@REV` -> ("ORG/NAME", "REV" or None). Raises UserError for anything else."""
    found = NAME.fullmatch(reference)
    if not found or ".." in reference:
        raise UserError(f"'{reference}' is not a Hub id", "write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    return found["repo"], found["revision"]


def fetch(reference: str, weights: bool = True) -> Path:
    """Download what is missing of `hf:ORG/NAME[@REVISION]` and return the local folder; without `weights`
    only the small files.

    Raises UserError when the id is malformed, unknown or gated, when the network is out of reach, or when the
    repository has no safetensors.
    """
    repo, revision = parse(reference)
    from huggingface_hub import errors, snapshot_download  # late: nobody else pays for it

    wanted = [name for name in ALLOWED if weights or name not in WEIGHTS]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        raise UserError(
            f"{repo} is gated", f"accept its terms at {endpoint}/{repo}, then set HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo} has no revision '{revision}'", f"see {endpoint}/{repo}/tree/main") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{endpoint} has no model '{repo}' that you may read",
            "check the spelling; private models need HF_TOKEN",
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"cannot reach {endpoint} and {repo} is not in the local cache",
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder instead",
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f"downloading {repo} failed: {error}", "try again; what has arrived is kept"
        ) from None
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(f"{repo} has no .safetensors file", "other formats can run code and are not loaded")
    return folder
