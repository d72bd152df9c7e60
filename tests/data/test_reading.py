"""Fields of a row remember what was read of them."""

from __future__ import annotations

import json

from panda.data.reading import Fields


def test_fields_remember_what_was_read_in_whatever_way() -> None:
    for read in (
        lambda fields: fields["a"],
        lambda fields: fields.get("a"),
        lambda fields: fields.pop("a"),
        dict,
        lambda fields: {**fields},
        lambda fields: fields.copy(),
        lambda fields: fields | {},
        lambda fields: {} | fields,
        lambda fields: json.dumps(fields),
        lambda fields: list(fields.values()),
        lambda fields: fields.items(),
    ):
        fields = Fields({"a": 1, "b": None})
        read(fields)
        assert fields.unused() == []
    for look in (list, len, lambda fields: "a" in fields, lambda fields: fields.keys(), lambda fields: fields.has("a")):
        fields = Fields({"a": 1, "b": None})
        look(fields)
        assert fields.unused() == ["a"]


def test_a_field_can_be_left_though_it_was_read_and_counts_once() -> None:
    fields, inner = Fields({"a": [], "b": 1}), Fields({"x": 1, "y": None})
    fields.leave("a")
    for _ in range(2):
        fields.leave_unread("a[]", inner)
    assert fields["a"] == [] and fields.unused() == ["b", "a", "a[].x"]
