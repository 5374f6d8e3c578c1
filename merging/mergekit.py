"""mergekit's recipes, read into ours with mergekit's meaning: statistics by tensor, its defaults, its parameter rules.

What mergekit lets pass in silence (misspelt keys, densities out of range, filters that match nothing, weights that
cancel) is refused here, and so is, by name, what this library does not do. Arithmetic is float32 whatever `dtype` says.
"""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.recipe import Recipe
from merging.settings import parsed_documents, plain
from taskvec.errors import RecipeError, did_you_mean

_TOP = {
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "out_path",
}  # fmt: skip
_SLICE = {"sources", "base_model", "parameters", "residual_weight"}
_SOURCE = {"model", "layer_range", "parameters"}
_MODULE = {"slices", "models", "parameters"}
_NO_EFFECT = {"int8_mask"}  # saves memory there; nothing here depends on it
_IGNORED_THERE = {
    "task_arithmetic": {"density", "rescale"}
}  # declared, and without effect; many published recipes have them

# mergekit's name -> (our method, preprocess, parameters of a model, parameters of the whole)
_SPARSE = {"weight", "density"}
_METHODS: dict[str, tuple[str, str | None, set[str], set[str]]] = {
    "linear": ("average", None, {"weight"}, {"normalize"}),
    "slerp": ("slerp", None, set(), {"t"}),
    "nuslerp": ("nuslerp", None, {"weight"}, {"nuslerp_flatten", "nuslerp_row_wise"}),
    "multislerp": ("multislerp", None, {"weight"}, {"normalize_weights", "eps"}),
    "karcher": ("karcher", None, set(), {"max_iter", "tol"}),
    "task_arithmetic": ("task_arithmetic", None, {"weight"}, {"normalize", "lambda"}),
    "ties": ("ties", None, _SPARSE, {"normalize", "rescale", "lambda"}),
    "dare_linear": ("task_arithmetic", "dare", _SPARSE, {"normalize", "rescale", "lambda"}),
    "dare_ties": ("ties", "dare", _SPARSE, {"normalize", "rescale", "lambda"}),
    "della_linear": ("task_arithmetic", "della", {*_SPARSE, "epsilon"}, {"normalize", "rescale", "lambda"}),
    "della": ("ties", "della", {*_SPARSE, "epsilon"}, {"normalize", "rescale", "lambda"}),
    "breadcrumbs": ("task_arithmetic", "breadcrumbs", {*_SPARSE, "gamma"}, {"normalize", "rescale", "lambda"}),
    "breadcrumbs_ties": ("ties", "breadcrumbs", {*_SPARSE, "gamma"}, {"normalize", "rescale", "lambda"}),
    "sce": ("sce", None, set(), {"select_topk"}),
    "model_stock": ("model_stock", None, set(), {"filter_wise"}),
    "nearswap": ("nearswap", None, set(), {"t"}),
    "arcee_fusion": ("arcee_fusion", None, set(), set()),
    "ram": ("ram", None, set(), {"epsilon"}),
    "ramplus_tl": ("ramplus_tl", None, set(), {"epsilon", "r", "alpha"}),
    "passthrough": ("passthrough", None, {"scale"}, set()),
}
# the whole's parameters by other names
_NAMES = {
    "max_iter": "steps", "tol": "tolerance", "select_topk": "density", "r": "gain", "alpha": "ceiling",
    "normalize_weights": "normalize",
}  # fmt: skip
_NORMALIZED = {"linear": True, "ties": True, "della": True}  # `normalize` unless told otherwise; false elsewhere
_OWN_BASE = {"linear", "karcher"}  # a base_model there is a model like the others, which also lends its configuration
_LARGEST_MARGIN = 1e-6  # of multislerp's `eps`, which mergekit adds to norms
_DEFAULTS = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}

Scopes = Sequence[Mapping[str, Any]]
"""`parameters` mappings, the one that wins first: a source's, its slice's, its module's, the whole's."""


