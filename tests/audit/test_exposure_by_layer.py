import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from merging.commands.audit import audit as command
from merging.edits.dimension import intrinsic_dimension
from merging.edits.plan import dimension_by_layer
from merging.edits.site import Site
from taskvec.errors import DataError, EditError, NotFoundError, UsageError

CORPUS = torch.randint(3, 89, (12, 21), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2"])
def test_every_layer_is_measured_at_the_same_positions_in_one_pass(
    name: str, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model(name)
    found = dimension_by_layer(model, CORPUS, thetas=[0.05, 0.3], length=8, batch=5)
    assert [one.layer for one in found.layers] == [0, 1, 2]
    # windows of 8, 8 and 5 tokens a text; the first of each is left out
    assert found.first_excluded == 36
    site = Site.find(model, 1)
    points, owner = [], []
    for number, ids in enumerate(CORPUS):
        for start in (0, 8, 16):
            with site.reading() as seen, torch.no_grad():
                model(input_ids=torch.tensor([ids[start : start + 8]]))
            points.append(site.sphere.project(seen[0][0, 1:]))
            owner += [number] * len(points[-1])
    by_hand = intrinsic_dimension(torch.cat(points), [0.05, 0.3], sequences=torch.tensor(owner), skip_first=0)
    raw = found.layers[1].raw
    assert (raw.used, raw.independent, raw.pairs) == (12 * 18, 12, by_hand.pairs)
    torch.testing.assert_close(raw.p, by_hand.p, rtol=0, atol=2e-4)
    assert raw.bound_applies
    assert found.layers[1].centred.bound_applies


def test_fewer_vectors_and_layers_may_be_asked_for(tiny_model: Callable[..., nn.Module]) -> None:
    seen: list[tuple[int, int]] = []
    found = dimension_by_layer(
        tiny_model("gpt2"), CORPUS, layers=[-1, 0], vectors=50, progress=lambda done, of: seen.append((done, of))
    )
    assert [one.layer for one in found.layers] == [0, 2]
    # four from each of twelve texts
    assert found.layers[0].raw.used == 48
    assert seen == [(1, 2), (2, 2)]
    again = dimension_by_layer(tiny_model("gpt2"), CORPUS, layers=[0], vectors=50)
    assert torch.equal(again.layers[0].raw.hits, found.layers[0].raw.hits)


def test_wrong_layers_and_too_little_text_are_refused(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(EditError, match="layer 3: the model has layers 0 to 2"):
        dimension_by_layer(model, CORPUS, layers=[3])
    with pytest.raises(DataError, match="corpus: 1 texts of more than one token"):
        dimension_by_layer(model, [CORPUS[0], [5]])


def saved(model: Any, folder: Path) -> str:
    words = {f"w{i}": i for i in range(89)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def test_the_command_measures_exposure_and_responses_of_a_model_on_disk(
    tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    folder = saved(tiny_model("gpt2"), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{i}" for i in ids) for ids in CORPUS))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(command, [folder, *arguments], standalone_mode=False, catch_exceptions=False)

    shown = run("--exposure", str(text), "--probe", str(text), "--plot", str(tmp_path / "a.png"))
    assert "first positions left out" in shown.output
    assert "Responses to 252 tokens of probe text were measured." in shown.output
    assert (tmp_path / "a-exposure.png").is_file()
    written = json.loads(run("--exposure", str(text), "--json").stdout)
    assert [one["layer"] for one in written["exposure"]["layers"]] == [0, 1, 2]
    assert written["alarms"] == 0
    with pytest.raises(NotFoundError, match="--exposure takes a text file"):
        run("--exposure", str(tmp_path / "none.txt"))
    (Path(folder) / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="transformers cannot load it"):
        run("--probe", str(text))
