"""What each line of the ledger is, in one plain sentence for people. Owns the sentences; a test holds them against the owners."""

from __future__ import annotations

from collections.abc import Mapping

_BY_OWNER: Mapping[str, str] = {
    "interpreter and libraries": "Python, torch and the other libraries of the engine's process, as they were before the plan.",
    "device context": "What the driver takes on the device for any process that uses it, before Brim does anything.",
    "kernels and their scratch": "The compute kernels' code and the scratch memory they and the matrix library keep.",
    "runtime, grown while loading": "What the runtime and its allocator took while weights were read, beyond the weights.",
    "page tables and views": "Bookkeeping of the operating system and of torch for the addresses of the KV cache.",
    "model": "The model's weights in the layout the kernels compute with; their size follows from the shapes.",
    "rotary tables": "Sines and cosines for every position, computed once so that steps only look them up.",
    "step inputs": "Fixed buffers that carry token ids, positions and block tables into each step.",
    "sampler": "Fixed buffers for choosing the next tokens: parameters, probabilities and the tokens so far.",
    "set aside for requests": "Kept free for what requests take in the host's heap, such as prompts and block tables.",
    "step workspace": "One buffer for all intermediate results of the largest step, planned so that parts are used again.",
    "kernels and libraries": "What kernels and vendor libraries kept when each of them ran for the first time.",
    "what the worst steps left": "What stayed behind after the largest steps the scheduler can form had really run.",
    "captured steps": "Steps recorded once and replayed while serving, which saves the work of launching them.",
    "KV cache": "Keys and values of all tokens that requests hold or may use again; it takes what the cap leaves.",
    "grown while proving": "What grew while the worst steps ran again over the full cache, and has no other owner.",
    "other processes": "What all other processes held when the start was proven; never charged to Brim.",
    "reserve": "Kept free on purpose, for the driver, the display or the system; set with --reserve.",
    "free": "Nobody's: neither Brim nor a neighbour held it when the start was proven.",
}
_BY_CATEGORY: Mapping[str, str] = {
    "context": "What the runtime and the driver take for this process.",
    "weights": "The model's weights.",
    "buffers": "Fixed buffers, allocated once before serving.",
    "workspace": "Intermediate results of a step.",
    "activations": "What kernels and libraries keep beside their results.",
    "graphs": "Steps recorded once and replayed while serving.",
    "kv_cache": "Keys and values of the tokens that requests hold.",
    "adapters": "Small weights that adapt the model to a task.",
    "other_processes": "What other processes hold.",
    "reserve": "Kept free on purpose.",
    "free": "Nobody's.",
    "unattributed": "Measured, but without a known owner.",
}


def explain(category: str, owner: str) -> str:
    """The sentence of that line; of its category where its owner is not known here."""
    return _BY_OWNER.get(owner) or _BY_CATEGORY.get(category, "")
