"""What clients use: names only, bounded."""

import json

from engines.yard.usage import MOST_FIELDS, MOST_PATHS, Usage


def test_it_is_kept_and_bounded(tmp_path):
    usage = Usage(tmp_path)
    usage.note("/path0", ["field0"])
    usage.note("/path0", ["field0"])
    for n in range(1000):
        usage.note(f"/path{n}", [f"field{n}", "x" * 100, "with space", "ä", ""])
    usage.note("/" + "x" * 500)
    usage.note("/a b")
    usage.save()
    again = Usage(tmp_path)
    assert (len(again.paths), len(again.fields)) == (MOST_PATHS, MOST_FIELDS)
    assert (again.paths["/path0"], again.fields["field0"]) == (3, 3)
    assert "/path999" in again.paths


def test_one_request_with_many_fields_is_counted_in_part(tmp_path):
    """Names that were sent once give way; those in use stay."""
    usage = Usage(tmp_path)
    for _ in range(2):
        usage.note("/a", ["temperature"])
    for n in range(50):
        usage.note("/a", (f"f{n}_{k}" for k in range(1_000_000)))
    usage.note("/a", ["top_k"])
    assert len(usage.fields) == MOST_FIELDS
    assert (usage.fields["temperature"], usage.fields["top_k"]) == (2, 1)


def test_a_file_that_is_broken_is_no_obstacle(tmp_path):
    for text in ("", "[]", "{", '{"paths": 3, "fields": {}}', json.dumps({"paths": {"/a": "x"}, "fields": {}})):
        (tmp_path / "yard").mkdir(exist_ok=True)
        (tmp_path / "yard" / "usage.json").write_text(text)
        assert Usage(tmp_path).paths == {}
