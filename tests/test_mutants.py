"""The mutants of ``make mutants`` fit the tree as it is, and no row of the list of bugs is without one."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.mutants.record import OTHER, complaints, exists
from tests.mutants.rows import MUTANTS, ROWS


def test_every_mutant_fits_the_tree_and_names_tests_that_exist():
    assert complaints(MUTANTS) == []
    assert [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1] == []


def test_every_row_of_the_list_has_a_mutant():
    assert {m.row for m in MUTANTS} - {OTHER} == set(ROWS)


def test_a_stale_mutant_is_named():
    mutant = MUTANTS[0]
    stale = replace(mutant, old="no such text", tests=("tests/test_mutants.py::test_nothing",))
    assert complaints([stale]) == [
        f"{mutant.name}: its old text occurs 0 times in {mutant.file}; write it anew",
        f"{mutant.name}: no test tests/test_mutants.py::test_nothing",
    ]
    with pytest.raises(ValueError, match="occurs"):
        replace(mutant, old="\n").mutated()
    assert exists("tests/test_mutants.py::test_a_stale_mutant_is_named[any]")
