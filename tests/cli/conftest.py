"""A recording of ten stories, made by the command line."""

import itertools

import pytest
from command_line import run


@pytest.fixture(scope="package")
def stories(tinystories, tmp_path_factory):
    """Ten stories as a file."""
    path = tmp_path_factory.mktemp("cli") / "ten.jsonl"
    with tinystories.open() as lines:
        path.write_text("".join(itertools.islice(lines, 10)))
    return path


@pytest.fixture(scope="package")
def recorded(stories260k, stories):
    """The store of ten stories, and the exit code and output of its recording."""
    store = stories.parent / "ten.acts"
    return store, run("record", stories260k, stories, "--out", store)


@pytest.fixture(scope="package")
def store(recorded):
    return recorded[0]
