"""A made-up host library with targets of its own, to show what the engine does without any real
host.
"""

import importlib.machinery
import sys
import types

import torch

from eet_patch import patching
from eet_patch.patching import Adapter, PatchTarget

HOST = "made_up_host"
MODULE = f"{HOST}.layers"
ONE = torch.ones(2)


def on(cls):
    """Whether calls of a made-up layer run the replacement (times 100) and not the original (plus
    1).
    """
    with torch.no_grad():
        out = cls()(ONE)
    assert out.tolist() in ([2, 2], [100, 100])
    return bool(out[0] == 100)


def scaling_adapter(factor=100.0, calls=None):
    """An adapter whose replacement returns hidden_states * factor; a layer's `reason` attribute
    makes it fall back.
    """

    def adapter(cls, original):
        def plan(layer, arguments):
            return getattr(layer, "reason", None) or (factor,)

        def forward(plan, layer, arguments):
            return arguments["hidden_states"] * plan[0]

        if calls is not None:
            calls.append((cls, original))
        return Adapter(plan, forward)

    return adapter


def target(name="made_up", attribute="Layer.forward", requires=f"{HOST}>=1,<2", adapter=None):
    return PatchTarget(name, MODULE, attribute, requires, adapter or scaling_adapter())


def make_module(version="1.5"):
    """The modules `made_up_host` and `made_up_host.layers`, in nobody's sys.modules yet."""
    host, layers = types.ModuleType(HOST), types.ModuleType(MODULE)
    host.__version__, host.__path__ = version, []

    class Layer(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1

    class Leaf(Layer):
        """Inherits forward."""

    class Wrapping:
        def __init_subclass__(cls):
            super().__init_subclass__()
            forward = cls.forward

            def wrapper(self, *args, **kwargs):
                self.through_wrapper = type(self).forward is wrapper
                return forward(self, *args, **kwargs)

            wrapper.__wrapped__ = forward
            cls.forward = wrapper

    class Wrapped(Wrapping, torch.nn.Module):
        """As transformers >= 5.23 treats the layers that it can checkpoint."""

        def forward(self, hidden_states):
            return hidden_states + 1

    for cls in (Layer, Leaf, Wrapping, Wrapped):
        cls.__module__ = MODULE
        setattr(layers, cls.__name__, cls)
    return host, layers


def insert(host, layers):
    sys.modules[HOST], sys.modules[MODULE] = host, layers
    host.layers = layers


class Finder:
    """Serves the made-up modules to the import system; `during` runs while `layers` is half
    imported.
    """

    def __init__(self, version="1.5", during=None):
        self.host, self.layers = make_module(version)
        self.during = during

    def find_spec(self, name, path=None, target=None):
        if name in (HOST, MODULE):
            return importlib.machinery.ModuleSpec(name, self, is_package=name == HOST)
        return None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        source = self.host if module.__name__ == HOST else self.layers
        if module.__name__ == MODULE and self.during is not None:
            self.during(module)
        for key, value in vars(source).items():
            if not key.startswith("__") or key == "__version__":
                setattr(module, key, value)


def forget(names):
    """Takes the made-up targets and modules out again."""
    patching.disable()
    for name in names:
        patching._patches.pop(name, None)
    for module in (HOST, MODULE):
        sys.modules.pop(module, None)
        patching._hooked_modules.discard(module)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
