"""What clients use: names only, bounded."""

import json

from engines.yard.usage import MOST_FIELDS, MOST_PATHS, Usage


def test_it_is_kept_and_bounded(tmp_path):
    file = tmp_path / "usage.json"
    usage = Usage(file)
    for n in range(1000):
        usage.note(f"/path{n}", [f"field{n}", "x" * 100, "with space", "ä", ""])
    usage.note("/" + "x" * 500)
    usage.note("/a b")
    usage.save()
    again = Usage(file)
    assert (len(again.paths), len(again.fields)) == (MOST_PATHS, MOST_FIELDS)
    again.note("/path0", ["field0"])
    assert (again.paths["/path0"], again.fields["field0"]) == (2, 2)


def test_a_file_that_is_broken_is_no_obstacle(tmp_path):
    for text in ("", "[]", "{", '{"paths": 3, "fields": {}}', json.dumps({"paths": {"/a": "x"}, "fields": {}})):
        file = tmp_path / "usage.json"
        file.write_text(text)
        assert Usage(file).paths == {}
