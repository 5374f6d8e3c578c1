"""Merge three fine-tunes of one transformers model by a recipe, and load the result like any other model.

python examples/merge_checkpoints.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from merging import Recipe, merge, verify

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# a small Llama and three "fine-tunes" of it, saved as transformers saves them
config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
model = LlamaForCausalLM(config)
model.save_pretrained(folder / "base")
for name in ("math", "code", "chat"):
    tuned = LlamaForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / name)

recipe = Recipe.from_text(f"""
base: {folder}/base
tasks:
  math: {{path: {folder}/math, weight: 1.0}}
  code: {{path: {folder}/code, weight: 0.5}}
  chat: {folder}/chat
method: pcb
parameters: {{density: 0.2}}
scale: 1.2
keep_base: ["*norm*"]
""")
done = merge(recipe, folder / "merged")
verify(done.path)

merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
words = torch.arange(10)[None]
with torch.no_grad():
    change = (merged(words).logits - model(words).logits).abs().max().item()
print(f"merged 3 fine-tunes into {merged.num_parameters()} parameters; logits moved by up to {change:.3f}")
