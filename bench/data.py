"""Measures `panda/data`: tokenising into the cache, packed rows against padded ones, the loader, and a start.

    python bench/data.py prepare --text FILE... [--megabytes 1000]
    python bench/data.py sources [--megabytes 2000]
    python bench/data.py packing --data GSM8K [--seconds 60]
    python bench/data.py loader --data GSM8K [--seconds 10]
    python bench/data.py scale [--samples 10000000]

``prepare`` makes a synthetic JSON Lines file of that size from real text, trains a BPE tokenizer on it,
and compares panda's tokenising with ``tokenizers`` by itself on the same texts, in the same run.
``sources`` prepares data that is large in one way or another, and reports the peak memory of a process.
``packing`` runs optimizer steps of a small LLaMA over rows padded to max_seq_length, over rows grouped
by length at several micro batches, and over packed rows, all with the same samples.
``loader`` measures the loader by itself, and how long a stand-in for a model waits for it that does
nothing on the host and takes as long as a GPU would.
``scale`` measures what a start does with that many samples (random lengths, files of zeros), and steps
of several sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 8000
SMALL_MODEL = ("--arch", "llama-tiny", "--num_layers", "2", "--hidden_size", "64", "--intermediate_size", "128")
"""Small enough that a step over padded rows takes seconds on one core, not minutes."""
GPU_MODEL = ("--arch", "llama-125m")
LENGTH = 2048
WARM_STEPS = 1
GPU_RATES = {"7B": 12_000, "1.3B": 60_000, "125M": 300_000}
"""Assumed tokens a second of training on an H100: 989 TFLOP/s over 6 x parameters, at half of that, and at a quarter
for the smallest model. Arithmetic, not measured."""


def collate_text(rows: Any, shape: Any) -> Any:
    """A batch of text, with token 0 as padding."""
    from panda.data.batches import token_batch

    return token_batch([[(each["token_ids"], each["supervised"]) for each in row] for row in rows], 0, shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("--text", type=Path, nargs="+", required=True, help="JSON files of real text")
    preparing.add_argument("--megabytes", type=int, default=1000)
    preparing.add_argument("--alone", type=int, default=100, help="MB of them on which tokenizers by itself is timed")
    preparing.add_argument("--folder", type=Path, help="working folder; by default a temporary one")
    sourcing = commands.add_parser("sources")
    sourcing.add_argument("--megabytes", type=int, default=2000, help="of the largest file")
    sourcing.add_argument("--only", nargs="+", choices=SOURCES, default=SOURCES, metavar="NAME")
    for name, seconds in (("packing", 60), ("loader", 10)):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True, help="instruct data: GSM8K")
        command.add_argument("--text", type=Path, nargs="+", help="to train the tokenizer on; by default the data")
        command.add_argument("--seconds", type=float, default=seconds, help="for each configuration")
        command.add_argument("--samples", type=int, default=32, help="in an optimizer step, a multiple of --micro's")
        if name == "packing":
            command.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="micro batches to try")
    scaling = commands.add_parser("scale")
    scaling.add_argument("--samples", type=int, default=10_000_000)
    arguments = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores,", end=" ")
    print(f"load {os.getloadavg()[0]:.1f}, {_versions()}\n", flush=True)
    if arguments.command == "scale":
        with tempfile.TemporaryDirectory() as folder:
            measure_scale(arguments.samples, Path(folder))
    elif arguments.command == "sources":
        with tempfile.TemporaryDirectory() as folder:
            measure_sources(arguments.megabytes * 1_000_000, arguments.only, Path(folder))
    elif arguments.command == "prepare":
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix="panda-bench-"))
        try:
            measure_preparing(arguments.text, arguments.megabytes, arguments.alone, folder)
        finally:
            if arguments.folder is None:
                shutil.rmtree(folder)
    else:
        measure = measure_packing if arguments.command == "packing" else measure_loader
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = train_tokenizer(strings(arguments.text or [arguments.data]), Path(folder) / "tokenizer")
            flags = ["--instruction_tuning_data_dir", str(arguments.data), "--tokenizer", str(tokenizer)]
            flags += ["--max_seq_length", str(LENGTH), "--token_cache", f"{folder}/cache", "--seed", "1"]
            measure(flags, arguments)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("panda-train", "tokenizers", "transformers", "torch"))


def strings(files: list[Path]) -> list[str]:
    """Every text in the rows of JSON files."""
    return [value for file in files for row in json.loads(file.read_text()) for value in row.values()]


def train_tokenizer(texts: list[str], folder: Path) -> Path:
    """A byte-level BPE tokenizer of ``VOCABULARY`` entries, in a folder that transformers loads."""
    from tokenizers import Tokenizer
    from tokenizers import decoders
    from tokenizers import models
    from tokenizers import pre_tokenizers
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("pad_token", "bos_token", "eos_token"), specials, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# -- tokenising -------------------------------------------------------------------------------


def synthetic(texts: list[str], size: int) -> Iterator[dict[str, str]]:
    """Documents of about 2,000 characters, made of random pieces of ``texts`` and so all different."""
    generator = random.Random(0)
    text = "\n".join(texts)
    written = 0
    while written < size:
        pieces = [text[at : at + 100] for at in (generator.randrange(len(text) - 100) for _ in range(20))]
        row = {"title": f"Document {written}", "content": "".join(pieces)}
        written += len(json.dumps(row)) + 1
        yield row


def measure_preparing(files: list[Path], megabytes: int, alone_on: int, folder: Path) -> None:
    texts = strings(files)
    tokenizer = train_tokenizer(texts, folder / "tokenizer")
    data = folder / "data.jsonl"
    with data.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in synthetic(texts, megabytes * 1_000_000))
    time.sleep(3)  # a file that was just written is hashed at each start
    size = data.stat().st_size
    program = [sys.executable, __file__]
    alone = _run([*program, "_tokenizers", str(tokenizer), str(data), str(alone_on * 1_000_000)])
    flags = ["--task", "pretrain", "--arch", "llama-tiny", "--pretraining_data_dir", str(data)]
    flags += ["--tokenizer", str(tokenizer), "--token_cache", str(folder / "cache")]
    first = _run([*program, "_prepare", *flags])
    second = _run([*program, "_prepare", *flags])
    cores = len(os.sched_getaffinity(0))
    print(f"{size / 1e9:.2f} GB of JSON Lines, vocabulary {VOCABULARY}, {cores} cores")
    print("| | tokens | seconds | tokens/s | peak memory of a process, MB |\n|---|---|---|---|---|")
    for name, done in (("tokenizers alone", alone), ("panda prepare", first), ("second start", second)):
        rate = f"{done['tokens'] / done['seconds']:,.0f}"
        print(f"| {name} | {done['tokens']:,} | {done['seconds']:.2f} | {rate} | {done['peak'] / 1e6:,.0f} |")
    ratio = (first["tokens"] / first["seconds"]) / (alone["tokens"] / alone["seconds"])
    print(f"\npanda prepare at {ratio:.0%} of the rate of tokenizers alone, reading, checking and writing included")


WORDS = [f"{first}{middle}{last}" for first in "bdfgklmn" for middle in "aeiou" for last in "nrst"]


def measure_sources(size: int, names: Iterable[str], folder: Path) -> None:
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=500)) for _ in range(1000)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer")
    print(f"| {size // 1_000_000} MB: | samples | tokens | seconds | tokens/s | peak memory of a process, MB |")
    print("|---|---|---|---|---|---|")
    for name in names:
        data = folder / "data"
        data.mkdir()
        SOURCES[name](data, texts, size)
        flags = ["--task", "pretrain", "--arch", "llama-tiny", "--pretraining_data_dir", str(data)]
        flags += ["--tokenizer", str(tokenizer), "--token_cache", str(folder / "cache")]
        done = _run([sys.executable, __file__, "_prepare", *flags])
        shutil.rmtree(data)
        shutil.rmtree(folder / "cache")
        counted = f"{done['samples']:,} | {done['tokens']:,} | {done['seconds']:.1f}"
        print(
            f"| {name} | {counted} | {done['tokens'] / done['seconds']:,.0f} | {done['peak'] / 1e6:,.0f} |", flush=True
        )


LARGE = 300 << 20


def _small(folder: Path, texts: list[str], size: int) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:10]))


def _one_file(folder: Path, texts: list[str], size: int) -> None:
    with (folder / "a.jsonl").open("w") as out:
        while out.tell() < size:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def _one_file_of_unused_fields(folder: Path, texts: list[str], size: int) -> None:
    """A hundredth is text."""
    with (folder / "a.jsonl").open("w") as out:
        while out.tell() < size:
            out.writelines(json.dumps({"text": text, "raw": text * 99}) + "\n" for text in texts[:100])


def _many_files(folder: Path, texts: list[str], size: int) -> None:
    for number in range(10_000):
        (folder / f"{number}.jsonl").write_text(json.dumps({"text": texts[number % len(texts)]}) + "\n")


def _large_row(folder: Path, texts: list[str], size: int) -> None:
    _small(folder, texts, size)
    with (folder / "a.jsonl").open("a") as out:
        out.write(json.dumps({"text": "word " * (LARGE // 5)}) + "\n" + json.dumps({"text": texts[0]}) + "\n")


def _large_csv_row(folder: Path, texts: list[str], size: int) -> None:
    (folder / "a.csv").write_text('text\n"' + "a word\n" * (LARGE // 7) + '"\n' + texts[0] + "\n")


def _large_text(folder: Path, texts: list[str], size: int) -> None:
    _small(folder, texts, size)
    (folder / "a.txt").write_text("word " * (LARGE // 5))


def _packed_string(folder: Path, texts: list[str], size: int) -> None:
    import gzip

    _small(folder, texts, size)
    with gzip.open(folder / "b.jsonl.gz", "w") as out:
        out.write(b'"' + b"x" * (200 << 20) + b'"\n' + json.dumps({"text": texts[0]}).encode())


def _large_cell(form: str) -> Callable[[Path, list[str], int], None]:
    def write(folder: Path, texts: list[str], size: int) -> None:
        import pyarrow
        from pyarrow import feather
        from pyarrow import parquet

        table = pyarrow.table({"text": [*texts[:10], "word " * (LARGE // 5), *texts[:10]]})
        if form == "parquet":
            parquet.write_table(table, folder / "a.parquet")
        else:
            feather.write_feather(table, folder / "a.feather", compression="uncompressed")

    return write


SOURCES = {
    "10 rows": _small,
    "one file of JSON Lines": _one_file,
    "one file, a hundredth of it text": _one_file_of_unused_fields,
    "10,000 files": _many_files,
    "a row of 300 MB, JSON": _large_row,
    "a row of 300 MB, CSV": _large_csv_row,
    "a text of 300 MB": _large_text,
    "gzip of one string of 200 MB": _packed_string,
    "a cell of 300 MB, Parquet": _large_cell("parquet"),
    "a cell of 300 MB, Arrow": _large_cell("arrow"),
}


def _run(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _peak() -> int:
    """Peak bytes of the largest process so far: this one, or a child that has ended."""
    # Not RUSAGE_SELF, which begins with what the process that started this one had.
    [own] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * max(int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _tokenizers(folder: str, data: str, size: str) -> None:
    """``tokenizers`` on texts that are in memory already, with its own threads: nothing read, kept or written.

    It stops after ``size`` bytes of ``data``: a rate needs no more.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokens, seconds, read = 0, 0.0, 0
    with open(data) as lines:
        while read < int(size) and (block := list(itertools.islice(lines, 1000))):
            read += sum(map(len, block))
            block = [json.loads(line) for line in block]
            texts = [f"{row['title']}\n{row['content']}" for row in block]
            started = time.perf_counter()
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            seconds += time.perf_counter() - started
            tokens += sum(len(each) for each in encoded)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "peak": _peak()}))