def read_mergekit(text: str, *, where: str = "recipe") -> Recipe:
    """A mergekit YAML as a recipe of ours; several documents (mergekit-multi's form) as one recipe with stages.

    Args:
        text: the YAML.
        where: its name in messages.

    Raises:
        RecipeError: everything in it that is unknown, unsupported or contradictory, at once.
    """
    documents = [plain(document) for document in parsed_documents(text, where)]
    title = f"{where} (mergekit's form) cannot be used"
    problems: list[str] = []
    found: list[tuple[str | None, dict[str, Any]]] = []
    for at, data in enumerate(documents):
        own: list[str] = []
        made = _document(data, own, alone=len(documents) == 1) if isinstance(data, Mapping) else None
        if made is None and not own:
            own.append(f"is {type(data).__name__}, not a mapping of keys")
        problems += [f"document {at + 1}: {problem}" if len(documents) > 1 else problem for problem in own]
        if made is not None:
            name = data.get("name", data.get("out_path")) if len(documents) > 1 else None
            found.append((None if name is None else str(name), made))
    if problems:
        raise RecipeError(problems, title=title)
    return Recipe.from_data(_joined(found, title), where=where)


def _joined(found: Sequence[tuple[str | None, dict[str, Any]]], title: str) -> dict[str, Any]:
    """The last merge, with those that are made before it as stages."""
    if len(found) == 1:
        return found[0][1]
    names = [name for name, _ in found if name is not None]
    used = {path for _, made in found for path in _paths_in(made)}
    ends = [at for at, (name, _) in enumerate(found) if name is None or name not in used]
    problems = [f"name: {name!r} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
    if len(ends) != 1:
        what = ", ".join(found[at][0] or f"document {at + 1}" for at in ends) or "none"
        problems.append(f"name: one merge is the result, used by no other; here that is {what}")
    if problems:
        raise RecipeError(problems, title=title)
    stages = {name: made for at, (name, made) in enumerate(found) if at != ends[0]}
    return {**found[ends[0]][1], "stages": stages}


def _paths_in(made: Any) -> list[str]:
    if isinstance(made, Mapping):
        own = [made[key] for key in ("base", "path", "over") if isinstance(made.get(key), str)]
        return own + [path for value in made.values() for path in _paths_in(value)]
    return [path for item in made for path in _paths_in(item)] if isinstance(made, list) else []


def _document(data: Mapping[str, Any], problems: list[str], *, alone: bool) -> dict[str, Any] | None:
    for key in data:
        if key not in _TOP or (key == "out_path" and alone):
            problems.append(f"{key}: mergekit has no such key." + did_you_mean(key, _TOP - {"out_path"}))
    name = str(data.get("merge_method"))
    if name not in _METHODS:
        problems.append(
            f"merge_method: {name!r} is not a method of mergekit that is known here." + did_you_mean(name, _METHODS)
        )
        return None
    return _Reader(data, name, problems).recipe()


@dataclass(frozen=True)
class _Reference:
    """A model as mergekit names it: path, revision, and an adapter over it."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def read(cls, value: Any, where: str, problems: list[str]) -> "_Reference":
        if isinstance(value, Mapping):
            for key in value:
                if key not in ("model", "lora"):
                    why = " is not supported" if key == "override_architecture" else ": there is no such key"
                    problems.append(f"{where}.{key}{why}")
            model, lora = cls._one(value.get("model"), where, problems), value.get("lora")
            if lora is None:
                return cls(*model)
            return cls(*model, *cls._one(lora, where, problems))
        text = str(value)
        if "+" in text and not Path(text).exists():
            model_text, _, lora_text = text.partition("+")
            return cls(*cls._one(model_text, where, problems), *cls._one(lora_text, where, problems))
        return cls(*cls._one(text, where, problems))

    @staticmethod
    def _one(value: Any, where: str, problems: list[str]) -> tuple[str, str | None]:
        if isinstance(value, Mapping):
            revision = value.get("revision")
            if "path" not in value:
                problems.append(f"{where}: {dict(value)!r} names no path")
            return str(value.get("path")), None if revision is None else str(revision)
        text = str(value)
        if "@" in text and not Path(text).exists():
            path, _, revision = text.rpartition("@")
            return path, revision
        return text, None


@dataclass
class _Entry:
    """One model of a merge, or of a slice of it."""

    model: _Reference
    scopes: list[Mapping[str, Any]]
    layers: list[int] | None = None
    where: str = "models"


@dataclass
class _Reader:
    data: Mapping[str, Any]
    name: str
    problems: list[str]
    base: _Reference | None = field(init=False)

    def __post_init__(self) -> None:
        self.method, self.preprocess, self.per_model, self.whole = _METHODS[self.name]
        self.ignored = _NO_EFFECT | _IGNORED_THERE.get(self.name, set())
        self.top = self._parameters_of(self.data, "parameters", everywhere=True)
        base = self.data.get("base_model")
        self.base = None if base is None else _Reference.read(base, "base_model", self.problems)
        if self.base is not None and self.base.adapter is not None:
            self.problems.append(
                "base_model: an adapter over a model cannot be the base; apply it first (`taskvec apply`)"
            )

    # -- the document ------------------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        forms = [key for key in ("models", "slices", "modules") if self.data.get(key)]
        if not forms:
            self.problems.append("models: is missing or empty (so are slices and modules)")
        elif len(forms) > 1:
            self.problems.append(f"{' and '.join(forms)}: only one of them can be there")
        found: dict[str, Any] = {}
        if forms == ["models"]:
            entries = self._models(self.data["models"], [self.top])
            found = self._merge(entries, [self.top], "models")
        elif len(forms) == 1:
            found = {"method": self.method}
            if forms == ["slices"]:
                found["slices"] = self._slices(self.data["slices"], [self.top], "slices")
            else:
                found["modules"] = self._modules(self.data["modules"])
            if self._needs_base:
                assert self.base is not None
                found |= self._base_of(self.base)
        found["statistics"] = "tensor"
        if self.base is not None and not self._needs_base:
            found["donor"] = self.base.path
        stored = self.data.get("out_dtype") or self.data.get("dtype")
        if stored is not None:
            found["output"] = {"dtype": str(stored)}
        return found | self._tokenizer()

    def _slices(self, slices: Any, scopes: Scopes, where: str) -> list[dict[str, Any]]:
        made = []
        for at, cut in enumerate(slices if isinstance(slices, list) else [None]):
            here = f"{where}.{at}"
            if not isinstance(cut, Mapping) or not isinstance(cut.get("sources"), list) or not cut["sources"]:
                self.problems.append(f"{here}: is not a mapping with `sources`")
                continue
            self._known(cut, _SLICE - {"residual_weight"}, here)
            inner = [self._parameters_of(cut, f"{here}.parameters", everywhere=True), *scopes]
            entries = []
            for place, source in enumerate(cut["sources"]):
                spot = f"{here}.sources.{place}"
                if not isinstance(source, Mapping) or "model" not in source:
                    self.problems.append(f"{spot}: {source!r} is not a mapping with `model`")
                    continue
                self._known(source, _SOURCE, spot)
                span = source.get("layer_range")
                if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
                    self.problems.append(
                        f"{spot}.layer_range: write the first layer and one past the last, as [0, 16]; found {span!r}"
                    )
                    continue
                own = self._parameters_of(source, f"{spot}.parameters")
                model = _Reference.read(source["model"], spot, self.problems)
                entries.append(_Entry(model, [own, *inner], span, spot))
            base = self.base
            if cut.get("base_model") is not None:
                base = _Reference.read(cut["base_model"], f"{here}.base_model", self.problems)
            made.append(self._merge(entries, inner, here, base))
        return made

    def _modules(self, modules: Any) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, module in modules.items() if isinstance(modules, Mapping) else [("", None)]:
            here = f"modules.{name}"
            if not isinstance(module, Mapping) or bool(module.get("slices")) == bool(module.get("models")):
                self.problems.append(f"{here}: is not a mapping with either `slices` or `models`")
                continue
            self._known(module, _MODULE, here)
            scopes = [self._parameters_of(module, f"{here}.parameters", everywhere=True), self.top]
            if module.get("slices"):
                made[str(name)] = {"slices": self._slices(module["slices"], scopes, f"{here}.slices")}
            else:
                made[str(name)] = self._merge(self._models(module["models"], scopes), scopes, here)
        return made

    def _models(self, models: Any, scopes: Scopes) -> list[_Entry]:
        entries = []
        for entry in models if isinstance(models, list) else [models]:
            if not isinstance(entry, Mapping) or "model" not in entry:
                self.problems.append(f"models: {entry!r} is not a mapping with `model`")
                continue
            self._known(entry, {"model", "parameters"}, "models")
            model = _Reference.read(entry["model"], "models", self.problems)
            entries.append(_Entry(model, [self._parameters_of(entry, str(model.path)), *scopes], None, str(model.path)))
        return entries

    def _known(self, entry: Mapping[str, Any], keys: set[str], where: str) -> None:
        for key in entry:
            if key not in keys:
                why = "mergekit accepts it and does nothing" if key == "residual_weight" else "there is no such key"
                self.problems.append(f"{where}.{key}: {why}." + did_you_mean(key, keys))

    def _parameters_of(self, entry: Mapping[str, Any], where: str, *, everywhere: bool = False) -> dict[str, Any]:
        """The parameters of a level; those of the whole merge only where `everywhere` says so."""
        found = entry.get("parameters")
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            self.problems.append(f"{where}: parameters are a mapping of keys, found {found!r}")
            return {}
        known = self.per_model | self.ignored | (self.whole if everywhere else set())
        if "density" in self.ignored and not _are_densities(found.get("density", 1.0)):
            self.problems.append(f"{where}: density is a number above 0 and up to 1, found {found['density']!r}")
        for key in found:
            if key in known:
                continue
            if key in self.whole:
                self.problems.append(f"{where}: {key} holds for the whole merge; put it under the top `parameters`")
            elif everywhere:
                self.problems.append(f"{where}.{key}: {self.name} has no such parameter." + did_you_mean(key, known))
            else:
                self.problems.append(
                    f"{where}: {self.name} has no parameter {key!r}." + did_you_mean(key, self.per_model)
                )
        return dict(found)

    # -- one merge ---------------------------------------------------------------------------------------------------------

    @property
    def _needs_base(self) -> bool:
        return self.base is not None and self.name not in _OWN_BASE | {"slerp", "passthrough"}

    def _base_of(self, base: _Reference) -> dict[str, Any]:
        found: dict[str, Any] = {"base": base.path}
        if base.revision is not None:
            found["base_revision"] = base.revision
        if self.name in ("nuslerp", "multislerp"):
            found["space"] = "delta"
        return found

    def _merge(
        self, entries: list[_Entry], scopes: Scopes, where: str, base: _Reference | None = None
    ) -> dict[str, Any]:
        """Tasks, parameters and steps of the whole, of a slice or of a module."""
        own = base is not None and base != self.base
        base = base or self.base
        found: dict[str, Any] = {}
        sliced = any(entry.layers is not None for entry in entries)
        if base is not None and self.name not in _OWN_BASE:
            listed = [entry for entry in entries if entry.model == base]
            if self.name == "slerp":
                entries = [*listed, *(entry for entry in entries if entry.model != base)]
                if not listed and not sliced:
                    entries = [_Entry(base, list(scopes)), *entries]
            elif self.name != "passthrough":
                # the base among the models is no task vector, as in mergekit, whatever parameters it has
                entries = [entry for entry in entries if entry.model != base]
                if sliced and listed:
                    found["base_layers"] = listed[0].layers
        elif base is not None and self.name in _OWN_BASE and not sliced and all(e.model != base for e in entries):
            entries = [
                *entries,
                _Entry(base, list(scopes), where=f"base_model {base.path}"),
            ]  # one model among the others there
        if not entries:
            self.problems.append(f"{where}: there is no model beside the base")
        parameters, steps = self._parameters(entries, scopes)
        found |= {"tasks": [self._task(entry, base) for entry in entries], "parameters": parameters}
        if not sliced and where == "models":
            found["method"] = self.method
            if self._needs_base and base is not None:
                found |= self._base_of(base)
        elif own and base is not None and self.name not in _OWN_BASE | {"slerp", "passthrough"}:
            found["base"] = base.path
        elif self.name in ("nuslerp", "multislerp") and self._needs_base:
            found["space"] = "delta"
        if steps:
            found["preprocess"] = steps
        if "lambda" in self.whole and (scale := self._value("lambda", scopes)) is not None:
            found["scale"] = scale
        return found

    def _task(self, entry: _Entry, base: _Reference | None) -> dict[str, Any]:
        model = entry.model
        found: dict[str, Any] = {"path": model.path}
        if model.revision is not None:
            found["revision"] = model.revision
        if model.adapter is not None:
            origin = _Reference(model.path, model.revision)
            found = {"path": model.adapter}
            if model.adapter_revision is not None:
                found["revision"] = model.adapter_revision
            if origin != base or not self._needs_base:
                found["over"] = model.path
                if model.revision is not None:
                    self.problems.append(f"{entry.where}: a revision of the model below an adapter is not supported")
        if entry.layers is not None:
            found["layers"] = entry.layers
        key = "scale" if self.name == "passthrough" else "weight"
        if key in self.per_model:
            value = self._value(key, entry.scopes)
            if value is not None:
                found["weight"] = value
            elif key == "weight":
                self.problems.append(f"{entry.where}: weight is missing (mergekit has no default for it)")
        return found

    def _value(self, key: str, scopes: Scopes, otherwise: Any = None) -> Any:
        """What holds for a parameter: a number, a gradient, or values by pattern; None where nobody says anything.

        A level whose filters leave tensors out passes those on to the next level, and the last one to the default.
        """
        patterns: dict[str, Any] = {}
        for scope in scopes:
            value = scope.get(key)
            if value is None:
                continue
            if not (isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)):
                leaf = self._leaf(key, value)
                return {**patterns, "default": leaf} if patterns else leaf
            for item in value:
                self._known(item, {"filter", "value"}, key)
                leaf = self._leaf(key, item.get("value"))
                if item.get("filter") in (None, "*"):
                    return {**patterns, "default": leaf} if patterns else leaf
                patterns.setdefault(f"*{glob.escape(str(item['filter']))}*", leaf)
        if patterns:
            # null: mergekit has no default, so a tensor that no filter matches is an error there, too
            return {
                **patterns,
                "default": otherwise if otherwise is not None else 1.0 if key in ("lambda", "scale") else None,
            }
        return otherwise

    def _leaf(self, key: str, value: Any) -> Any:
        if isinstance(value, list):
            if not value or not all(isinstance(item, int | float) for item in value):
                self.problems.append(f"{key}: a gradient is a list of numbers; found {value!r}")
            return {"gradient": value}
        if value is None:
            self.problems.append(f"{key}: an entry has no `value`")
        elif not isinstance(value, bool | int | float):
            self.problems.append(f"{key}: is neither a number nor a list; found {value!r}")
        return value

    def _parameters(self, entries: Sequence[_Entry], scopes: Scopes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        parameters: dict[str, Any] = {}
        step: dict[str, Any] = {"method": self.preprocess} if self.preprocess else {}
        for key, default in _DEFAULTS.items():
            if key in self.per_model:
                values = [self._value(key, entry.scopes, default) for entry in entries]
                same = all(value == values[0] for value in values)
                (step if step else parameters)[key] = values[0] if same and values else values
        if self.method == "ties" and step:
            parameters["density"] = 1.0
        rescale = self._value("rescale", scopes, self.name.startswith(("dare", "della")))
        if self.preprocess in ("dare", "della"):
            step["rescale"] = _mapped(
                rescale, lambda on: "l1" if on else False
            )  # mergekit scales by a ratio of L1 norms
        elif self.preprocess == "breadcrumbs":
            step["rescale"] = _mapped(rescale, bool)
        elif self.name == "ties" and rescale:
            step = {"method": "magnitude", "density": parameters["density"], "rescale": _mapped(rescale, bool)}
            parameters["density"] = 1.0
        for key in self.whole - {"rescale", "lambda", "eps", "nuslerp_flatten", "nuslerp_row_wise"}:
            value = self._value(key, scopes, _NORMALIZED.get(self.name, False) if key == "normalize" else None)
            if value is None:
                continue
            if key == "normalize":
                parameters["normalize"] = _mapped(value, bool)
            elif key == "filter_wise":
                parameters["by"] = _mapped(value, lambda on: "row" if on else "tensor")
            elif self.name == "nearswap":
                parameters["distance"] = value
            else:
                parameters[_NAMES.get(key, key)] = value
        if self.name == "multislerp" and len(entries) == 1:
            parameters["normalize"] = True  # one model alone comes out as it is there, whatever its weight
        if self.name == "nuslerp":
            flat, rows = self._value("nuslerp_flatten", scopes, True), self._value("nuslerp_row_wise", scopes, False)
            if isinstance(rows, Mapping):
                self.problems.append("nuslerp_row_wise: filters are not supported for it")
            across = "column" if rows else "row"
            if flat is not True:
                parameters["by"] = _mapped(flat, lambda on: "tensor" if on else across)
        margin = self._value("eps", scopes, 0.0)
        if self.name == "multislerp" and not (isinstance(margin, int | float) and 0 <= margin <= _LARGEST_MARGIN):
            self.problems.append(
                f"parameters.eps: {margin!r} is not supported: lengths are exact here, so up to {_LARGEST_MARGIN:g} it changes "
                "nothing; leave it out"
            )
        if self.name in ("slerp", "nearswap") and not {"t", "distance"} & set(parameters):
            self.problems.append("parameters.t: is missing (mergekit has no default for it)")
        return parameters, [step] if step else []

    # -- the tokenizer -----------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        legacy, spec, template = (self.data.get(key) for key in ("tokenizer_source", "tokenizer", "chat_template"))
        if template is not None:
            found["chat_template"] = str(template)
        if legacy is not None and spec is not None:
            self.problems.append("tokenizer_source, tokenizer: only one of them can be there")
        if legacy is not None:
            # there is one row for each token in mergekit, whatever padding the base had
            found["tokenizer"] = {"source": str(legacy).removeprefix("model:"), "multiple_of": 1}
        if spec is None:
            return found
        if not isinstance(spec, Mapping):
            self.problems.append(f"tokenizer: is a mapping with `source`, found {spec!r}")
            return found
        self._known(spec, {"source", "tokens", "pad_to_multiple_of"}, "tokenizer")
        tokens = spec.get("tokens") or {}
        made: dict[str, Any] = {}
        for token, rule in tokens.items() if isinstance(tokens, Mapping) else [("", tokens)]:
            here = f"tokenizer.tokens.{token}"
            if not isinstance(rule, Mapping) or "source" not in rule:
                self.problems.append(f"{here}: is not a mapping with `source`")
                continue
            self._known(rule, {"source", "force"}, here)
            made[str(token)] = {"source": self._token(rule["source"], here), "force": bool(rule.get("force", False))}
        found["tokenizer"] = {
            "source": _Reference.read(spec.get("source", "union"), "tokenizer.source", self.problems).path,
            "multiple_of": spec.get("pad_to_multiple_of") or 1,
            **({"padding": "mean"} if spec.get("pad_to_multiple_of") else {}),
            **({"tokens": made} if made else {}),
        }
        return found

    def _token(self, source: Any, where: str) -> Any:
        if not isinstance(source, Mapping) or "kind" not in source:
            return _Reference.read(source, where, self.problems).path
        kind = source["kind"]
        if kind == "zero":
            return "zero"
        if kind != "model_token":
            self.problems.append(
                f"{where}.source.kind: {kind!r} is unknown." + did_you_mean(str(kind), ("zero", "model_token"))
            )
            return "zero"
        self._known(source, {"kind", "model", "token", "token_id"}, f"{where}.source")
        model = _Reference.read(source.get("model"), where, self.problems).path
        return {"model": model, **{key: source[key] for key in ("token", "token_id") if source.get(key) is not None}}


def _are_densities(value: Any) -> bool:
    """Whether a value of mergekit's form holds nothing but fractions that can be kept."""
    if isinstance(value, list):
        return all(_are_densities(item.get("value") if isinstance(item, Mapping) else item) for item in value)
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= 1


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with every number (or flag) of it changed."""
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)
