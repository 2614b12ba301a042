"""A recipe's training clips, as they are streamed."""

from __future__ import annotations

from sailer.data.corpora.hub_stream import stream_source
from sailer.data.sampler import PlannedDataset
from sailer.data.streaming import StreamedClips
from sailer.settings import Settings


def streamed_clips(planned: PlannedDataset, settings: Settings) -> StreamedClips:
    """The training clips of this process.

    Args:
        planned: the clips' annotations, with the places of their recordings.
        settings: of the run, whose corpus is streamed.
    """
    data, args = settings.data, settings.training
    assert data.data_dir is not None, "check_settings refuses streaming without it"
    return StreamedClips(
        planned,
        stream_source(data.data_dir, data.train_split, **data.corpus_options),
        batch_size=args.train_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        index=args.process_index,
        size=args.world_size,
        buffer=data.streaming_buffer,
    )