def _prepare(flags: list[str]) -> None:
    """The part of a start that concerns data: from the loaded tokenizer to the data set."""
    from panda.configuration.arguments import parse_arguments
    from panda.configuration.configure import configure
    from panda.run.assembly import build_task
    from panda.run.assembly import load_tokenizer

    resolved = configure(parse_arguments(flags)).resolved
    tokenizer = load_tokenizer(resolved.core.tokenizer)
    started = time.perf_counter()
    dataset = build_task(resolved, tokenizer).dataset()
    seconds = time.perf_counter() - started
    found = {"samples": len(dataset), "tokens": dataset.tokens}
    print(json.dumps(found | {"seconds": seconds, "peak": _peak()}))


# -- packing ----------------------------------------------------------------------------------


def _tokenised(flags: list[str], samples: int) -> tuple[Any, Any, Any]:
    """The configuration that ``flags`` resolve to, its task and its data set."""
    from panda.configuration.arguments import parse_arguments
    from panda.configuration.configure import configure
    from panda.run.assembly import build_task
    from panda.run.assembly import load_tokenizer

    resolved = configure(parse_arguments(flags)).resolved
    task = build_task(resolved, load_tokenizer(resolved.core.tokenizer))
    dataset = task.dataset()
    print(
        f"{len(dataset):,} samples, {dataset.tokens / len(dataset):.0f} tokens each, {samples} samples a step,"
        f" max_seq_length {LENGTH}"
    )
    return resolved, task, dataset


