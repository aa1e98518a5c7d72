"""Schedules on disk: what is written can be read, what is damaged is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from edgeprune.calib.schedule import Evidence, Schedule, read_schedule
from edgeprune.errors import ScheduleError
from edgeprune.spec import ModelShape

SCHEDULE = Schedule(
    counts=(8, 5, 3, 0),
    objective=0.25,
    bound=0.2,
    solver="joint",
    visual_tokens=8,
    cr=2.0,
    sample_ids=("one", "zwei"),
    evidence_hash="ab" * 32,
    versions={"numpy": "2.0"},
    seconds=1.5,
    loss=(0.0, 0.5, 0.25, 0.125),
)
SHAPE = ModelShape("llava", 8, (2, 4), 4, 16, 32, 2, 2, 8, 100, 64, True)


def test_a_schedule_survives_the_round_trip():
    text = SCHEDULE.to_json()
    assert Schedule.from_json(text) == SCHEDULE
    shown = json.loads(text)
    assert (shown["schema"], shown["cr_reached"]) == (1, 2.0)
    assert shown["gap"] == pytest.approx(0.2)
    assert len(text.splitlines()) == len(shown) + 2, "one line per field, for people"


def test_a_schedule_is_read_for_the_model_it_was_made_for(tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(SCHEDULE.to_json(), encoding="utf-8")
    assert read_schedule(file, SHAPE, 2.0) == SCHEDULE
    with pytest.raises(ScheduleError, match=r"made for 8 visual tokens, 4 layers and CR 2;"):
        read_schedule(file, SHAPE, 4.0)
    with pytest.raises(ScheduleError, match=r"none\.json cannot be read"):
        read_schedule(tmp_path / "none.json", SHAPE, 2.0)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ScheduleError, match="cannot be read"):
        read_schedule(file, SHAPE, 2.0)


@pytest.mark.parametrize("cut", range(0, len(SCHEDULE.to_json()) - 2, 23))
def test_a_file_cut_short_is_refused(cut):
    with pytest.raises(ScheduleError):
        Schedule.from_json(SCHEDULE.to_json()[:cut])


@pytest.mark.parametrize("text", ["", "[]", "7", '"x"', "{}", "\x00", "[" * 100_000, "NaN"])
def test_foreign_text_is_refused(text):
    with pytest.raises(ScheduleError, match="schedule"):
        Schedule.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2),
        ("counts", []),
        ("counts", [3, 5, 8, 0]),
        ("counts", [8, 5, 3, -1]),
        ("counts", [8, 5, 3, 1]),
        ("counts", [8.0, 5, 3, 0]),
        ("counts", [True, 5, 3, 0]),
        ("counts", "8530"),
        ("visual_tokens", 7),
        ("visual_tokens", 10**400),
        ("cr", 0.5),
        ("cr", "2"),
        ("cr", 10**400),
        ("objective", float("nan")),
        ("objective", 0.1),
        ("bound", -1.0),
        ("versions", {"numpy": 2}),
        ("sample_ids", [1]),
        ("seconds", None),
        ("loss", [0.5]),
        ("loss", [0.0, 0.5, 0.25, -1.0]),
        ("loss", ["0", 0.5, 0.25, 0.125]),
    ],
)
def test_a_damaged_field_is_refused_in_one_line(field, value):
    content = json.loads(SCHEDULE.to_json()) | {field: value}
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_json(json.dumps(content))
    assert "\n" not in str(caught.value)


def test_files_from_before_losses_were_stored_are_read():
    content = json.loads(SCHEDULE.to_json())
    del content["loss"]
    assert Schedule.from_json(json.dumps(content)) == replace(SCHEDULE, loss=())


def test_a_missing_field_is_named():
    content = json.loads(SCHEDULE.to_json())
    del content["bound"]
    with pytest.raises(ScheduleError, match="lacks 'bound'"):
        Schedule.from_json(json.dumps(content))


def test_no_loss_means_no_gap():
    assert replace(SCHEDULE, objective=0.0, bound=0.0).gap == 0


def test_the_hash_tells_evidence_apart_by_value_not_by_type():
    attention, loss = np.ones((1, 2, 3), np.float32), np.ones((1, 2))
    base = Evidence(attention, loss, None, ("a",))
    same = Evidence(attention.astype(np.float64), loss, np.zeros(0), ("a",))
    assert base.sha256() == same.sha256()
    for other in (
        Evidence(attention, 2 * loss, None, ("a",)),
        Evidence(attention, loss, np.ones((1, 3)), ("a",)),
        Evidence(attention, loss, None, ("b",)),
    ):
        assert other.sha256() != base.sha256()
