"""Private APIs of torch come from one file, which says so where the installed torch lacks one."""

import ast
import re
from pathlib import Path

import pytest
from torch._inductor import config

from fusion_pass import inductor

ROOT = Path(__file__).parents[1]
FOLDERS = ("fusion_pass", "patterns", "kernels")
# Private by name alone: torch.utils._pytree, and torch._ops, where the classes of torch.ops are.
PRIVATE = re.compile(r"torch(?!\.ops\b)(\.\w+)*\._(?!pytree\b|ops\b|_)\w+|torch\.fx\.experimental\b")


def private_names(source):
    """Private modules that a source imports, and private attributes of torch that it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        yield from (name for name in names if PRIVATE.match(name))


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_one_file_uses_private_apis(folder):
    used = {
        str(path.relative_to(ROOT)): sorted(set(private_names(path.read_text())))
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "inductor.py"
    }
    assert {name: names for name, names in used.items() if names} == {}


def test_the_search_sees_private_names():
    source = "from torch._inductor import config\nimport torch\nx = torch._C.parse_schema('f() -> ()')"
    assert sorted(private_names(source)) == ["torch._C", "torch._C.parse_schema", "torch._inductor.config"]


def test_what_a_torch_version_lacks_is_named(monkeypatch):
    with pytest.raises(inductor.UnsupportedTorchError, match=r"lacks what it uses: torch\._inductor\.lowering\.none"):
        inductor._private("torch._inductor.lowering", "none")
    monkeypatch.setitem(config._config, inductor.POST_GRAD, object())
    with pytest.raises(inductor.UnsupportedTorchError, match="post_grad_custom_post_pass with a field user_override"):
        inductor._entry(inductor.POST_GRAD)
