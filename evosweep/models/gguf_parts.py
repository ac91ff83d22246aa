"""A GGUF that is published in parts, under terms that its users must accept."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from packaging.version import Version

from evosweep.assets.wheels import JoinedFile, WheelFile
from evosweep.core.checks import check_bool
from evosweep.core.errors import ModelError, SettingError
from evosweep.models.load import GgufSource

PART = ("requirement", "member", "sha256")


class GgufInParts(GgufSource):
    """A GGUF model whose parts are in several wheels.

    Args:
        name: What to call it.
        file: Name of the whole GGUF.
        sha256: Hash of the whole GGUF.
        parts: ``requirement``, ``member`` and ``sha256`` of every part, in their order.
        terms: Terms that the model may be used under, with their address.
        accept_terms: Whether the user accepts them; nothing is downloaded or loaded otherwise.
        transformers: Oldest version of transformers that was seen to read the file rightly; null: any.
        dtype: Type in which weights are held and evaluated: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: Keep the blocks in host memory; each visits the device when it runs. For models larger than the GPU.
        base: Hub id of the model that it is.
        license: Licence of that, as the hub spells it.

    Raises:
        SettingError: The terms are not accepted, or a part lacks one of its three settings.
        ModelError: The installed transformers is older than that.
    """

    def __init__(
        self,
        *,
        name: str,
        file: str,
        sha256: str,
        parts: Sequence[Mapping[str, str]],
        terms: str,
        accept_terms: bool = False,
        transformers: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        offload: bool = False,
        base: str = "",
        license: str = "",
    ) -> None:
        wheels = [_wheel(index, part) for index, part in enumerate(parts)]
        if not check_bool("accept_terms", accept_terms):
            raise SettingError("accept_terms", allowed=f"true, which says that you accept the {terms}", got=False)
        _check_version(name, transformers)
        joined = JoinedFile(whole=file, sha256=sha256, parts=wheels)
        super().__init__(
            name=name, file=joined, dtype=dtype, device=device, offload=offload, base=base, license=license
        )


def _check_version(model: str, oldest: str | None) -> None:
    """Raise ModelError where the installed transformers is older than a model needs; older ones may read it wrongly."""
    installed = version("transformers")
    if oldest is not None and Version(installed) < Version(oldest):
        raise ModelError(f"{model} needs transformers {oldest} or newer, which reads its file rightly; got {installed}")


def _wheel(index: int, part: Mapping[str, str]) -> WheelFile:
    """Return the file of a part."""
    if sorted(part) != sorted(PART):
        raise SettingError(f"parts[{index}]", allowed=f"a section with {', '.join(PART)}", got=dict(part))
    return WheelFile(requirement=part["requirement"], member=part["member"], sha256=part["sha256"])
