"""The model card beside a merged model, in the hub's format."""

from collections.abc import Mapping
from io import StringIO
from typing import Any


def model_card(provenance: Mapping[str, Any], name: str, *, config: Mapping[str, Any]) -> str:
    """README.md for a merged model: front matter for the hub, what was merged, and the recipe.

    Args:
        provenance: what is known of the merge.
        name: title of the card.
        config: the model's config.json; decides whether the card names transformers.
    """
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = False
    recipe = provenance["recipe"]
    paths = list(dict.fromkeys(_paths(recipe)))
    front: dict[str, Any] = {
        "base_model": [path for path in paths if path and not path.startswith((".", "/", "~"))] or None,
        "library_name": "transformers" if config.get("architectures") else None,
        "tags": ["merge", "taskvec", provenance["method"]["name"]],
    }
    head, body = StringIO(), StringIO()
    yaml.dump({key: value for key, value in front.items() if value}, head)
    yaml.dump(recipe, body)
    lines = [
        "---",
        head.getvalue().rstrip(),
        "---",
        f"# {name}",
        "",
        f"Merged with taskvec {provenance['taskvec']}, method `{provenance['method']['name']}` ({provenance['method']['paper']}).",
        "",
        "| model | content hash |",
        "|---|---|",
        *(f"| {entry['name']}: {entry['path']} | `{entry['content_hash'][:16]}` |" for entry in provenance["inputs"]),
        "",
        "Recipe:",
        "",
        "```yaml",
        body.getvalue().rstrip(),
        "```",
        "",
        "`taskvec.json` holds every default, hash, norm and threshold; `taskvec verify` checks this folder against it.",
    ]
    if provenance["warnings"]:
        lines += ["", "Warnings:", "", *(f"- {warning}" for warning in provenance["warnings"])]
    return "\n".join(lines) + "\n"


def _paths(recipe: Any) -> list[str]:
    """Every model that a recipe names, wherever in it."""
    if isinstance(recipe, Mapping):
        own = [recipe[key] for key in ("base", "path", "over") if isinstance(recipe.get(key), str)]
        return own + [path for value in recipe.values() for path in _paths(value)]
    return [path for item in recipe for path in _paths(item)] if isinstance(recipe, list) else []
