"""Different names stay different in MLflow, ordinary ones are unchanged, all can be read back."""

from __future__ import annotations

import posixpath
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arrowhead.tracking.names import MAX_NAME_CHARS, mlflow_name, mlflow_names, original

HOSTILE_NAMES = st.text(st.sampled_from("ab_xX0123F/. ?#:$<ü猫😀\n"), max_size=12) | st.text(
    max_size=12
)


@given(HOSTILE_NAMES)
@example("")
@example("_x3F_")
@example("_x3F?")
@example("_xx0123456789abcdef")
def test_escaped_name_is_valid_in_mlflow_and_reversible(name):
    result = mlflow_name(name)
    assert re.fullmatch(r"[/\w.\- ]+", result)  # also on Windows
    assert posixpath.normpath(result) == result
    assert not result.startswith(("..", "/"))
    if "_xx" not in name:
        assert original(result) == name


def mysql_collation_key(name: str) -> str:
    """The name as MySQL compares it, without case and accents."""
    apart = unicodedata.normalize("NFKD", name).casefold()
    return "".join(one for one in apart if not unicodedata.combining(one))


@given(st.lists(st.text("ab/?_xF3", max_size=400), unique=True, max_size=20))
def test_different_names_stay_different_at_any_length(names):
    result = [mlflow_name(name) for name in names]
    assert len(set(result)) == len(names)
    assert max(map(len, result), default=0) <= MAX_NAME_CHARS


@pytest.mark.parametrize(
    "names",
    [
        ["recall.Dog", "recall.dog", "recall.DOG", "recall.cat"],
        ["Größe", "große", "GROSSE", "grosse"],
        ["_x44_og", "Dog", "dog", "Dög"],
    ],
)
def test_names_equal_to_mysql_stay_distinct_and_are_read_back(names):
    result = mlflow_names(names)
    assert len({mysql_collation_key(name) for name in result.values()}) == len(names)
    assert [original(result[name]) for name in names] == names
    assert all(result[name] == name for name in names if name == "recall.cat")


@given(st.lists(st.lists(st.sampled_from(["Dog", "dog", "DOG", "dög", "Dög", "cat"]), max_size=3)))
def test_names_keep_their_form_across_writes_and_stay_distinct_on_mysql(writes):
    taken, forms = {}, {}
    for names in writes:
        for name, result in mlflow_names(names, taken).items():
            assert forms.setdefault(name, result) == result
            assert original(result) == name
    assert len({mysql_collation_key(made) for made in forms.values()}) == len(forms)


@pytest.mark.parametrize(
    "name", ["train_loss", "progress.seconds.decode", "system/cpu", "labels.Saint Bernard", "f-2"]
)
def test_ordinary_name_is_unchanged(name):
    assert mlflow_name(name) == name


def test_long_name_keeps_its_beginning_and_stays_unique():
    first, second = "labels." + "ü" * 300 + "a", "labels." + "ü" * 300 + "b"
    assert mlflow_name(first).startswith("labels.üüü")
    assert mlflow_name(mlflow_name(first)) != mlflow_name(first) != mlflow_name(second)
