"""The texts that training shows for an item, and which of them is shown when.

A caption goes through these steps, each of which is left out unless it is asked for: its choices are made (``wildcards``), its tags
are shuffled and some left out, a missing trigger word is added, then prefix and suffix.  What comes out is a *variant*.  Only so
many variants of an item exist, so that each is encoded before training and once: which they are depends on the seed and the item,
and which of them is shown on the seed, the epoch and the place in it.  The empty caption of ``caption_dropout`` is none of them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

from utils.config.schema import DatasetConfig
from utils.data.captions import wildcards
from utils.data.values import Caption, Sample
from utils.draw import Draw, seed_from

_TRIES = 8
"""How often a variant is drawn, on average at most, to find one that is not there yet."""


def first_caption(captions: Sequence[Caption], settings: DatasetConfig) -> str:
    """What evaluation shows: the first caption with the first option of each choice, its tags as they are written."""
    return finished(_expanded(captions[0].text, settings, None), settings)


def variants(captions: Sequence[Caption], item: str, seed: int, settings: DatasetConfig) -> tuple[Caption, ...]:
    """Every text that training may show for an item, with weights that add up to the captions'.

    A caption that is always the same is one variant.  The others share what is left of ``caption_variants``, by weight and one at
    least each: for each the first different texts of a sequence that depends on the seed, the item and the caption alone.  So a
    larger ``caption_variants`` keeps the variants that there are, and a changed caption those of the others.
    """
    varying = {caption.text: caption.weight for caption in captions if _varies(caption.text, settings)}
    room = settings.caption_variants - (len(captions) - len(varying))
    numbers = dict(zip(varying, _shared(room, list(varying.values())), strict=True))
    found: dict[str, float] = {}
    for caption in captions:
        drawn = _drawn(caption.text, numbers[caption.text], item, seed, settings) if caption.text in numbers else {caption.text: 1}
        for text, times in drawn.items():
            text = finished(text, settings)
            found[text] = found.get(text, 0.0) + caption.weight * times / sum(drawn.values())
    return tuple(Caption(text, weight) for text, weight in found.items())


def _shared(total: int, weights: list[float]) -> list[int]:
    """``total`` divided by the weights, at least 1 for each."""
    numbers = [1] * len(weights)
    for _ in range(total - len(weights) if weights else 0):
        numbers[max(range(len(weights)), key=lambda place: weights[place] / numbers[place])] += 1
    return numbers


def _drawn(text: str, number: int, item: str, seed: int, settings: DatasetConfig) -> dict[str, int]:
    """The first ``number`` different variations of a caption, and how often each came up.

    ``random()`` of Python's generator is the same in all versions, which is not promised of its other methods.
    """
    random = Random(seed_from(seed, item, text, "caption variants"))
    found: dict[str, int] = {}
    for _ in range(_TRIES * number):
        variation = _tags_varied(_expanded(text, settings, random), settings, random)
        found[variation] = found.get(variation, 0) + 1
        if len(found) == number:
            break
    return found


def may_vary(settings: DatasetConfig) -> bool:
    """Whether there is a setting that can make more than one text of a caption."""
    return settings.caption_wildcards or settings.shuffle_tags or settings.tag_dropout > 0


def _varies(text: str, settings: DatasetConfig) -> bool:
    if settings.caption_wildcards and wildcards.varies(wildcards.parse(text)):
        return True
    if not (settings.shuffle_tags or settings.tag_dropout):
        return False
    loose = len(tags_in(_expanded(text, settings, None), settings.tag_delimiter)) - settings.keep_tokens
    return loose > 1 or (loose == 1 and settings.tag_dropout > 0)


def _expanded(text: str, settings: DatasetConfig, random: Random | None) -> str:
    return wildcards.resolve(wildcards.parse(text), random).strip() if settings.caption_wildcards else text


def _tags_varied(text: str, settings: DatasetConfig, random: Random) -> str:
    if not (settings.shuffle_tags or settings.tag_dropout):
        return text
    tags = tags_in(text, settings.tag_delimiter)
    varied = vary_tags(tags, settings.keep_tokens, settings.shuffle_tags, settings.tag_dropout, random)
    return settings.tag_delimiter.join(varied)


def tags_in(text: str, delimiter: str) -> list[str]:
    """The tags between delimiters, without the spaces around them, and without empty ones."""
    return [tag for part in text.split(delimiter.strip() or None) if (tag := part.strip())]


def vary_tags(tags: Sequence[str], keep: int, shuffle: bool, dropout: float, random: Random) -> list[str]:
    """The first ``keep`` tags as they are; each of the others left out with probability ``dropout``, the rest shuffled if asked."""
    loose = [tag for tag in tags[keep:] if random.random() >= dropout]
    if shuffle:
        places = {place: random.random() for place in range(len(loose))}
        loose = [loose[place] for place in sorted(places, key=lambda place: places[place])]
    return [*tags[:keep], *loose]


def finished(text: str, settings: DatasetConfig) -> str:
    """With the trigger word, if it is missing in the whole as a word of its own in any case, and with prefix and suffix."""
    prefix, suffix, trigger = settings.caption_prefix, settings.caption_suffix, settings.trigger_word
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", prefix + text + suffix, re.IGNORECASE):
        text = trigger + settings.tag_delimiter + text if text else trigger
    return prefix + text + suffix


# ── what is encoded and shown ─────────────────────────────────────────────────────────────────────────────────────────────────


def texts_of(sample: Sample) -> Iterable[str]:
    """The captions that training may show with a sample, each once: what has to be encoded."""
    if not sample.captions and not sample.caption_dropout:
        return (sample.caption,)
    texts = dict.fromkeys(caption.text for caption in sample.captions) or {sample.caption: None}
    return texts | {"": None} if sample.caption_dropout else texts


def as_shown(sample: Sample, place: str, draw: Draw) -> Sample:
    """The sample with the caption that a run shows at a place of an epoch, ``<sample key>#<occurrence>``."""
    if sample.caption_dropout and draw.quantile(place, "caption dropout") < sample.caption_dropout:
        return with_caption(sample, "")
    if not sample.captions:
        return sample
    weights = [caption.weight for caption in sample.captions]
    return with_caption(sample, sample.captions[wildcards.place_of(draw.quantile(place, "caption"), weights)].text)


def with_caption(sample: Sample, text: str) -> Sample:
    return sample if text == sample.caption else replace(sample, caption=text)
