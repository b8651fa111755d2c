"""How many samples travel through the pipeline together: a number, or as many as a budget of tokens has room for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.data.values import Bucket, SizeRules


@dataclass(frozen=True)
class BatchSizes:
    """The number of samples of a micro-batch, by bucket."""

    clips: int = 1
    pictures: int | None = None
    """Of buckets of one frame; None: as of clips."""
    max_tokens: int | None = None
    """Instead of both: as many samples as have no more tokens than this together, and one at least."""
    rules: SizeRules | None = None
    """Tells the tokens of a bucket; needed for ``max_tokens``."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], rules: SizeRules | None) -> "BatchSizes":
        """``settings``: those of the main file, by name; what is not set may be missing."""
        return cls(
            settings["micro_batch_size_per_gpu"],
            settings.get("image_micro_batch_size_per_gpu"),
            settings.get("max_tokens_per_micro_batch"),
            rules,
        )

    def of_bucket(self, bucket: Bucket) -> int:
        if self.max_tokens is not None:
            return max(1, self.max_tokens // self.rules.tokens(bucket))
        return self.pictures if self.pictures is not None and bucket.frames == 1 else self.clips

    def tokens(self, bucket: Bucket) -> int | None:
        """Of a sample in the model; None where the rules are not known."""
        return self.rules.tokens(bucket) if self.rules else None

    def problem(self, bucket: Bucket) -> str | None:
        """Why the bucket does not keep to the budget, or None if it does."""
        if self.max_tokens is None or (tokens := self.rules.tokens(bucket)) <= self.max_tokens:
            return None
        return (
            f"a sample of {bucket} has {tokens} tokens, more than max_tokens_per_micro_batch = {self.max_tokens}: "
            "its micro-batches have one sample each, and need the memory of so many tokens"
        )
