"""Merge two LoRA adapters into their base, and load the result in plain transformers.

python examples/merge_lora.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from merging import Recipe, merge

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained(folder / "base")
for name, rank in (("math", 4), ("code", 8)):
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / name)

recipe = Recipe.from_data(
    {"base": str(folder / "base"), "tasks": [str(folder / "math"), str(folder / "code")], "method": "task_arithmetic"}
)
merge(recipe, folder / "merged")

# the merge of one adapter alone is peft's own model; of two, the sum of both changes
words = torch.arange(10)[None]
merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
one = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), str(folder / "math"))
with torch.no_grad():
    gap = (merged(words).logits - one(words).logits).abs().max().item()
print(f"merged 2 adapters into {merged.num_parameters()} parameters; logits differ from math alone by up to {gap:.3f}")