def measure_packing(flags: list[str], arguments: argparse.Namespace) -> None:
    import torch

    from panda.engine.processes import join_processes
    from panda.models.forward.varlen_attention import attend_by_kernel
    from panda.models.forward.varlen_attention import why_masked
    from panda.run.model import model_context

    processes = join_processes()
    on_gpu = processes.device.type == "cuda"
    resolved, task, dataset = _tokenised([*(GPU_MODEL if on_gpu else SMALL_MODEL), *flags], arguments.samples)
    torch.manual_seed(0)
    model = resolved.components["model"].build(model_context(resolved, task.tokenizer), torch.nn.Module)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if masked := why_masked(model, processes.device, dtype):
        print(f"packed rows have a mask, since {masked}")
    else:
        attend_by_kernel(model)
    model = model.to(processes.device, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"a LLaMA of {parameters:,} parameters on {torch.cuda.get_device_name() if on_gpu else 'the CPU'}")
    print("| rows | micro batch | supervised tokens/s | data wait | filled |\n|---|---|---|---|---|")
    cases = [("padded to max_seq_length", 16 if on_gpu else 2)]
    cases += [(batching, micro) for batching in ("grouped", "packed") for micro in arguments.micro]
    best: dict[str, float] = {}
    for batching, micro in cases:
        layout = _layout(dataset, resolved.core, batching, micro, arguments.samples)
        rate, wait, filled = _steps(task, layout, model, processes.device, batching, arguments.seconds)
        best[batching] = max(best.get(batching, 0.0), rate)
        print(f"| {batching} | {micro} | {rate:,.0f} | {wait:.2%} | {filled:.1%} |", flush=True)
    print(f"\npacked / padded to max_seq_length: {best['packed'] / best['padded to max_seq_length']:.2f}")
    print(f"packed / grouped at its best micro batch: {best['packed'] / best['grouped']:.2f}")


