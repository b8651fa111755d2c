"""The same runs as in tests/distributed."""

from tests.distributed.conftest import clips, shared_cache, tiny, workspace

__all__ = ["clips", "shared_cache", "tiny", "workspace"]
