"""Vocabularies: which tokens the result has, whose embedding each model gives for each of them, and the tokenizer's files.

Models with other tokenizers number other tokens with the same row, so tables are lined up by token before they are
merged. All of it happens on tokenizer.json as text; transformers is asked only where a model has no such file.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.recipe import TokenizerSpec, TokenOf
from taskvec.blocks import is_embedding, is_head
from taskvec.errors import Problems, TaskvecError, did_you_mean, shortened
from taskvec.source import TensorSource
from taskvec.views import MEAN, Mean, Row, RowFrom, Rows

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SPECIAL = "special_tokens_map.json"
_GENERATION = "generation_config.json"
# what holds a vocabulary in another form, and would contradict a new tokenizer.json
STALE = frozenset(
    {
        "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "added_tokens.json",
        "sentencepiece.model",
    }
)  # fmt: skip
_NOT_TOKENS = ("position", "wpe", "token_type", "segment", "dense", "transform", "norm", "patch", "vision")


def text_beside(source: TensorSource, name: str) -> str | None:
    """The text of a file beside a model's weights, if there is one."""
    texts: Mapping[str, str] = getattr(source, "texts", {})
    if name in texts:
        return texts[name]
    for path in getattr(source, "companions", ()):
        if path.name == name:
            found: str = path.read_text("utf-8")
            return found
    return None


