"""The rules' own test: each catches what it is there to catch."""

from __future__ import annotations

import ast

import pytest
from tests.structure import test_docstrings, test_imports, test_platform_rules, test_sizes
from tests.structure.conftest import PACKAGE, Module


def module(text: str, name: str = "engine.example") -> Module:
    return Module(name, PACKAGE / f"{name.replace('.', '/')}.py", ast.parse(text))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (test_imports.test_imports_go_one_way, "from brim.worker.runner import ModelRunner"),
        (test_imports.test_imports_go_one_way, "import brim.server"),
        (test_imports.test_imports_go_one_way, "from ..models import base"),
        (test_imports.test_imports_go_one_way, "def f():\n    from brim.kernels.base import Kernels"),
        (test_imports.test_imports_stand_at_the_top, "def f():\n    import json"),
        (test_sizes.test_functions_are_short, "def f():\n" + "    x = 1\n" * 60),
        (test_sizes.test_functions_are_short, "class A:\n  def f(self):\n    def g():\n" + "      x = 1\n" * 60),
        (test_platform_rules.test_only_platforms_name_vendors_and_the_operating_system, "import psutil"),
        (test_platform_rules.test_only_platforms_name_vendors_and_the_operating_system, "from torch.cuda import Stream"),
        (test_platform_rules.test_only_platforms_name_vendors_and_the_operating_system, "import torch\ntorch.xpu.empty_cache()"),
        (test_platform_rules.test_only_platforms_name_vendors_and_the_operating_system, "open('/proc/self/status')"),
        (test_platform_rules.test_only_platforms_name_vendors_and_the_operating_system, "def f(p):\n    return p.name == 'cuda'"),
        (test_platform_rules.test_no_other_librarys_attribute_is_assigned, "import torch\ntorch.cuda.Stream = None"),
        (test_platform_rules.test_no_other_librarys_attribute_is_assigned, "import os\nos.environ['A'] = 'b'"),
        (test_platform_rules.test_no_other_librarys_attribute_is_assigned, "import torch\nsetattr(torch.cuda, 'Stream', None)"),
        (test_platform_rules.test_no_state_lives_in_a_module, "def f():\n    global x\n    x = 1"),
        (test_platform_rules.test_no_state_lives_in_a_module, "cache = {}"),
        (test_platform_rules.test_no_state_lives_in_a_module, "CACHE: dict[int, int] = dict()\ndef f():\n    CACHE[1] = 2"),
        (test_platform_rules.test_no_state_lives_in_a_module, "SEEN = []\ndef f():\n    SEEN.append(1)"),
        (test_docstrings.test_public_things_say_what_they_are, "x = 1"),
        (test_docstrings.test_public_things_say_what_they_are, '"""Doc."""\ndef f(): ...'),
        (test_docstrings.test_public_things_say_what_they_are, '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...'),
    ],
)
def test_a_violation_is_caught(rule: object, text: str) -> None:
    with pytest.raises(AssertionError):
        rule(module(text))  # type: ignore[operator]


GOOD = '''"""Owns nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from brim.config.schema import BrimConfig
from brim.errors import BrimError

if TYPE_CHECKING:
    from brim.worker.runner import ModelRunner

NAMES = {"a": 1}


class A(BrimError):
    """Doc: /proc and cuda may be named in words."""

    def __init__(self) -> None:
        self.cuda = NAMES["a"]
        self.table = {}
        self.table["x"] = torch.float32
'''


@pytest.mark.parametrize(
    "rule",
    [
        test_imports.test_imports_go_one_way,
        test_imports.test_imports_stand_at_the_top,
        test_sizes.test_functions_are_short,
        test_platform_rules.test_only_platforms_name_vendors_and_the_operating_system,
        test_platform_rules.test_no_other_librarys_attribute_is_assigned,
        test_platform_rules.test_no_state_lives_in_a_module,
        test_docstrings.test_public_things_say_what_they_are,
    ],
)
def test_what_is_right_passes(rule: object) -> None:
    rule(module(GOOD))  # type: ignore[operator]
