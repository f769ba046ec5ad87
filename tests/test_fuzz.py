"""A fixed small set of altered files on each run (``make fuzz`` tries 100,000), and what the fuzzer itself would notice."""

import pytest

from cmlib.lab import files, fuzz


def test_altered_files_are_refused_or_are_networks():
    found = fuzz.run(480, seed=1)
    assert sum(found.values()) == 480 and found["as it lies", "refused"] == 240
    assert found["sealed", "refused"] > 60 and found["sealed", "loaded"] > 10  # the decoders are reached, and answer both ways


def test_the_files_are_the_same_each_time_and_none_is_whole():
    first, again = (list(fuzz.altered(64, seed=3)) for _ in range(2))
    assert first == again and first != list(fuzz.altered(64, seed=4))
    assert {name.rpartition(", ")[0] for name, _ in first} == set(fuzz.subjects())
    assert len({raw for _, raw in first}) > 60


@pytest.mark.parametrize(
    ("place", "name", "other", "said"),
    [
        (files, "_digest", lambda header, tensors: "always the same", "loaded though its bytes are altered"),
        (fuzz, "SECONDS", 0.0, "it took"),
        (fuzz, "MEMORY", 0, "it claimed"),
        (fuzz, "load", lambda path: fuzz.compress(fuzz.build("cnn", "digits"), "vq_gong", k=2), "AttributeError"),
        (fuzz, "load", lambda path: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["no hash", "slow", "greedy", "another network", "another error"],
)
def test_what_goes_wrong_is_noticed_and_can_be_made_again(monkeypatch, place, name, other, said):
    monkeypatch.setattr(place, name, other)
    with pytest.raises(AssertionError, match=rf"file \d+ of seed 5 \(.*\).*{said}"):
        fuzz.run(200, seed=5)
