"""`python -m load_tests.rigs.lookup`: what prompt lookup brings on natural text, one stream at a time.

The paged engine in this process answers the same conversations with `engine.lookup_tokens` 0, 4 and 8, greedily, to the
model's own end or --max-tokens. Rates are of decoding, from an answer's first token to its last, the best of --repeats.
Answers must be the same with and without lookup: the exit code is 1 if one is not. Writes lookup.json and lookup.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from cluster.models import fetch_model
from load_tests import machine
from load_tests.lookup_tasks import KINDS, LookupTask, lookup_tasks
from load_tests.markdown import table
from router.chat import ChatTemplate
from workers.build import read_manifest
from workers.config import DTYPES, KERNELS, WEIGHTS, EngineConfig
from workers.engine import PagedEngine
from workers.loading import load_model
from workers.paged import assemble
from workers.types import GenerateWork, ModelFiles, ModelManifest, SamplingParams, WorkId

LOOKUP_TOKENS = (0, 4, 8)
MAX_MODEL_LEN = 2_048
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[int, ...]
    decode_s: float
    num_drafted: int
    num_accepted: int
    num_steps: int
    """With a first token behind them: one for each token, without lookup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All answers of a kind, with one setting."""

    kind: str
    lookup_tokens: int
    tokens: int
    tokens_per_s: float
    speedup: float
    tokens_per_step: float
    drafted: int
    accepted: int
    acceptance: float | None
    """Of the drafted tokens; None if there are none."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks engines over one model."""

    files: ModelFiles
    manifest: ModelManifest
    max_tokens: int

    def prompt(self, task: LookupTask) -> list[int]:
        tokenizer = Tokenizer.from_file(str(self.files.tokenizer_json))
        assert self.files.chat_template is not None, "conversations need a chat template"
        text = ChatTemplate(self.files.chat_template.read_text()).render(task.messages)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def ask(self, engine: PagedEngine, number: int, prompt: Sequence[int]) -> Answer:
        engine.submit(
            GenerateWork(
                work_id=WorkId("lookup", number),
                prompt=prompt,
                sampling=SamplingParams(temperature=0.0),
                max_tokens=self.max_tokens,
                stop_token_ids=frozenset(self.manifest.eos_token_ids),
            )
        )
        before, tokens, first_at, steps = engine.load(), list[int](), 0.0, 0
        while engine.step():
            steps += bool(tokens)
            for delta in engine.drain_outputs():
                first_at = first_at or time.perf_counter()
                tokens += delta.token_ids
        after = engine.load()
        return Answer(
            tuple(tokens),
            time.perf_counter() - first_at,
            after.num_drafted_tokens - before.num_drafted_tokens,
            after.num_accepted_tokens - before.num_accepted_tokens,
            steps,
        )

    def answers(self, engine: PagedEngine, prompts: Sequence[list[int]], repeats: int) -> list[Answer]:
        """Return each prompt's answer, at the best speed of `repeats`."""
        best: dict[int, Answer] = {}
        for repeat in range(repeats):
            for index, prompt in enumerate(prompts):
                answer = self.ask(engine, repeat * len(prompts) + index, prompt)
                best[index] = min(best.get(index, answer), answer, key=lambda each: each.decode_s)
        return list(best.values())


def summarise(kind: str, lookup_tokens: int, answers: Sequence[Answer], plain: Row | None) -> Row:
    """Return the row of `answers`; `plain` is that without lookup, of the same kind."""
    later = sum(len(answer.tokens) - 1 for answer in answers)
    rate = later / sum(answer.decode_s for answer in answers)
    drafted, accepted = sum(a.num_drafted for a in answers), sum(a.num_accepted for a in answers)
    return Row(
        kind=kind,
        lookup_tokens=lookup_tokens,
        tokens=later + len(answers),
        tokens_per_s=round(rate, 2),
        speedup=round(rate / plain.tokens_per_s, 3) if plain else 1.0,
        tokens_per_step=round(later / max(1, sum(a.num_steps for a in answers)), 3),
        drafted=drafted,
        accepted=accepted,
        acceptance=round(accepted / drafted, 3) if drafted else None,
    )


def markdown(rows: Sequence[Row]) -> str:
    headings = ("text", "lookup", "tokens", "tokens/s", "x", "tokens/step", "drafted", "accepted", "acceptance")
    return table(
        headings,
        [
            (
                *(row.kind, str(row.lookup_tokens), str(row.tokens), f"{row.tokens_per_s:.1f}", f"{row.speedup:.2f}"),
                *(f"{row.tokens_per_step:.2f}", str(row.drafted), str(row.accepted)),
                "-" if row.acceptance is None else f"{100 * row.acceptance:.0f} %",
            )
            for row in rows
        ],
    )


def main() -> int:
    arguments = _parser().parse_args()
    load = machine.load_average()
    files = fetch_model(arguments.model)
    asker = Asker(files, read_manifest(files.manifest), arguments.max_tokens)
    config = EngineConfig(
        dtype=arguments.dtype,
        weights=arguments.weights,
        kernels=arguments.kernels,
        max_model_len=min(MAX_MODEL_LEN, asker.manifest.max_model_len),
        max_num_sequences=1,
        prefix_cache=False,  # each answer pays for its own prompt
    )
    model = load_model(config, files, asker.manifest, threads=arguments.threads, check=lambda shape: None)

    def engine(lookup_tokens: int) -> PagedEngine:
        return assemble(
            dataclasses.replace(config, lookup_tokens=lookup_tokens), model, asker.manifest, hash_key=b"lookup"
        )

    rows: list[Row] = []
    wrong: list[str] = []
    for kind in KINDS:
        own, different = measure(asker, engine, list(lookup_tasks(kind))[: arguments.tasks], arguments.repeats)
        rows += own
        wrong += different
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load_before": load,
        "machine": machine.describe(),
        "model": asker.manifest.name,
        "dtype": model.dtype_name,
        "kernels": model.kernels,
        "threads": arguments.threads,
        "max_tokens": arguments.max_tokens,
        "rows": [dataclasses.asdict(row) for row in rows],
        "different": wrong,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "lookup.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "lookup.md").write_text(markdown(rows))
    sys.stdout.write(markdown(rows))
    for name in wrong:
        sys.stderr.write(f"lookup: another answer than without lookup: {name}\n")
    return 1 if wrong else 0


def measure(
    asker: Asker, engine_of: Callable[[int], PagedEngine], tasks: Sequence[LookupTask], repeats: int
) -> tuple[list[Row], list[str]]:
    """Return a row for each of `LOOKUP_TOKENS`, and which answers of `tasks`, all of a kind, differ from those of 0."""
    prompts = [asker.prompt(task) for task in tasks]
    plain: list[Answer] = []
    rows: list[Row] = []
    wrong: list[str] = []
    for lookup_tokens in LOOKUP_TOKENS:
        engine = engine_of(lookup_tokens)
        answers = asker.answers(engine, prompts, repeats)
        engine.close()
        plain = plain or answers
        for task, answer, expected in zip(tasks, answers, plain, strict=True):
            if answer.tokens != expected.tokens:
                wrong.append(f"{task.kind}, {task.name}, {lookup_tokens} tokens")
        rows.append(summarise(tasks[0].kind, lookup_tokens, answers, rows[0] if rows else None))
    return rows, wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.lookup", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="default", help="as for octavo serve")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto")
    parser.add_argument("--kernels", choices=KERNELS, default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--tasks", type=int, default=4, help="conversations of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for lookup.json and lookup.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
