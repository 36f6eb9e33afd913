"""`transformers.TrainingArguments`, imported in half the time: without peft, which takes three of six seconds.

transformers.trainer_utils imports peft for one question: is this model one of peft's? While it is imported, `peft` is a stand-in
whose two classes answer that question without it: as long as nothing else has imported peft, no model is one of its models.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

__all__ = ["TrainingArguments"]


class _ClassOfPeft(type):
    """A class that says of an object whether it is an instance of peft's class of the same name."""

    def __instancecheck__(cls, instance: object) -> bool:
        peft = sys.modules.get("peft")
        return peft is not None and isinstance(instance, getattr(peft, cls.__name__))


@contextlib.contextmanager
def _without_peft() -> Iterator[None]:
    """Inside, `import peft` gives the stand-in, where peft is installed and neither it nor its importer is imported already."""
    spec = importlib.util.find_spec("peft")
    if spec is None or {"peft", "transformers.trainer_utils"} & set(sys.modules):
        yield
        return
    stand_in = ModuleType("peft")
    stand_in.__spec__ = spec
    for name in ("PeftModel", "PeftMixedModel"):
        setattr(stand_in, name, _ClassOfPeft(name, (), {}))
    sys.modules["peft"] = stand_in
    try:
        yield
    finally:
        del sys.modules["peft"]


try:
    with _without_peft():
        from transformers import TrainingArguments
except ImportError:  # a version that asks more of peft
    from transformers import TrainingArguments
