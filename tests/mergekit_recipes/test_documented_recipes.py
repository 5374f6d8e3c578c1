"""The recipes of mergekit's documentation parse and plan. Values are the documentation's; models and layers are tiny."""

import json
import shutil
from pathlib import Path

import pytest

from merging import Recipe, merge
from merging.assembly import staged
from taskvec.errors import RecipeError

MORE = Path(__file__).parent.parent / "goldens" / "mergekit_more"

DOCUMENTED = {
    "linear": """
models:
  - {model: ft1, parameters: {weight: 1.0}}
  - {model: ft2, parameters: {weight: 0.3}}
  - {model: base, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
    "ties": """
models:
  - model: ft1
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: ft2
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: ft3
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "base listed with parameters": """
models:
  - model: ft1
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: base
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "ties of two": """
models:
  - model: ft1
    parameters: {density: 0.5, weight: 0.5}
  - model: ft2
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "gradient slerp": """
slices:
  - sources:
      - {model: ft1, layer_range: [0, 4]}
      - {model: ft2, layer_range: [0, 4]}
merge_method: slerp
base_model: ft1
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "taller model": """
slices:
  - sources:
    - model: ft1
      layer_range: [0, 3]
  - sources:
    - model: ft2
      layer_range: [2, 4]
merge_method: passthrough
dtype: float16
""",
    "fewer layers": """
slices:
  - sources:
    - model: ft1
      layer_range: [0, 2]
merge_method: passthrough
dtype: float16
""",
    "several merges in a file": """
slices:
  - sources:
      - {model: ft1, layer_range: [0, 4]}
      - {model: ft2, layer_range: [0, 4]}
merge_method: slerp
base_model: ft1
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5
dtype: float16
out_path: ./models/gradient-slerp
---
models:
  - model: ./models/gradient-slerp
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: ft3
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
out_path: ./models/gradient-slerp-ties
""",
    "arcee fusion": "models: [{model: ft1}, {model: ft2}]\nmerge_method: arcee_fusion\nbase_model: ft1\ndtype: bfloat16\n",
    "multimerge": """
name: first-merge
merge_method: linear
models:
  - model: base
  - model: ft1
parameters:
  weight: 0.5
---
name: second-merge
merge_method: slerp
base_model: first-merge  # Reference previous merge
models:
  - model: ft2
parameters:
  t: 0.5
---
# Final merge (no name)
merge_method: dare_ties
base_model: base
models:
  - model: second-merge
    parameters: {density: 0.6, weight: 0.5}
  - model: ft3
    parameters: {density: 0.8, weight: 0.5}
""",
    "nuslerp for slerp": """
models:
  - {model: ft1, parameters: {weight: 0.6}}
  - {model: ft2, parameters: {weight: 0.4}}
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "breadcrumbs": """
models:
  - {model: ft1, parameters: {weight: 0.6, density: 0.9, gamma: 0.01}}
  - {model: ft2, parameters: {weight: 0.4, density: 0.9, gamma: 0.01}}
merge_method: breadcrumbs_ties
base_model: base
""",
    "della": """
models:
  - {model: ft1, parameters: {weight: 0.6, density: 0.7, epsilon: 0.1}}
  - {model: ft2, parameters: {weight: 0.4, density: 0.5, epsilon: [0.1, 0.2]}}
merge_method: della
base_model: base
parameters: {lambda: 1.1}
""",
    "model stock": "models: [{model: ft1}, {model: ft2}, {model: ft3}]\nmerge_method: model_stock\nbase_model: base\nparameters: {filter_wise: false}\n",
    "sce": "models: [{model: ft1}, {model: ft2}]\nmerge_method: sce\nbase_model: base\nparameters: {select_topk: 0.6}\n",
    "nearswap": "models: [{model: ft1}]\nmerge_method: nearswap\nbase_model: base\nparameters: {t: 0.0001}\n",
    "karcher": "models: [{model: ft1}, {model: ft2}, {model: ft3}]\nmerge_method: karcher\nparameters: {max_iter: 10, tol: 1e-5}\n",
    "multislerp": "models: [{model: ft1, parameters: {weight: 1}}, {model: ft2, parameters: {weight: 2}}]\nmerge_method: multislerp\nparameters: {normalize_weights: true, eps: 1e-8}\n",
    "scaled passthrough": """
slices:
  - sources:
      - model: ft1
        layer_range: [0, 4]
        parameters:
          scale:
            - filter: down_proj
              value: 0.5
            - value: 1.0
merge_method: passthrough
""",
    "auto template": "models: [{model: ft1, parameters: {weight: 1}}, {model: ft2, parameters: {weight: 1}}]\nmerge_method: linear\nchat_template: auto\n",
}  # fmt: skip

TOKENS = {
    "legacy": "tokenizer_source: union\n",
    "modern": "tokenizer:\n  source: union\n  pad_to_multiple_of: null\n",
    "tokens": """
tokenizer:
  source: union
  tokens:
    # Use embedding from a specific model
    <|im_start|>:
      source: "inputs/b"
    # Force a specific embedding for all models
    </s>:
      source: "inputs/a"
      force: true
    # Map a token to another model's token embedding
    <|renamed_token|>:
      source:
        kind: "model_token"
        model: "inputs/a"
        token: "<s>"  # or use token_id: 1234
    # Use a zero embedding
    <|unused|>:
      source:
        kind: "zero"
chat_template: "chatml"
""",
    "path": "tokenizer:\n  source: inputs/b\n",
    "model: path": "tokenizer_source: model:inputs/b\n",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_recipes_plan(name, tmp_path, monkeypatch):
    for model in ("base", "ft1", "ft2"):
        shutil.copytree(MORE / "layers" / "inputs" / model, tmp_path / model)
    shutil.copytree(tmp_path / "ft2", tmp_path / "ft3")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_text(DOCUMENTED[name])
    assembly = staged(recipe, tmp_path / "out")[-1][1]
    assert len(assembly.infos) >= 21
    assert Recipe.from_text(recipe.dump()) == recipe
    merge(recipe.model_copy(update={"allow": ["duplicate_task"]}), tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"]
    assert layers == {"taller model": 5, "fewer layers": 2}.get(name, 4)


@pytest.mark.parametrize("name", TOKENS)
def test_documented_tokenizer_settings_plan(name, tmp_path, monkeypatch):
    shutil.copytree(MORE / "tokens" / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    models = "merge_method: linear\nmodels: [{model: inputs/a, parameters: {weight: 1}}, {model: inputs/b, parameters: {weight: 1}}]\n"
    recipe = Recipe.from_text(models + TOKENS[name])
    assert Recipe.from_text(recipe.dump()) == recipe
    assert staged(recipe, tmp_path / "out")[-1][1].parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: encoder_decoder_weighted\nmodels: [{model: ft1}]\n", "'encoder_decoder_weighted' is not a method of mergekit that is known here"),
        ("merge_method: slerp\nmodels: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.3}}]\n", "slerp has no parameter 'weight'"),
        ("merge_method: linear\nmodels: [{model: a, lora: b, parameters: {weight: 0.7}}]\n", "models.lora: there is no such key"),
        ("merge_method: slerp\nmodels: [{model: a}]\nparameters: {t: [{pattern: mlp, value: 1}]}\n", "t.pattern: there is no such key. Did you mean|t.pattern: there is no such key"),
    ],
)  # fmt: skip
def test_what_later_forks_document_is_refused_by_name(text, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_text(text)
