"""How fast `prepare` tokenizes beside `tokenizers` alone, on the same texts and the same cores.

    python -m tests.lab.prepare_rate [--megabytes 50] [--rounds 2] [--ours-only] [--output FILE] [--dry-run]

The corpus is generated: paragraphs of the embedded corpus in a random order, with a fixed seed. Both sides
use the same given tokenizer. `alone` holds texts in memory and times nothing but `encode_batch_fast`, 4 MiB
at a time; `ours` times all of `prepare`, from hashing the source to the manifest. Each is a process of its
own, in turns. Compare wall times only on an idle machine; CPU seconds are less sensitive to load.
With --ours-only one run of `prepare`, which also trains the tokenizer, shows its memory on a large corpus;
its record is another one. `peak_mb` counts the child processes of a side too.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster import cli
from cluster.measure import benchmark
from training.data.config import DataConfig
from training.data.corpora import Corpus
from training.data.prepare import prepare
from training.data.records import Position
from training.data.tokenizer import train_tokenizer

WHAT = "prepare_rate"
PIECE_BYTES = 4 << 20
AIM, AIM_PEAK_MB = 0.9, 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.prepare_rate", description=__doc__.partition("\n")[0]
    )
    benchmark.add_options(parser, what=WHAT, rounds=2, rounds_help="measurements of each side")
    parser.add_argument("--megabytes", type=int, default=50, help="of text (default: 50)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer (default: 8192)")
    parser.add_argument("--ours-only", action="store_true", help="run `prepare` once, for its peak memory")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    options = parser.parse_args(arguments)

    def body() -> None:
        rounds, sides, what = options.rounds, (alone, ours), WHAT
        if options.ours_only:
            rounds, sides, what = 1, (ours,), "prepare_memory"
        names = " and ".join(side.__name__ for side in sides)
        plan = f"{rounds} rounds of {names} on {options.megabytes} MB of text"
        measured = partial(
            measure, options.megabytes, vocab_size=options.vocab_size, num_rounds=rounds, sides=sides
        )
        benchmark.measure_and_publish(options, what=what, plan=plan, measure=measured)

    return cli.run(body)


def measure(
    megabytes: int, *, vocab_size: int, num_rounds: int, sides: tuple[Callable[..., Any], ...]
) -> dict[str, Any]:
    """The sides in turns: MB of text per second of wall and of CPU, peak memory, and ours as a share.

    One side alone trains its own tokenizer.
    """
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        source, given = Path(place, "corpus.jsonl"), Path(place, "tokenizer.json")
        size = write_corpus(source, num_bytes=megabytes * 10**6) / 1e6
        if len(sides) > 1:
            train_tokenizer(islice(texts(source), 20_000), vocab_size=vocab_size).save(str(given))
        for number in range(num_rounds):
            found = {}
            for side in sides if number % 2 == 0 else sides[::-1]:
                folder = Path(place, str(number))
                found[side.__name__] = each = in_a_process(side, source, given, folder, vocab_size)
                print(
                    f"round {number + 1}/{num_rounds}, {side.__name__}: {each}", file=sys.stderr, flush=True
                )
                for what in ("wall", "cpu"):
                    samples.setdefault(f"mb_per_{what}_second_{side.__name__}", []).append(size / each[what])
                samples.setdefault(f"peak_mb_{side.__name__}", []).append(each["peak_mb"])
            for what in ("wall", "cpu") if len(sides) == 2 else ():
                share = found["alone"][what] / found["ours"][what]
                samples.setdefault(f"share_{what}", []).append(share)
    return {
        "aim": AIM,
        "aim_peak_mb": AIM_PEAK_MB,
        "rounds": num_rounds,
        "megabytes": size,
        "vocab_size": vocab_size,
        **benchmark.medians(samples),
    }


def write_corpus(path: Path, *, num_bytes: int) -> int:
    """JSON lines of `num_bytes` of text or slightly more. Returns how many."""
    pages = [text for text in Corpus.of(DataConfig()).records(Position()) if isinstance(text, str)]
    paragraphs = [paragraph for page in pages for paragraph in page.split("\n")]
    chosen, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as stream:
        while written < num_bytes:
            text = "\n".join(chosen.choices(paragraphs, k=chosen.randint(1, 24)))
            written += len(text.encode())
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return written


def texts(source: Path) -> Iterator[str]:
    """The texts of such a file."""
    with source.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"]


def in_a_process(side: Callable[..., Any], *given: Any) -> dict[str, float]:
    """Seconds of wall and of CPU, and the peak memory in MB, of a side."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(side, given)


def alone(source: Path, given: Path, _folder: Path, _vocab_size: int) -> dict[str, float]:
    """`tokenizers` by itself."""
    tokenizer, wall, cpu = Tokenizer.from_file(str(given)), 0.0, 0.0
    stream = texts(source)
    while piece := _piece(stream):
        begin = time.monotonic(), time.process_time()
        encodings = tokenizer.encode_batch_fast(piece)
        wall, cpu = wall + time.monotonic() - begin[0], cpu + time.process_time() - begin[1]
        del encodings
    return {"wall": wall, "cpu": cpu, "peak_mb": _peak_mb()}


def _piece(stream: Iterator[str]) -> list[str]:
    piece, size = [], 0
    for text in stream:
        piece.append(text)
        size += len(text)
        if size >= PIECE_BYTES:
            break
    return piece


def ours(source: Path, given: Path, folder: Path, vocab_size: int) -> dict[str, float]:
    """`prepare` of the product."""
    tokenizer = str(given) if given.exists() else "train"
    config = DataConfig(source=str(source), tokenizer=tokenizer, directory=str(folder), vocab_size=vocab_size)
    begin = time.monotonic(), time.process_time()
    prepare(config, report=lambda line: None)
    return {
        "wall": time.monotonic() - begin[0],
        "cpu": time.process_time() - begin[1],
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    """Of this process, and of the largest that it has started. The sum of both is a bound for both at once.

    `getrusage(RUSAGE_SELF)` would answer for the parent that started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    return (kilobytes + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
