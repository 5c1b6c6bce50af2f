"""The scene, for every test here that asks for it."""

from tests.backends.scene import scene

__all__ = ["scene"]
