"""From a method's name to its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import METHODS, settings, training_config
from monai_deepgmm.methods.cohort import CohortConfig
from monai_deepgmm.methods.task import MethodConfig
from monai_deepgmm.protocol import Protocol


def method_class(name: str) -> type[MethodConfig]:
    """The class of a method's settings.

    Raises:
        UsageError: the method is unknown.
    """
    settings.check_choice("method", name, tuple(METHODS))
    room, _, kind = METHODS[name].partition(":")
    found: type[MethodConfig] = getattr(import_module(f"monai_deepgmm.methods.{room}"), kind)
    return found


def default_method(protocol: Protocol, *, means: object = None, model: object = None) -> str:
    """The method where none is asked for; with a trained model or known means, one that uses them."""
    if model is not None:
        return "network"
    if means is None and protocol.method is not None:
        return protocol.method
    if means is None and protocol.anatomy is not None:
        return "anatomy"
    return "pvgmm" if means is None and protocol.borders else "svgmm"


def configure(
    name: str, values: Mapping[str, Any], protocol: Protocol, preprocessing: Preprocessing, fixed: Mapping[str, Any]
) -> MethodConfig:
    """A method's settings, resolved for a protocol.

    Args:
        name: one of ``METHODS``.
        values: from ``settings.parsed``, without those of the preprocessing.
        protocol: what is looked for.
        preprocessing: of the scans; where N4 takes the shading off, no method fits a field by itself.
        fixed: fields with an option of their own: ``network``, ``model``.

    Raises:
        UsageError: the method is unknown, or has no such setting or value.
    """
    kind = method_class(name)
    values = {**(protocol.settings if name == protocol.method else {}), **values}
    if kind is CohortConfig:
        training = training_config.configure(values, protocol, preprocessing=preprocessing)
        return CohortConfig(training, **fixed).resolved(protocol)
    begun = kind(**fixed)
    settings.check_keys(values, [*settings.keys(begun), *settings.keys(Preprocessing)], f"--method {name}")
    if preprocessing.n4 and "degree" in settings.keys(begun):
        if values.get("degree"):
            raise UsageError("n4 and degree: the shading is taken off once; choose one of them")
        values["degree"] = 0
    method: MethodConfig = settings.changed(begun, values, f"--method {name}")
    return method.resolved(protocol)


def help_method(name: str, protocol: Protocol) -> Iterator[str]:
    """The settings of a method, with defaults and units, as lines.

    Raises:
        UsageError: the method is unknown.
    """
    kind = method_class(name)
    yield f"--set KEY=VALUE with --method {name}:"
    if kind is CohortConfig:
        yield from settings.help_lines(training_config.configure({}, protocol))
    else:
        yield from settings.help_lines(kind())
        yield from settings.help_lines(Preprocessing())
