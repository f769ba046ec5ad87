"""The planted faults stand where they say, and no method is without one. That each is noticed, ``python -m cmlib mutants`` shows."""

import pytest
from mutants import ROOT, caught_by, copy_of, listed

from cmlib.methods import catalog

MUTATIONS = list(listed())


@pytest.mark.parametrize("key", catalog())
def test_every_method_has_a_fault_to_be_caught(key):
    mine = [m for m in MUTATIONS if m.key == key]
    assert mine, f"no planted fault for {key}"
    assert all(m.text != m.replaced and m.fault for m in mine)


def test_no_fault_is_planted_in_a_method_that_is_not_there():
    assert {m.key for m in MUTATIONS} <= set(catalog())


def test_a_planted_fault_is_noticed_and_taken_out_again(tmp_path):
    mutation = next(m for m in MUTATIONS if m.key == "flexpoint")  # its oracles are quick
    tree = copy_of(ROOT, tmp_path)
    before = (tree / mutation.file).read_text()
    assert caught_by(mutation, tree).startswith("test_")
    assert (tree / mutation.file).read_text() == before
    assert not caught_by(mutation._replace(replaced=mutation.text), tree)