def measure_loader(flags: list[str], arguments: argparse.Namespace) -> None:
    resolved, _, dataset = _tokenised([*SMALL_MODEL, *flags], arguments.samples)
    layout = _layout(dataset, resolved.core, "packed", 1, arguments.samples)
    taken = ", ".join(f"{name} {rate:,}" for name, rate in GPU_RATES.items())
    print(f"packed rows; a model that does nothing takes, in tokens a second: {taken}")
    names = [f"{name}: data wait | CPU |" for name in GPU_RATES]
    print("| workers | alone, tokens/s |", *names)
    print("|---|---|" + "---|---|" * len(GPU_RATES))
    for workers in (0, 1, 2):
        alone, *_ = _loader(layout, workers, None, arguments.seconds)
        paced = [_loader(layout, workers, rate, arguments.seconds) for rate in GPU_RATES.values()]
        cells = [f"{wait:.2%} | {seconds * 1e3:.2f} ms a step |" for _, wait, seconds in paced]
        print(f"| {workers} | {alone:,.0f} |", *cells, flush=True)


def _layout(dataset: Any, options: Any, batching: str, micro: int, samples: int) -> Any:
    from dataclasses import replace

    from panda.run.assembly import lay_out

    options = replace(
        options,
        per_gpu_train_batch_size=micro,
        gradient_accumulation_steps=samples // micro,
        batching="padded" if batching.startswith("padded") else batching,
        num_train_epochs=100.0,
    )
    return lay_out(options, dataset, 1)


def _steps(
    task: Any, layout: Any, model: Any, device: Any, batching: str, seconds: float
) -> tuple[float, float, float]:
    """Supervised tokens a second of forward, backward and optimizer; share of time spent waiting; how full rows are."""
    import torch

    from panda.data.loading import step_batches
    from panda.models.forward.varlen_attention import takes_bounds

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = step_batches(
        layout,
        collate_text,
        rank=0,
        num_workers=2,
        prefetch_factor=2,
        pin_memory=device.type == "cuda",
        bounds=takes_bounds(model),
    )
    counted = tokens = cells = 0
    waited = 0.0
    begun = 0.0
    for step in itertools.count():
        if step == WARM_STEPS:
            _settle(device)
            begun, waited, counted, tokens, cells = time.perf_counter(), 0.0, 0, 0, 0
        asked = time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter() - asked
        supervised = sum(batch.supervised_tokens for batch in micro_batches)
        for batch in micro_batches:
            if batching == "padded to max_seq_length":
                batch = _lengthened(batch)
            (task.loss(model, batch.to(device)) / supervised).backward()
            tokens += batch.tokens
            cells += batch.input_ids.numel()
        optimizer.step()
        optimizer.zero_grad()
        counted += supervised
        if step > WARM_STEPS and time.perf_counter() - begun > seconds:
            break
    _settle(device)
    elapsed = time.perf_counter() - begun
    batches.close()
    return counted / elapsed, waited / elapsed, tokens / cells


