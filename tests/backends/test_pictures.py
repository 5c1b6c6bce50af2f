"""The pictures can be drawn from the scene as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.backends import pictures
from tests.backends.scene import needs_scene

if TYPE_CHECKING:
    from pathlib import Path

    from tests.backends.scene import Scene

pytestmark = needs_scene

MOST_BYTES = 100_000


def test_the_pictures_of_the_readme(scene: Scene, tmp_path: Path) -> None:
    """Those that are kept in the tree, each a small PNG."""
    drawn = pictures.draw(scene, tmp_path)
    assert {path.name for path in drawn} == {path.name for path in pictures.FOLDER.glob("*.png")}
    for path in (*drawn, *pictures.FOLDER.glob("*.png")):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < MOST_BYTES
