"""A tokenizer for data that comes with none: learned from its captions once, and kept in the cache."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mmjax import files
from mmjax.data import text
from mmjax.data.pipeline import captions_of
from mmjax.data.sources import Source
from mmjax.errors import RecordError
from mmjax.files import Progress

MOST_RECORDS = 100_000  # evenly spaced over each source; a vocabulary needs no more
_VERSION = 1  # raise it when other tokens would be learned from the same captions


def learn(opened: Mapping[str, Source], groups: Sequence[str], vocab_size: int, progress: Progress) -> Path:
    """The `tokenizer.json` of a byte-level BPE vocabulary of these sources' captions.

    Args:
      opened: the sources of a stream.
      groups: which captions; () for all.
      vocab_size: tokens at the most.
      progress: shows the reading of the captions.

    Raises:
      UserError: the cache cannot be written.
    """
    fingerprints = [source.fingerprint for source in opened.values()]
    name = files.fingerprint("bpe", _VERSION, fingerprints, tuple(groups), vocab_size)
    path = files.cache_folder("tokenizers", name) / "tokenizer.json"
    if path.exists():
        return path
    captions = [caption for source in opened.values() for caption in _captions(source, groups, progress)]
    with files.replacing(path) as temporary:
        text.train_bpe(captions, vocab_size, temporary)
    return path


def _captions(source: Source, groups: Sequence[str], progress: Progress) -> Iterable[str]:
    step = -(-len(source) // MOST_RECORDS)
    chosen = range(0, len(source), step)
    for index in progress(chosen, len(chosen), f"reading the captions of {len(chosen):,} records for a vocabulary"):
        try:
            yield from captions_of(source[index], groups)
        except RecordError:  # training counts these
            continue
