"""Broken traces: each gets exactly one error that names the file, the line and what was expected there."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from hotset.errors import TraceError
from hotset.simulation.traces import open_trace
from hotset.simulation.traces.reading import MAX_LINE_BYTES
from hotset.simulation.traces.trace import Window

A19 = "HashOwner,HashApp,HashFunction,Trigger,1,2\n"
A21 = "app,func,end_timestamp,duration\n"
GEN = "gmt_create,predict_status,exec_time_seconds,groupId,checkpoint_model_version_id\n"
LLM = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OWN = "# hotset-trace 1\narrival_s,function,inference_s\n"
NDJSON = '{"hotset_trace":1}\n'


def complaint(path: Path, content: bytes) -> TraceError:
    path.write_bytes(content)
    with pytest.raises(TraceError) as raised:
        open_trace(path).functions(Window())
    assert str(raised.value).startswith(f"{path}, line {raised.value.line}: expected ")
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        ("", 1, "the file is empty"),
        ("\n", 1, "the header of a known trace format"),
        ("time,model\n1,a\n", 1, "the header of a known trace format"),
        (A19, 1, "at least one row after the header"),
        (A19.replace("Trigger,", "") + "o,a,f,1,2\n", 1, "the column Trigger in the header"),
        (A19.replace(",1,2", "") + "o,a,f,http\n", 1, "a column for each minute"),
        (A19.replace(",1,2", ",1,3"), 1, "the minute column 2 after 1, found 3"),
        (A19.replace(",1,2", ",1,1"), 1, "each column once"),
        (A19 + "o,a,f,http,1,-2\n", 2, "a whole number from 0 to 10000000 in minute column 2, found '-2'"),
        (A19 + "o,a,f,http,1,2\no,a,g,http,1.5,2\n", 3, "in minute column 1, found '1.5'"),
        (A19 + "o,a,f,http,99999999999999999999,2\n", 2, "found '99999999999999999999'"),
        (A19 + "o,a,f,http,1\n", 2, "6 columns as in the header, found 5"),
        (A19 + "o,a,,http,1,2\n", 2, "a function's name in column HashFunction"),
        (A19 + 'o,a,"f" x,http,1,2\n', 2, "comma-separated values"),
        (A21 + "a,f,soon,1\n", 2, "a number of at least 0 in column end_timestamp, found 'soon'"),
        (A21 + "a,f,5,-1\n", 2, "a number of at least 0 in column duration, found '-1'"),
        (A21 + "a,f,5,nan\n", 2, "in column duration, found 'nan'"),
        (A21 + "a,,5,1\n", 2, "a function's name in column func"),
        ("app,func,end_timestamp\na,f,5\n", 1, "the column duration in the header"),
        (GEN.replace("exec_time_seconds,", "").replace("groupId,", ""), 1, "the columns exec_time_seconds, groupId"),
        (GEN + "yesterday,SUCCEED,1,g,m\n", 2, "a date and time such as"),
        (GEN + "2024-11-15 10:00:00,SUCCEED,1,g,m\n2024-11-15 09:00:00,SUCCEED,1,g,m\n", 3, "rows in order of time"),
        (GEN + "2024-11-15 10:00:00,SUCCEED,long,g,m\n", 2, "in column exec_time_seconds, found 'long'"),
        (GEN + "2024-11-15 10:00:00,7,1,g,m\n", 2, "a status such as SUCCEED"),
        (LLM + "2023-11-16 18:17:03.97,many,1\n", 2, "in column ContextTokens, found 'many'"),
        (LLM + "2023-11-16 18:17:03,1,1\n2023-11-16 18:17:03+00:00,1,1\n", 3, "a date and time such as"),
        ("arrival_s,function\n1,f\n", 1, "'# hotset-trace 1'"),
        ("# hotset-trace 2\narrival_s,function\n1,f\n", 1, "'# hotset-trace 1'"),
        ("# hotset-trace 1\n", 1, "a header line with the columns arrival_s, function"),
        (OWN + "1,f,\n0.5,f,\n", 4, "rows in order of time, but 0.5 s is before the row above"),
        (OWN + "1,f,fast\n", 3, "in column inference_s, found 'fast'"),
        (OWN + "1,,\n", 3, "a function's name in column function"),
        (OWN + "1,f,\n2,f\n", 4, "3 columns as in the header, found 2"),
        (OWN + "x" * 100 + ",f,\n", 3, "x...'"),
        (NDJSON, 1, "at least one row after the header"),
        ('{"hotset_trace":2}\n{}\n', 1, "the header of a known trace format"),
        (NDJSON + '{"arrival_s":1}\n', 2, "missing required field `function`"),
        (NDJSON + '{"arrival_s":"1","function":"f"}\n', 2, "Expected `float`, got `str`"),
        (NDJSON + '\n{"arrival_s":-1,"function":"f"}\n', 3, "a function's name, and times of at least 0"),
        (NDJSON + '{"arrival_s":2,"function":"f"}\n{"arrival_s":1,"function":"f"}\n', 3, "rows in order of time"),
        (NDJSON + '{"arrival_s":2,"func', 2, "a JSON object with arrival_s and function"),
    ],
)
def test_a_broken_row_or_header_is_named(content: str, line: int, expected: str, tmp_path: Path) -> None:
    error = complaint(tmp_path / "bad.csv", content.encode())

    assert error.line == line
    assert expected in error.expected


def test_a_version_that_this_hotset_cannot_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "future.ndjson"
    path.write_text('{"hotset_trace":2}\n{"arrival_s":1,"function":"f"}\n')

    with pytest.raises(TraceError, match=r'line 1: expected \{"hotset_trace":1\}'):
        open_trace(path, "hotset").functions(Window())


def test_a_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    error = complaint(tmp_path / "latin.csv", A21.encode() + b"a,f,1,1\na,caf\xe9,2,1\n")

    assert (error.line, "UTF-8 text (byte 6 of the line is not)" in error.expected) == (3, True)


def test_a_gzip_file_that_is_cut_off_is_no_shorter_trace(tmp_path: Path) -> None:
    whole = gzip.compress(A21.encode() + b"".join(b"a,f,%d,1\n" % end for end in range(20_000)))

    for part in (whole[: len(whole) // 2], whole[:-4], whole[:12], whole + b"rubbish behind it"):
        assert "a complete gzip file" in complaint(tmp_path / "cut.gz", part).expected

    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 8] = b"\xff" * 8
    assert complaint(tmp_path / "damaged.gz", bytes(damaged)).line > 1


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path: Path) -> None:
    error = complaint(tmp_path / "endless.gz", gzip.compress(b"a" * (MAX_LINE_BYTES * 20)))

    assert (error.line, error.expected) == (1, f"expected lines of less than {MAX_LINE_BYTES} bytes")


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (A21 + "a,f,1,1\n\n").replace("\n", "\r\n").encode())

    assert [use.name for use in open_trace(path).functions(Window())] == ["f"]
