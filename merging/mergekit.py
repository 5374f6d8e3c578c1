"""mergekit's recipes, read into ours with mergekit's meaning: statistics by tensor, its defaults, its parameter rules.

What mergekit lets pass in silence (misspelt keys, densities out of range, filters that match nothing, weights that
cancel) is refused here, and so is, by name, what this library does not do. Arithmetic is float32 whatever `dtype` says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.recipe import Recipe, parsed_yaml, plain
from taskvec.errors import RecipeError, did_you_mean

_TOP = {
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name",
}  # fmt: skip
_NO_EFFECT = {"int8_mask"}  # saves memory there; nothing here depends on it

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
_OWN_BASE = {"linear", "karcher"}  # a base_model there only lends its configuration


def read_mergekit(text: str, *, where: str = "recipe") -> Recipe:
    """A mergekit YAML as a recipe of ours.

    Args:
        text: the YAML.
        where: its name in messages.

    Raises:
        RecipeError: everything in it that is unknown, unsupported or contradictory, at once.
    """
    data = plain(parsed_yaml(text, where))
    problems: list[str] = []
    for key in data:
        if key not in _TOP:
            problems.append(f"{key}: mergekit has no such key." + did_you_mean(key, _TOP))
    for key, why in (
        ("slices", "stacking layers of several models is not supported; `models` merges whole ones"),
        ("modules", "merging submodules apart is not supported; use `include` or `keep_base` patterns in our recipe"),
        (
            "tokenizer",
            "building a tokenizer is not supported; `resize` in our recipe handles vocabularies of another size",
        ),
        ("chat_template", "replacing the chat template is not supported; the base's is copied"),
    ):
        if key in data and not (key == "chat_template" and data[key] == "auto"):
            problems.append(f"{key}: {why}")
    if data.get("tokenizer_source", "base") != "base":
        problems.append(
            f"tokenizer_source: {data['tokenizer_source']!r} is not supported; the base's tokenizer is copied"
        )
    name = str(data.get("merge_method"))
    if name not in _METHODS:
        problems.append(
            f"merge_method: {name!r} is not a method of mergekit that is known here." + did_you_mean(name, _METHODS)
        )
    if problems or name not in _METHODS:
        raise RecipeError(problems, title=f"{where} (mergekit's form) cannot be used")
    reader = _Reader(data, name, problems)
    recipe = reader.recipe()
    if problems:
        raise RecipeError(problems, title=f"{where} (mergekit's form) cannot be used")
    return Recipe.from_data(recipe, where=where)


class _Reader:
    def __init__(self, data: Mapping[str, Any], name: str, problems: list[str]):
        self.data, self.name, self.problems = data, name, problems
        self.method, self.preprocess, self.per_model, self.whole = _METHODS[name]
        self.top: dict[str, Any] = dict(data.get("parameters") or {})
        self.base = data.get("base_model")

    def recipe(self) -> dict[str, Any]:
        known = self.per_model | self.whole | _NO_EFFECT
        for key in self.top:
            if key not in known:
                self.problems.append(f"parameters.{key}: {self.name} has no such parameter." + did_you_mean(key, known))
        models = [self._model(entry) for entry in self.data.get("models") or []]
        if not models:
            self.problems.append("models: is missing or empty")
        if self.base is not None and self.name not in _OWN_BASE:
            # the base among the models is no task vector, as in mergekit
            models = [(path, own) for path, own in models if path != self.base or own]
        if self.name == "slerp" and self.base is not None:
            models = [(str(self.base), {}), *((path, own) for path, own in models if path != self.base)]
        parameters, steps = self._parameters(models)
        found: dict[str, Any] = {
            "tasks": [{"path": path, **self._weight(own, path)} for path, own in models],
            "method": self.method,
            "parameters": parameters,
            "statistics": "tensor",
        }
        if steps:
            found["preprocess"] = steps
        if self.base is not None and self.name not in _OWN_BASE | {"slerp"}:
            found["base"] = str(self.base)
            if self.name in ("nuslerp", "multislerp"):
                found["space"] = "delta"
        if "lambda" in self.top:
            found["scale"] = self._by_name(self.top["lambda"])
        stored = self.data.get("out_dtype") or self.data.get("dtype")
        if stored is not None:
            found["output"] = {"dtype": str(stored)}
        return found

    def _model(self, entry: Any) -> tuple[str, dict[str, Any]]:
        if not isinstance(entry, Mapping) or "model" not in entry:
            self.problems.append(f"models: {entry!r} is not a mapping with `model`")
            return "", {}
        for key in entry:
            if key not in ("model", "parameters"):
                self.problems.append(
                    f"models.{key}: there is no such key." + did_you_mean(key, ("model", "parameters"))
                )
        path = str(entry["model"])
        if "+" in path and not Path(path).exists():
            origin, _, adapter = path.partition("+")
            if origin != str(self.base):
                self.problems.append(
                    f"{path}: an adapter over another model than the base; apply it first (`taskvec apply`)"
                )
            path = adapter
        own = dict(entry.get("parameters") or {})
        for key in own:
            if key not in self.per_model | _NO_EFFECT:
                if key in self.whole:
                    self.problems.append(f"{path}: {key} holds for the whole merge; put it under the top `parameters`")
                else:
                    self.problems.append(
                        f"{path}: {self.name} has no parameter {key!r}." + did_you_mean(key, self.per_model)
                    )
        return path, own

    def _weight(self, own: Mapping[str, Any], path: str) -> dict[str, Any]:
        key = "scale" if self.name == "passthrough" else "weight"
        if key not in self.per_model:
            return {}
        value = own.get(key, self.top.get(key))
        if value is None:
            if key == "weight":
                self.problems.append(f"{path}: weight is missing (mergekit has no default for it)")
            return {}
        return {"weight": self._by_name(value)}

    def _by_name(self, value: Any) -> Any:
        """A number, a gradient, or filters with values, as our values by pattern."""
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            found: dict[str, Any] = {}
            for item in value:
                pattern = "default" if item.get("filter") in (None, "*") else f"*{item['filter']}*"
                found.setdefault(pattern, self._by_name(item.get("value")))
            found.setdefault("default", 0.0)
            return found
        if isinstance(value, list):
            return {"gradient": value}
        return value

    def _parameters(self, models: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        parameters: dict[str, Any] = {}
        step: dict[str, Any] = {"method": self.preprocess} if self.preprocess else {}
        for key in ("density", "epsilon", "gamma"):
            if key in self.per_model:
                values = [own.get(key, self.top.get(key)) for _, own in models]
                target = step if step else parameters
                target.update(self._per_model(key, values))
        if self.method == "ties" and step:
            parameters["density"] = 1.0
        rescale = self.top.get("rescale", self.name.startswith(("dare", "della")))
        if self.preprocess in ("dare", "della"):
            step["rescale"] = "l1" if rescale else False  # mergekit scales by a ratio of L1 norms
        elif self.preprocess == "breadcrumbs":
            step["rescale"] = bool(rescale)
        elif self.name == "ties" and rescale:
            step = {"method": "magnitude", "density": parameters["density"], "rescale": True}
            parameters["density"] = 1.0
        if "normalize" in self.whole:
            parameters["normalize"] = bool(self.top.get("normalize", _NORMALIZED.get(self.name, False)))
        for key, value in self.top.items():
            if key in ("normalize", "rescale", "lambda", "eps") or key in self.per_model or key in _NO_EFFECT:
                continue
            if key in ("nuslerp_flatten", "nuslerp_row_wise"):
                continue
            if key == "filter_wise":
                parameters["by"] = "row" if value else "tensor"
            elif self.name == "nearswap":
                parameters["distance"] = value
            else:
                parameters[_NAMES.get(key, key)] = self._by_name(value)
        if self.name == "nuslerp" and not self.top.get("nuslerp_flatten", True):
            parameters["by"] = "column" if self.top.get("nuslerp_row_wise", False) else "row"
        if self.name == "slerp" and "t" not in self.top:
            self.problems.append("parameters.t: is missing (mergekit has no default for it)")
        return parameters, [step] if step else []

    def _per_model(self, key: str, values: list[Any]) -> dict[str, Any]:
        default = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}[key]
        filled = [default if value is None else value for value in values]
        if all(not isinstance(value, list) for value in filled):
            same = len(set(filled)) <= 1
            return {key: filled[0] if same and filled else filled}
        if any(value != filled[0] for value in filled):
            self.problems.append(
                f"{key}: gradients or filters that differ between the models are not supported; give one for all"
            )
        return {key: self._by_name(filled[0])}
