"""Fetch a checkpoint from the Hugging Face hub: ``python -m gpu_worker.models.hub_model owner/name``.

Started by launch.py; its last line on stdout is the local directory, or with exit code 1 the
reason why there is none.  Honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import sys

from protocol.parent_death import die_with_parent

# What an engine reads; not the copies in other formats that many repositories hold.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def fetch(repository: str) -> str:
    """The directory of ``repository``; raises OSError or ValueError with the reason."""
    from huggingface_hub import snapshot_download  # comes with transformers

    return snapshot_download(repository, allow_patterns=PATTERNS)


def main() -> int:
    die_with_parent()
    repository = sys.argv[1]
    try:
        print(fetch(repository))
    except Exception as error:  # the library raises many kinds: offline, unknown, gated, disk
        reason = str(error).strip().splitlines()
        print(f"{repository!r} could not be fetched from the hub: {reason[0] if reason else type(error).__name__}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
