"""For all tests: Triton's interpreter is chosen where there is no GPU, before anything (transformers does) imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
