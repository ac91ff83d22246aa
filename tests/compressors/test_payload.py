import pytest
import torch

from evosweep.compressors.base import LevelSpec, undominated
from evosweep.compressors.payload import Layout, Payload, format_module
from evosweep.core.errors import StoreError
from evosweep.core.unit import Nominal


def nested() -> Payload:
    inner = Payload("bitmask", {"values": torch.ones(2), "mask": torch.zeros(1, 1)}, {"rows": 1})
    middle = Payload("a.middle", {"left": torch.ones(3)}, {}, {"base": inner})
    return Payload("an.outer", {"right": torch.ones(5)}, {"rank": 2}, {"base": middle, "other": inner})


def test_tensors_of_parts_have_path_names() -> None:
    names = {"right", "base/left", "base/base/values", "base/base/mask", "other/values", "other/mask"}
    assert set(nested().flat()) == names
    assert nested().bits == 32 * (5 + 3 + 2 * (2 + 1))


def test_a_layout_puts_a_payload_together_again() -> None:
    payload = nested()
    layout = Layout.from_json(payload.layout().to_json())
    again = layout.assemble(payload.flat())
    assert layout == payload.layout() and again.layout() == layout
    assert again.parts["base"].parts["base"].format == "evosweep.compressors.formats.bitmask"
    assert again.parts["base"].parts["base"].meta == {"rows": 1}
    with pytest.raises(KeyError, match="base/left"):
        layout.assemble({name: tensor for name, tensor in payload.flat().items() if name != "base/left"})


@pytest.mark.parametrize("name", ["a/b", "a|b"])
def test_names_with_separators_are_refused(name: str) -> None:
    with pytest.raises(StoreError, match="named without"):
        Payload("bitmask", {name: torch.ones(1)}).layout()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_format", "cannot be imported.*install its package"),
        ("no_such_package.formats.x", "cannot be imported"),
        ("../secrets", "not the name of a payload format"),
        ("base64", "cannot be imported"),  # a bare name is one of ours
        ("json.decoder", "not the name of a payload format"),
        ("evosweep.core.files", "offers neither"),
        ("", "not the name|cannot be imported"),
    ],
)
def test_what_is_no_format_is_refused(name: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        format_module(name)


def test_a_format_may_be_a_layer_function() -> None:
    payload = Payload("tests.compressors.rotated", {"weight": torch.eye(2)}, {"steps": 2})
    assert torch.equal(payload.function(torch.tensor([[0.3, 1.1]])), torch.tensor([[0.5, 1.0]]))
    with pytest.raises(StoreError, match=r"'tests\.compressors\.rotated' are layer functions without a weight"):
        _ = payload.weight


def test_undominated_levels() -> None:
    levels = [
        LevelSpec(name, cost, Nominal("bits", 1.0), None) for name, cost in zip("abcd", (1, 2, 2, 3), strict=True)
    ]
    errors = {"a": 5.0, "b": 4.0, "c": 6.0, "d": 4.0}
    assert [level.name for level in undominated(levels, errors)] == ["a", "b"]
    assert [level.name for level in undominated(levels, errors, rivals=lambda level, _: level.name != "d")] == [
        "a",
        "b",
        "d",
    ]
    assert undominated(levels, dict.fromkeys("abcd", 1.0))[0].name == "a"
    twins = [levels[1], levels[2]]
    assert undominated(twins, {"b": 1.0, "c": 1.0}) == twins  # neither is better
