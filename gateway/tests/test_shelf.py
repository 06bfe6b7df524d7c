"""What is kept on a shelf, and for how long."""

from pathlib import Path

from soundstage_gateway.shelf import Shelf


def test_a_place_with_nothing_in_it_is_gone_with_its_last_holder(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, limit_bytes=100)
    with shelf.hold("a-0-wav") as place:
        with shelf.hold("a-0-wav"):
            pass
        assert place.folder.exists()
    assert list(tmp_path.iterdir()) == []
    with shelf.hold("a-0-wav") as place:
        (place.folder / "audio").write_bytes(bytes(10))
    assert (shelf.size_bytes, list(tmp_path.iterdir())) == (10, [place.folder])


def test_a_song_that_is_removed_stays_for_those_who_hold_it(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, limit_bytes=100)
    for name in ("a-0-wav", "a-1-wav", "b-0-wav"):
        with shelf.hold(name) as place:
            (place.folder / "audio").write_bytes(bytes(10))
    with shelf.hold("a-1-wav") as place:
        shelf.remove("songs/a")
        assert (place.folder / "audio").stat().st_size == 10
        assert not (tmp_path / "a-0-wav").exists()
    assert [folder.name for folder in tmp_path.iterdir()] == ["b-0-wav"]
    assert shelf.size_bytes == 10
