"""What a task shows the transformer: from a Song to its conditions on the device."""

from soundstage_dit.song import Song
from soundstage_dit.trajectory import Conditions, Prepared
from soundstage_dit.weights import LoadedModel


def prepare(song: Song, model: LoadedModel) -> Prepared:
    """Encode a song's words, codes and sources. One song at a time, so that none changes another."""
    memory = model.dit.remember(model.conditioner.encode(song))
    return Prepared(
        channels=model.channels, conditional=Conditions(context=model.conditioner.context(song), memory=memory)
    )
