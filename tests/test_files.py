"""Files that are read and written whole."""

import pytest

from solo_ext.errors import CheckpointError
from solo_ext.files import read_json


def test_a_file_of_json_is_an_object_or_damaged(tmp_path):
    path = tmp_path / "x.json"
    assert read_json(path) is None
    for content in ("{", "[1]", "\xff", '{"results": {}}'):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"x.json is damaged: [^\n]*$"):
            read_json(path, results=list)