@dataclass
class Tokenizer:
    """A tokenizer.json and what it says.

    Attributes:
        label: whose it is, for messages.
        data: the file.
        ids: token to its number, added tokens included.
        added: content to entry, for the added tokens.
        scores: of the pieces of a Unigram tokenizer, as far as they are needed.
    """

    label: str
    data: dict[str, Any]
    ids: dict[str, int] = field(default_factory=dict)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parsed(cls, text: str, label: str) -> "Tokenizer":
        """From the text of tokenizer.json.

        Raises:
            TaskvecError: it is not one.
        """
        try:
            data = json.loads(text)
            vocabulary = data["model"]["vocab"]
            if isinstance(vocabulary, dict):
                ids = {str(token): int(number) for token, number in vocabulary.items()}
            else:
                ids = {str(piece[0]): at for at, piece in enumerate(vocabulary)}
            added = {entry["content"]: entry for entry in data.get("added_tokens") or []}
            ids |= {content: int(entry["id"]) for content, entry in added.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise TaskvecError(f"{label}: its {TOKENIZER} has no vocabulary that can be read ({error}).") from error
        return cls(label, data, ids, added)

    @classmethod
    def of(cls, source: TensorSource) -> "Tokenizer":
        """The tokenizer of a model.

        Raises:
            TaskvecError: it has none, or none that can be read.
        """
        text = text_beside(source, TOKENIZER)
        if text is None:
            text = _converted(getattr(source, "path", None), source.label)
        return cls.parsed(text, source.label)

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel."""
        return str(self.data["model"].get("type", "BPE"))

    @property
    def rows(self) -> int:
        """One past the largest number."""
        return max(self.ids.values(), default=-1) + 1


def _converted(path: Path | None, label: str) -> str:
    """tokenizer.json of a model that has its vocabulary in older files, through transformers."""
    older = [p.name for p in sorted(path.iterdir()) if p.name in STALE] if path is not None and path.is_dir() else []
    if not older:
        raise TaskvecError(f"{label}: has no tokenizer ({TOKENIZER}) beside its weights; `tokenizer` needs one.")
    try:
        from transformers import AutoTokenizer

        found: str = AutoTokenizer.from_pretrained(str(path))._tokenizer.to_str()
    except Exception as error:  # whatever the third party raises, the user needs to know which model it was
        raise TaskvecError(
            f"{label}: has no {TOKENIZER}, and transformers cannot make one of {shortened(older)} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Save its fast tokenizer there first."
        ) from error
    return found


def token_tables(source: TensorSource, tokens: int) -> dict[str, int]:
    """The tables with one row for each token (embeddings, heads, their biases), with their rows.

    Args:
        source: a model.
        tokens: how many its tokenizer numbers.
    """
    config = getattr(source, "config", {})
    text = config.get("text_config")
    stated = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    named = {
        name: info.shape[0]
        for name, info in source.infos.items()
        if info.shape and (is_embedding(name) or is_head(name) or ".predictions." in name)
        if not any(word in name.lower() for word in _NOT_TOKENS)
    }
    if stated in named.values():
        return {name: rows for name, rows in named.items() if rows == stated}
    inputs = [rows for name, rows in named.items() if is_embedding(name) and rows >= tokens]
    return {name: rows for name, rows in named.items() if inputs and rows == max(inputs)}


@dataclass
class Vocabularies:
    """The vocabulary of the result, and how each model's tables are seen in its order.

    Attributes:
        spec: what was asked for.
        made: the result's tokenizer.
        origin: the model whose tokenizer it is, or that the union begins with.
        rows: rows of the result's tables.
        warnings: what is worth knowing.
    """

    spec: TokenizerSpec
    models: Mapping[str, TensorSource]
    tokenizers: Mapping[str, Tokenizer]
    made: Tokenizer
    origin: str
    donor: str
    base: str | None
    rows: int
    changed: bool
    extra: TensorSource | None = None
    warnings: list[str] = field(default_factory=list)
    _known: dict[str, dict[str, int]] = field(default_factory=dict)
    _made: dict[str, list[RowFrom]] = field(default_factory=dict)

    @classmethod
    def planned(
        cls,
        spec: TokenizerSpec,
        models: Mapping[str, TensorSource],
        donor: str,
        base: str | None,
        problems: Problems,
    ) -> "Vocabularies | None":
        """Works out the vocabulary, or says everything that is wrong with it.

        Args:
            spec: the recipe's `tokenizer`.
            models: the whole models of the recipe, by path; the base first.
            donor: the path of the base, or of the first model.
            base: the path of the base.
            problems: takes what is wrong.
        """
        tokenizers: dict[str, Tokenizer] = {}
        for path, source in models.items():
            try:
                tokenizers[path] = Tokenizer.of(source)
            except TaskvecError as error:
                problems.add(f"tokenizer: {error}")
        if problems:
            return None
        origin, extra, warnings = donor, None, list[str]()
        if spec.source not in ("base", "union"):
            origin = spec.source
            if origin not in models:
                extra = _Elsewhere(origin)
                try:
                    tokenizers[origin] = Tokenizer.of(extra)
                except (TaskvecError, OSError) as error:
                    problems.add(f"tokenizer.source: {error} (write base, union, or a model of this recipe)")
                    return None
        made = deepcopy(tokenizers[origin])
        made.label = "the result"
        if spec.source == "union":
            for path, other in tokenizers.items():
                if path != origin:
                    _add_all(made, other, tokenizers[origin], problems, warnings)
        for token, rule in spec.tokens.items():
            if token not in made.ids:
                known = next((t.added[token] for t in tokenizers.values() if token in t.added), None)
                _add(made, token, known or {"special": True, "normalized": False})
            _check_rule(f"tokenizer.tokens.{token}", token, rule.source, models, tokenizers, problems)
        if problems:
            return None
        changed = made.ids != tokenizers[origin].ids
        rows = made.rows
        if spec.multiple_of is not None:
            rows += -rows % spec.multiple_of
        elif not changed and origin in models:
            rows = max([rows, *token_tables(models[origin], rows).values()])
        found = cls(spec, models, tokenizers, made, origin, donor, base, rows, changed, extra, warnings)
        if changed:
            _fill(made)
            _check_loads(made, problems)
        for path, source in models.items():
            if not token_tables(source, tokenizers[path].rows):
                problems.add(
                    f"tokenizer: {path} has no table with a row for each of its {len(tokenizers[path].ids)} tokens"
                )
        found._check_covered(problems)
        return found

    # -- rows --------------------------------------------------------------------------------------------------------

    def _has(self, path: str, token: str) -> int | None:
        """The row of a token in a model, if it has one."""
        number = self.tokenizers[path].ids.get(token)
        return number if number is not None and number < self._rows_there(path) else None

    def _tables(self, path: str) -> dict[str, int]:
        if path not in self._known:
            self._known[path] = token_tables(self.models[path], self.tokenizers[path].rows)
        return self._known[path]

    def _rows_there(self, path: str) -> int:
        return min(self._tables(path).values(), default=0)

    def _check_covered(self, problems: Problems) -> None:
        without = [
            token
            for token in self.made.ids
            if token not in self.spec.tokens and all(self._has(path, token) is None for path in self.models)
        ]
        if without:
            problems.add(
                f"tokenizer: no model has an embedding for {len(without)} tokens of the vocabulary ({shortened(without)}). Say "
                "under `tokens` where they come from, or take another `source`."
            )

    def _ruled(self, token: str) -> "tuple[Row, ...] | None":
        """What the recipe says of a token: one row, none for zero."""
        rule = self.spec.tokens.get(token)
        if rule is None:
            return None
        if rule.source == "zero":
            return ()
        if isinstance(rule.source, TokenOf):
            of = rule.source
            number = of.token_id if of.token is None else self.tokenizers[of.model].ids[of.token]
            assert number is not None
            return ((self.models[of.model], number),)
        row = self._has(rule.source, token)
        assert row is not None
        return ((self.models[rule.source], row),)

    def _default(self, token: str) -> "tuple[Row, ...]":
        """The embedding for models that lack the token: the recipe's, the base's, or the mean of all that have it."""
        ruled = self._ruled(token)
        if ruled is not None:
            return ruled
        if self.base is not None and (row := self._has(self.base, token)) is not None:
            return ((self.models[self.base], row),)
        found = [(source, self._has(path, token)) for path, source in self.models.items()]
        return tuple((source, row) for source, row in found if row is not None)

    def rows_of(self, path: str) -> list[RowFrom]:
        """For each row of the result's tables, where a model's own value for it comes from."""
        if path in self._made:
            return self._made[path]
        found: list[RowFrom] = [()] * self.rows
        self._made[path] = found
        if not self.changed and self.origin in self.models:  # rows beyond the vocabulary stay as they are
            same = self.tokenizers[path].ids == self.tokenizers[self.origin].ids
            have, theirs = self._rows_there(path), self._rows_there(self.origin)
            for at in range(self.rows):
                found[at] = at if same and at < have else ((self.models[self.origin], at),) if at < theirs else ()
        for token, at in self.made.ids.items():
            rule, row = self.spec.tokens.get(token), self._has(path, token)
            found[at] = row if row is not None and not (rule is not None and rule.force) else self._default(token)
        if self.spec.padding == "mean":
            found[self.made.rows :] = [MEAN] * (self.rows - self.made.rows)
        return found

    def seen(self, source: TensorSource, path: str, base: str | None) -> TensorSource:
        """A model, its tables in the result's order.

        Args:
            source: the model, or differences to the base.
            path: which one it is.
            base: the base that differences belong to.
        """
        if path in self.models:
            rows = self.rows_of(path)
            return Rows(source, dict.fromkeys(self._tables(path), rows))
        assert base is not None  # differences: zero for what the base has from elsewhere
        own = [row if isinstance(row, int | Mean) else () for row in self.rows_of(base)]
        return Rows(source, dict.fromkeys(self._tables(base), own))

    # -- files -------------------------------------------------------------------------------------------------------

    def _renumbered(self, number: Any, tokens: Mapping[int, str]) -> Any:
        if isinstance(number, list):
            return [self._renumbered(item, tokens) for item in number]
        if type(number) is not int or number not in tokens:
            return number
        return self.made.ids.get(tokens[number])

    def _special(self, inner: dict[str, Any], theirs: Mapping[str, Any]) -> None:
        """Numbers of special tokens, by what they mean: those of the model whose tokenizer it is, else the donor's."""
        ours = {number: token for token, number in self.tokenizers[self.donor].ids.items()}
        origin = {number: token for token, number in self.tokenizers[self.origin].ids.items()}
        for key, value in list(inner.items()):
            if not key.endswith(("_token_id", "_token_ids", "_token_index")) or value is None:
                continue
            other = theirs.get(key)
            if self.origin != self.donor and other is not None:
                inner[key] = self._renumbered(other, origin)
            else:
                inner[key] = self._renumbered(value, ours)
            if inner[key] is None:
                self.warnings.append(
                    f"{key}: the token {ours.get(value) if type(value) is int else value!r} of {self.donor} is not in the vocabulary"
                )

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with the result's number of tokens and the numbers of its special tokens."""
        made = deepcopy(dict(config))
        theirs = getattr(self.models.get(self.origin, self.extra), "config", {})
        stated = set(self._tables(self.donor).values())
        for inner, other in ((made, theirs), *((v, theirs.get(k)) for k, v in made.items() if isinstance(v, dict))):
            if inner.get("vocab_size") in stated:
                inner["vocab_size"] = self.rows
            self._special(inner, other if isinstance(other, Mapping) else {})
        return made

    def files(self) -> dict[str, str]:
        """The tokenizer's files, and the generation settings with their tokens renumbered."""
        source = self.models.get(self.origin, self.extra)
        assert source is not None
        found: dict[str, str] = {}
        if self.changed or self.origin != self.donor:
            found[TOKENIZER] = json.dumps(self.made.data, ensure_ascii=False, indent=2) + "\n"
            for name in (TOKENIZER_CONFIG, _SPECIAL, TEMPLATE):
                text = text_beside(source, name)
                if text is not None:
                    found[name] = text
            if TOKENIZER_CONFIG in found:
                found[TOKENIZER_CONFIG] = self._tokenizer_config(found[TOKENIZER_CONFIG])
        generation = text_beside(self.models[self.donor], _GENERATION)
        if generation is not None:
            settings = json.loads(generation)
            theirs = text_beside(source, _GENERATION)
            self._special(settings, json.loads(theirs) if theirs is not None else {})
            if settings != json.loads(generation):
                found[_GENERATION] = json.dumps(settings, indent=2) + "\n"
        return found

    def _tokenizer_config(self, text: str) -> str:
        config = json.loads(text)
        if isinstance(config.get("added_tokens_decoder"), dict):
            config["added_tokens_decoder"] = {
                str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
                for entry in sorted(self.made.data.get("added_tokens") or [], key=lambda entry: int(entry["id"]))
            }
        return json.dumps(config, ensure_ascii=False, indent=2) + "\n"

    @property
    def stale(self) -> frozenset[str]:
        """Companions that would contradict the new tokenizer."""
        return STALE if self.changed or self.origin != self.donor else frozenset()


class _Elsewhere:
    """A folder that lends its tokenizer, but takes no part in the merge."""

    def __init__(self, path: str):
        folder = Path(path).expanduser()
        self.label, self.path = path, folder
        self.infos: Mapping[str, Any] = {}
        self.aliases: Mapping[str, str] = {}
        self.companions = tuple(p for p in sorted(folder.iterdir()) if p.is_file()) if folder.is_dir() else ()
        text = next((p.read_text("utf-8") for p in self.companions if p.name == "config.json"), "{}")
        self.config: dict[str, Any] = json.loads(text)

    def read(self, name: str) -> Any:
        raise TaskvecError(f"{self.label} lends its tokenizer only")

    read_flat: Any = read


def _check_rule(
    where: str,
    token: str,
    rule: "str | TokenOf",
    models: Mapping[str, TensorSource],
    tokenizers: Mapping[str, Tokenizer],
    problems: Problems,
) -> None:
    if rule == "zero":
        return
    path = rule.model if isinstance(rule, TokenOf) else rule
    if path not in models:
        problems.add(f"{where}.source: {path!r} is no model of this recipe." + did_you_mean(path, models))
        return
    ids, rows = tokenizers[path].ids, min(token_tables(models[path], tokenizers[path].rows).values(), default=0)
    wanted = rule.token if isinstance(rule, TokenOf) else token
    number = rule.token_id if isinstance(rule, TokenOf) and rule.token is None else ids.get(wanted or "")
    if number is None:
        problems.add(
            f"{where}.source: {path} has no token {wanted!r}."
            + did_you_mean(wanted or "", ids if len(ids) < 5000 else ())
        )
    elif number >= rows:
        problems.add(f"{where}.source: {path} has {rows} rows, none for token {number}")


# -- making a vocabulary ---------------------------------------------------------------------------------------------------


def _add(made: Tokenizer, token: str, entry: Mapping[str, Any] | None) -> None:
    """Gives a token the next number; with an entry it is an added token."""
    number = made.rows
    made.ids[token] = number
    if entry is not None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        full = {"id": number, "content": token, **flags, **{k: v for k, v in entry.items() if k in flags}}
        made.data.setdefault("added_tokens", []).append(full)
        made.added[token] = full


def _fill(made: Tokenizer) -> None:
    """Writes every token into the model's own vocabulary: the library numbers added tokens by itself otherwise."""
    vocabulary = made.data["model"]["vocab"]
    least = 0.0 if isinstance(vocabulary, dict) else min((piece[1] for piece in vocabulary), default=0.0) - 10.0
    for token, number in sorted(made.ids.items(), key=lambda item: item[1]):
        if isinstance(vocabulary, dict):
            vocabulary.setdefault(token, number)
        elif number == len(vocabulary):
            vocabulary.append([token, made.scores.get(token, least)])


def _add_all(made: Tokenizer, other: Tokenizer, first: Tokenizer, problems: Problems, warnings: list[str]) -> None:
    """Adds to a vocabulary what another one has beyond it: tokens, and the rules by which they are reached."""
    fresh = [token for token in sorted(other.ids, key=lambda t: other.ids[t]) if token not in made.ids]
    plain = [token for token in fresh if token not in other.added]
    if plain and other.kind != made.kind:
        problems.add(
            f"tokenizer: {first.label} is a {made.kind} tokenizer and {other.label} a {other.kind} one; their tokens are found by "
            "different rules, so no union reads text as either does. Take one of them (`source: base` or a path)."
        )
        return
    if plain and _decoder(other) != _decoder(made):
        problems.add(
            f"tokenizer: {first.label} and {other.label} write tokens in different alphabets ({_decoder(made)} and "
            f"{_decoder(other)}), so a union would not give back the text. Take one of them (`source: base` or a path)."
        )
        return
    if other.kind == "Unigram":
        made.scores |= {str(piece): float(score) for piece, score in other.data["model"]["vocab"]}
    made.ids |= {token: number for number, token in enumerate(plain, made.rows)}
    for token in fresh:
        if token not in made.ids:
            _add(made, token, other.added[token])
    if plain and other.kind == "BPE":
        have = {tuple(_merge(rule)) for rule in made.data["model"].get("merges") or []}
        rules = made.data["model"].setdefault("merges", [])
        as_text = bool(rules) and isinstance(rules[0], str)
        for rule in other.data["model"].get("merges") or []:
            pair = tuple(_merge(rule))
            if pair not in have:
                rules.append(" ".join(pair) if as_text else list(pair))
        warnings.append(
            f"tokenizer: the union reads text by the rules of {first.label}, then by those of {other.label}; it splits some texts "
            "otherwise than either of them"
        )


def _merge(rule: "str | Sequence[str]") -> Sequence[str]:
    return rule.split(" ") if isinstance(rule, str) else rule


def _decoder(tokenizer: Tokenizer) -> str:
    decoder = tokenizer.data.get("decoder") or {}
    kinds = [inner.get("type") for inner in decoder.get("decoders", ())]
    return "+".join(str(kind) for kind in kinds) or str(decoder.get("type", "plain"))


def _check_loads(made: Tokenizer, problems: Problems) -> None:
    """Whether the tokenizers library reads the new vocabulary as it is meant."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:  # transformers' users have it; others only merge
        return
    try:
        loaded = Library.from_str(json.dumps(made.data))
    except Exception as error:  # the library raises bare exceptions
        problems.add(f"tokenizer: the union cannot be built ({str(error).splitlines()[0]})")
        return
    wrong = [token for token, number in made.ids.items() if loaded.token_to_id(token) != number]
    if wrong:
        problems.add(
            f"tokenizer: the union cannot be built; {len(wrong)} tokens would get other numbers: {shortened(wrong)}"
        )


# -- chat templates --------------------------------------------------------------------------------------------------------

_TURNS = "{%% for message in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
TEMPLATES: Mapping[str, str] = {
    "chatml": _TURNS % (
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}", "{{ '<|im_start|>assistant\n' }}",
    ),
    "llama3": "{{ bos_token }}" + _TURNS % (
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    ),
    "mistral": "{{ bos_token }}" + _TURNS % (
        "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
        "{% else %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}", "",
    ),
    "alpaca": _TURNS % (
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + '\n\n' }}{% endif %}", "{{ '### Response:\n' }}",
    ),
    "exaone": _TURNS % (
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ '[|endofturn|]\n' }}{% endif %}", "{{ '[|assistant|]' }}",
    ),
}  # fmt: skip


def _template_of(source: TensorSource) -> str | None:
    text = text_beside(source, TEMPLATE)
    if text is not None:
        return text
    config = json.loads(text_beside(source, TOKENIZER_CONFIG) or "{}")
    found = config.get("chat_template")
    return found if isinstance(found, str) else None


def chat_template_files(
    wanted: str,
    donor: TensorSource,
    models: Sequence[TensorSource],
    files: Mapping[str, str],
    problems: Problems,
) -> dict[str, str]:
    """The files that give the result its chat template.

    Args:
        wanted: "auto" for the most common one of the models (the first of equally common ones), a known name, or a Jinja text.
        donor: the model whose files are copied.
        models: all models of the recipe.
        files: what is written already.
        problems: takes an unknown name.
    """
    if wanted == "auto":
        found = Counter(text for source in models if (text := _template_of(source)) is not None)
        if not found:
            return {}
        template = found.most_common(1)[0][0]
    elif wanted in TEMPLATES:
        template = TEMPLATES[wanted]
    elif "{{" in wanted or "{%" in wanted:
        template = wanted
    else:
        problems.add(
            f"chat_template: {wanted!r} is neither a Jinja text nor a known name."
            + did_you_mean(wanted, [*TEMPLATES, "auto"])
        )
        return {}
    made = {TEMPLATE: template}
    text = files.get(TOKENIZER_CONFIG) or text_beside(donor, TOKENIZER_CONFIG)
    if text is not None:
        config = json.loads(text)
        if config.pop("chat_template", None) is not None:
            made[TOKENIZER_CONFIG] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    return made
