"""Files of rollouts with their credit, JSONL or Parquet, written and read a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from hsd.credit.records import RolloutCredit, from_record, to_record

Format = Literal["jsonl", "parquet"]

ROW_GROUP = 128
"""Rollouts in memory at one time, of a Parquet file."""


def write_records(
    path: Path, rollouts: Iterable[RolloutCredit], *, contexts: Sequence[str]
) -> Iterator[RolloutCredit]:
    """Writes rollouts, by the file's ending, and hands each on once it is on its way.

    Args:
        contexts: all that may come; columns of a Parquet file.
    """
    if path.suffix == ".parquet":
        yield from _write_parquet(path, rollouts, contexts)
        return
    with path.open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            file.write(json.dumps(to_record(rollout), allow_nan=False) + "\n")
            yield rollout


def read_records(path: Path) -> Iterator[RolloutCredit]:
    """The rollouts of a file, a few at a time.

    Raises:
        ValueError: names the line that is no record.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield from_record(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def require_parquet() -> None:
    """Raises ValueError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(
            "format: found parquet without the package pyarrow, "
            'expected: pip install "hsd-kernels[parquet]"'
        ) from None


def parquet_schema(contexts: Sequence[str]) -> Any:
    """The columns of a Parquet file: the keys of credit.jsonl; a context is a struct or null."""
    import pyarrow as pa

    text, integer, number = pa.string(), pa.int64(), pa.float64()
    top = pa.struct(
        [("token_ids", pa.list_(pa.list_(integer))), ("logprobs", pa.list_(pa.list_(number)))]
    )
    numbers = pa.list_(number)
    context = pa.struct(
        [*((key, numbers) for key in ("logprob", "credit", "kl", "entropy")), ("top", top)]
    )
    return pa.schema(
        [
            ("step", integer),
            ("question", text),
            ("prompt", text),
            ("answer", text),
            ("index", integer),
            ("group_size", integer),
            ("group_correct", integer),
            ("correct", pa.bool_()),
            ("finish_reason", text),
            ("peer", integer),
            ("divergence", integer),
            ("text", text),
            ("token_ids", pa.list_(integer)),
            ("tokens", pa.list_(text)),
            *((key, numbers) for key in ("logprob", "entropy", "weight")),
            ("top", top),
            ("contexts", pa.struct([(name, context) for name in contexts])),
        ]
    )


def _write_parquet(
    path: Path, rollouts: Iterable[RolloutCredit], contexts: Sequence[str]
) -> Iterator[RolloutCredit]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, coming = parquet_schema(contexts), iter(rollouts)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(coming, ROW_GROUP)):
            records = [_whole_characters(to_record(rollout)) for rollout in group]
            writer.write_table(pa.Table.from_pylist(records, schema=schema))
            yield from group


def _whole_characters(record: dict[str, Any]) -> dict[str, Any]:
    """Half a surrogate pair, which JSON can escape and Parquet cannot hold, becomes "?"."""
    for key, value in record.items():
        if isinstance(value, str):
            record[key] = value.encode("utf-8", "replace").decode()
    tokens = [text.encode("utf-8", "replace").decode() for text in record["tokens"]]
    return {**record, "tokens": tokens}


def _read_parquet(path: Path) -> Iterator[RolloutCredit]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROW_GROUP):
            for record in batch.to_pylist():
                present = {k: v for k, v in record["contexts"].items() if v is not None}
                yield from_record({**record, "contexts": present})
