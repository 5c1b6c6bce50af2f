"""Builds every kustomization of the tree: `python -m tests.kustomize`. Without Go it says so, and is no failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.peers import build

PEER = "kustomize"
ROOT = Path(__file__).parents[1]
FOLDERS = ("collector-config", "deploy")


def kustomizations() -> list[Path]:
    """Name the folders that can be built or applied by themselves."""
    return sorted(path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("kustomization.yaml"))


def main() -> int:
    """Build all; answers 1 if one cannot be built."""
    lacking = build.find_go(PEER)
    if isinstance(lacking, str):
        print(f"kustomize build is left out: {lacking}", file=sys.stderr)
        return 0
    (program,) = build.programs(PEER)
    folders = kustomizations()
    failed = [
        folder
        for folder in folders
        if subprocess.run([str(program), "build", str(folder)], stdout=subprocess.DEVNULL, check=False).returncode
    ]
    print(f"kustomize build: {len(folders) - len(failed)} of {len(folders)} folders are well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