def _lengthened(batch: Any) -> Any:
    from dataclasses import replace

    import torch
    from torch.nn.functional import pad

    missing = LENGTH - batch.input_ids.shape[1]
    cells = [pad(batch.input_ids, (0, missing)), pad(batch.labels, (0, missing), value=-100)]
    return replace(batch, cells=torch.stack(cells))


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _loader(layout: Any, workers: int, pace: float | None, seconds: float) -> tuple[float, float, float]:
    """Tokens a second from the loader; the share of time that a model of ``pace`` tokens a second waits for it; and
    the median CPU seconds of a step in the waiting thread, which other load on the machine affects less.

    Without a pace nothing holds the loader up, and all of the time is waiting.
    """
    import torch

    from panda.data.loading import step_batches

    batches = step_batches(
        layout,
        collate_text,
        rank=0,
        num_workers=workers,
        prefetch_factor=2,
        pin_memory=torch.cuda.is_available(),
    )
    next(batches)
    started = time.perf_counter()
    tokens, waited, elapsed = 0, 0.0, 0.0
    spent = []
    while elapsed < seconds:
        asked, before = time.perf_counter(), time.thread_time()
        step = next(batches)
        waited += time.perf_counter() - asked
        spent.append(time.thread_time() - before)
        tokens_of_step = sum(batch.tokens for batch in step)
        tokens += tokens_of_step
        if pace is not None:
            time.sleep(tokens_of_step / pace)
        elapsed = time.perf_counter() - started
    batches.close()
    return tokens / elapsed, waited / elapsed, statistics.median(spent)


# -- large data sets --------------------------------------------------------------------------


def measure_scale(samples: int, folder: Path) -> None:
    import numpy as np

    from panda.cli.data import draw_lengths
    from panda.cli.data import histogram
    from panda.data.fields import TEXT
    from panda.data.order import BatchPlan
    from panda.data.order import SampleOrder
    from panda.data.packing import Layout
    from panda.data.report import DataReport
    from panda.data.token_dataset import TokenDataset

    lengths = np.random.default_rng(0).lognormal(np.log(130), 0.6, samples).astype(np.int64).clip(8, LENGTH)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(offsets[-1])
    offsets.tofile(folder / "offsets.bin")
    arrays = []
    kinds = (("ids", "uint16", tokens), ("mask", "bool", tokens), ("offsets", "int64", len(offsets)))
    for name, kind, count in (*kinds, ("hashes", "uint64", samples)):
        with (folder / f"{name}.bin").open("ab") as file:
            file.truncate(count * np.dtype(kind).itemsize)
        arrays.append(np.asarray(np.memmap(folder / f"{name}.bin", dtype=kind, mode="r")))
    del lengths, offsets
    token_ids, mask, ends, hashes = arrays
    offsets = {"token_ids": ends, "supervised": ends}
    stored = {"token_ids": token_ids, "supervised": mask}
    dataset = TokenDataset(TEXT[:2], stored, offsets, hashes, DataReport(), "", tokens, folder)
    order = SampleOrder(dataset.sources, seed=1)
    print(f"{samples:,} samples, {tokens:,} tokens; packed rows\n| | CPU, s |\n|---|---|")

    def measure(what: str, work: Callable[[], object]) -> None:
        times = []
        for _ in range(3):
            started = time.process_time()
            work()
            times.append(time.process_time() - started)
        print(f"| {what} | {statistics.median(times):.4f} |", flush=True)

    for step in (256, 4096, 65536):
        plan = BatchPlan(samples=samples, micro_batch=8, accumulation=step // 8, ranks=1, epochs=1)
        layout = Layout(dataset, order, plan, "packed", LENGTH)
        measure(f"the rows of a step of {step:,} samples", lambda: layout.micro_batches(1))  # noqa: B023 - called at once
        measure("how full rows are, told at the start", layout.filling)
    measure("256 samples across the border of epochs", lambda: order.samples(range(samples - 128, samples + 128)))
    held = dataset.lengths(np.arange(samples))
    measure("all lengths", lambda: dataset.lengths(np.arange(samples)))
    measure("their histogram", lambda: histogram(held, 12))
    measure("their picture", lambda: draw_lengths(held, folder / "lengths.png", title=""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["_tokenizers"]:
        _tokenizers(*sys.argv[2:])
    elif sys.argv[1:2] == ["_prepare"]:
        _prepare(sys.argv[2:])
    else:
        main()
