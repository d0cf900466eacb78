"""The progress seam: log lines without a terminal, shared bars with one."""

import io
import logging

import pytest

from qkern import _progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


def test_off_in_tests_and_by_variable(monkeypatch):
    assert not _progress.enabled()
    monkeypatch.setattr(
        _progress.sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    )
    monkeypatch.delenv("QKERN_NO_PROGRESS", raising=False)
    assert _progress.enabled()
    monkeypatch.setenv("QKERN_NO_PROGRESS", "1")
    assert not _progress.enabled()


def test_log_lines_come_every_few_seconds_with_the_time_left(clock, caplog):
    with caplog.at_level(logging.INFO), _progress.task("Quantizing", total=10, unit="layer") as task:
        for step in range(10):
            clock[0] += 2.0
            task.advance(note=f"error {step}")
    assert caplog.messages == [
        "Quantizing: layer 3/10 (error 2), 00:14 left",
        "Quantizing: layer 6/10 (error 5), 00:08 left",
        "Quantizing: layer 9/10 (error 8), 00:02 left",
        "Quantizing: layer 10/10 (error 9), took 00:20",
    ]


def test_track_yields_the_items_and_counts_them(clock, caplog):
    with caplog.at_level(logging.INFO):
        assert list(_progress.track(iter("abc"), "Reading", unit="shard")) == ["a", "b", "c"]
    assert caplog.messages == ["Reading: shard 3, took 00:00"]


def test_seconds_left(clock):
    with _progress.task("x", total=4) as task:
        assert task.seconds_left is None
        clock[0] = 3600.0
        task.advance()
        assert task.seconds_left == 3 * 3600
        assert _progress._clock(task.seconds_left) == "3:00:00"


def test_bars_share_one_display_and_leave_none(monkeypatch):
    from rich.console import Console

    stream = io.StringIO()
    monkeypatch.setattr(_progress, "enabled", lambda: True)
    monkeypatch.setattr(_progress, "console", lambda: Console(file=stream, force_terminal=True, width=120))
    with _progress.task("Outer", total=2, unit="layer") as outer:
        display = _progress._Display.current
        for item in _progress.track([1, 2], "Inner", unit="batch"):
            assert _progress._Display.current is display
            outer.advance(note=f"item {item}")
        assert len(display.progress.tasks) == 1
        display.progress.refresh()
    assert _progress._Display.current is None
    assert "Outer" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "item 2" in stream.getvalue()


def test_error_inside_closes_the_bar(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(_progress, "enabled", lambda: True)
    monkeypatch.setattr(_progress, "console", lambda: Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError, match="inside"), _progress.task("Outer"):
        raise RuntimeError("inside")
    assert _progress._Display.current is None
